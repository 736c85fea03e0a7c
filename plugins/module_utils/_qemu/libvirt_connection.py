# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Connect to the libvirt of a domain, and put its errors into our words.

It uses libvirt's Python binding, which no other file imports, and loads it only where a domain is asked: that takes
28 ms.
Reference: libvirt 9.0, libvirt-host.h and virterror.h.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import TYPE_CHECKING

from .._common.errors import MonitorError, MonitorGone, MonitorLost, MonitorTimeout
from .answers import quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .address import Address


MOST_NAMES = 3
"""How many domains with a name like it are told of one that there is not."""

# virErrorNumber
OPERATION_DENIED = 29
SYSTEM_ERROR = 38
NO_DOMAIN = 42
AUTH_FAILED = 45
NO_STORAGE_POOL = 49
OPERATION_INVALID = 55
OPERATION_TIMEOUT = 68
AUTH_CANCELLED = 78
AUTH_UNAVAILABLE = 79
ACCESS_DENIED = 88
NO_RIGHTS = (OPERATION_DENIED, AUTH_FAILED, AUTH_CANCELLED, AUTH_UNAVAILABLE, ACCESS_DENIED)


def load_binding(address: Address | str) -> tuple[Any, Any]:
    """Return the modules libvirt and libvirt_qemu. MonitorError where they are missing, or too old to pass files."""
    try:
        libvirt, libvirt_qemu = (importlib.import_module(name) for name in ("libvirt", "libvirt_qemu"))
    except ImportError as error:
        raise MonitorError(
            f"{address}: libvirt's Python binding cannot be imported by {sys.executable} ({quoted(error)}): install the"
            " package python3-libvirt (the role vmfleet.backup.hypervisor does), and let Ansible use the distribution's"
            " own Python (ansible_python_interpreter: /usr/bin/python3)"
        ) from None
    if not hasattr(libvirt_qemu, "qemuMonitorCommandWithFiles"):
        raise MonitorError(
            f"{address}: libvirt's Python binding is older than 8.2, and cannot hand open files to QEMU; give the VM a"
            " monitor of its own, and name its socket"
        )
    # The library would print each error, which it also raises.
    libvirt.registerErrorHandler(_keep_silent, None)
    return libvirt, libvirt_qemu


def unreachable(address: Address | str, uri: str, error: Any) -> MonitorError:
    """Return why there is no connection to libvirt."""
    said = quoted(error.get_error_message())
    if error.get_error_code() in NO_RIGHTS or "Permission denied" in said or "system bus" in said:
        return MonitorError(
            f"{address}: no right to use libvirt at {uri} ({said}): let Ansible become root, or name the libvirt of"
            " this user (libvirt_uri: qemu:///session)"
        )
    return MonitorLost(
        f"{address}: cannot connect to libvirt at {uri} ({said}): its daemon (libvirtd or virtqemud) does not run, or"
        " its socket is elsewhere (libvirt_uri)"
    )


def _keep_silent(_context: object, _error: object) -> None:
    """Print nothing."""


class LibvirtConnection:
    """A connection to one domain. Each call blocks, for as long as libvirt does."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.libvirt, self.qemu = load_binding(address)
        """The modules libvirt and libvirt_qemu."""
        self.domain: Any = None
        self.uuid = ""
        self._connection: Any = None

    def open(self) -> None:
        """Connect, and find the domain."""
        try:
            self._connection = self.libvirt.open(self.address.uri)
        except self.libvirt.libvirtError as error:
            raise unreachable(self.address, self.address.uri, error) from error
        self.call("the look for the domain", self._find)

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            try:
                self._connection.close()
            except self.libvirt.libvirtError:
                # libvirt itself has gone.
                return

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """Call C(function), and tell in our words what goes wrong. C(what) it does is part of them."""
        try:
            return function()
        except self.libvirt.libvirtError as error:
            raise self._error(what, error) from error

    def is_active(self) -> bool:
        """Return whether the domain has a QEMU, as far as libvirt knows."""
        try:
            return bool(self.domain and self.domain.isActive())
        except self.libvirt.libvirtError:
            return False

    def is_alive(self) -> bool:
        """Return whether the connection has not broken off."""
        try:
            return bool(self._connection.isAlive())
        except self.libvirt.libvirtError:
            return False

    def _find(self) -> None:
        try:
            self.domain = self._connection.lookupByName(self.address.domain)
        except self.libvirt.libvirtError as error:
            if error.get_error_code() != NO_DOMAIN:
                raise
            raise MonitorGone(f"{self.address}: libvirt has no domain of this name: {self._others()}") from error
        self.uuid = self.domain.UUIDString()

    def _others(self) -> str:
        """Return which domains there are instead."""
        names = sorted(domain.name() for domain in self._connection.listAllDomains(0))
        found = difflib.get_close_matches(self.address.domain, names, MOST_NAMES)
        if found:
            return f"is {' or '.join(found)} meant?"
        count = f"{len(names)} of other names" if names else "none at all"
        return f"it has {count} at {self.address.uri}; see `virsh -c {self.address.uri} list --all`"

    def _error(self, what: str, error: Any) -> MonitorError:
        code, said = error.get_error_code(), quoted(error.get_error_message())
        if not self.is_alive():
            return MonitorLost(
                f"{self.address}: the connection to libvirt broke off during {what} ({said}): its daemon was restarted,"
                " most often, and the VM goes on. Call again"
            )
        if code == OPERATION_TIMEOUT:
            return MonitorTimeout(
                f"{self.address}: {what} was not begun: another command to this domain, from any program, does not end"
                f" ({said}); see `virsh domcontrol` and `virsh domjobinfo`"
            )
        if code in NO_RIGHTS:
            return MonitorError(f"{self.address}: libvirt does not allow {what} ({said}): let Ansible become root")
        # libvirt may still have to hear of the end of a QEMU whose monitor has broken off.
        if code in (SYSTEM_ERROR, NO_DOMAIN) or not self.is_active():
            return MonitorGone(f"{self.address}: the domain is off, or its QEMU has just ended ({said})")
        return MonitorError(f"{self.address}: libvirt refused {what}: {said}")
