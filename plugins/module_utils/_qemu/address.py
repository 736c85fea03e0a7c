# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the address of a monitor: a UNIX socket, a TCP port, or a domain of libvirt.

An Origin tells whether the QEMU that an attempt has met there has ended, as far as this process can see it.
Reference: libvirt 9.0, docs/uri.rst and docs/formatdomain.rst (name).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._common.options import check_libvirt_uri, check_text
from .._host.process import PATHS, PORTS, PROCESSES, Process, shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import Vm


@dataclass(frozen=True)
class Address:
    """Where a monitor is: a UNIX socket's path, a TCP host and port, or a domain of the libvirt at C(uri).

    C(daemon) says that the socket is that of a storage daemon.
    """

    path: str = ""
    host: str = ""
    port: int = 0
    domain: str = ""
    uri: str = ""
    daemon: bool = False

    def __str__(self) -> str:
        if self.domain:
            return f"{LIBVIRT}{self.domain}"
        if self.path:
            return f"unix:{self.path}"
        return ("tcp:[%s]:%d" if ":" in self.host else "tcp:%s:%d") % (self.host, self.port)

    @property
    def stem(self) -> str:
        """What a VM is called of which nothing but this is known."""
        return self.domain or os.path.splitext(os.path.basename(self.path))[0] or str(self)

    @property
    def kind(self) -> str:
        """Which name spaces it belongs to. How libvirt is found, and what a name means to it, is a matter of paths."""
        return PORTS if self.port else PATHS


class FoundBy(IntEnum):
    """How a monitor has come to be asked for. What is less stands above what is more."""

    LISTED = 0
    """It is listed itself."""
    DOMAIN = 1
    """It is that of a domain of libvirt whose name matches a pattern."""
    SOCKET = 2
    """Its socket matches a pattern."""


LIBVIRT = "libvirt:"
DEFAULT_URI = "qemu:///system"
SYSTEM = (DEFAULT_URI, "qemu+unix:///system")
"""What the address of the system's libvirt begins with."""
NO_DOMAINS = (".", "..")


def parse_address(text: str, option: str = "monitor", libvirt_uri: str = "") -> Address:
    """Read C(unix:/path), C(/path), C(tcp:host:port) or C(libvirt:NAME), where all that follows is the name.

    Anything else is Refused under the name of C(option). A domain is one of the libvirt at C(libvirt_uri).
    """
    if text.startswith(LIBVIRT):
        return _domain(text, option, libvirt_uri)
    if text.startswith("tcp:"):
        match = re.fullmatch(r"tcp:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", text)
        if not match or not 0 < int(match.group("port")) < 65536:
            raise Refused(option, f"{text!r} is not of the form tcp:HOST:PORT")
        return Address(host=match.group("v6") or match.group("host"), port=int(match.group("port")))
    path = text[len("unix:") :] if text.startswith("unix:") else text
    if not path.startswith("/"):
        raise Refused(
            option, f"{text!r} is neither unix:/PATH (or an absolute path), nor tcp:HOST:PORT, nor libvirt:NAME"
        )
    return Address(path=path)


def _domain(text: str, option: str, uri: str) -> Address:
    name = text[len(LIBVIRT) :]
    check_text(option, text)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(option, f"{text!r} is no text in Unicode, as names of libvirt are") from None
    if not name or "/" in name or name in NO_DOMAINS:
        raise Refused(
            option,
            f"{text!r} names no domain: libvirt allows no empty name, and no '/' in a name; libvirt_uri selects the"
            " libvirt",
        )
    return Address(domain=name, uri=check_libvirt_uri("libvirt_uri", uri or DEFAULT_URI))


@dataclass(frozen=True)
class Origin:
    """The VM, the monitor and the QEMU process of an attempt, as they were called in the name spaces C(spaces)."""

    identity: str
    monitor: str
    process: tuple[int, ...] = ()
    spaces: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_from_here(self) -> bool:
        """Return whether the attempt was begun in the name spaces of this process."""
        return all(shared(kind, self.spaces) for kind in (PROCESSES, PATHS, PORTS))

    @property
    def knows_process(self) -> bool:
        """Return whether its process id means the same process here."""
        return bool(self.process) and shared(PROCESSES, self.spaces)

    def is_other_process(self, vm: Vm) -> bool:
        """Return whether the QEMU that answers is certainly not the one of the attempt."""
        if vm.process is None or not self.knows_process:
            return False
        return (vm.process.pid, vm.process.start) != self.process

    def has_ended(self, vm: Vm | None, off: bool, has_traces: bool) -> bool | None:
        """Return whether the QEMU of an attempt on this machine, since its last boot, has ended; None: nobody can tell.

        C(vm) is what answers at its monitor now, C(off) says that nobody is there, and C(has_traces) that what answers
        has a job of this attempt.
        """
        if has_traces:
            return False
        if self.knows_process:
            return not Process(*self.process).alive
        if vm is not None:
            return False if self._is_succeeded_by(vm) else None
        if not off:
            return False
        return True if self._shares_address() else None

    def _is_succeeded_by(self, vm: Vm) -> bool:
        """Return whether what answers is the same VM: a job that it does not have is gone then."""
        if vm.identity != self.identity:
            return False
        if not self.spaces:
            return True
        # Without a uuid, VMs of two containers can have the same name.
        return self.monitor in ("", vm.monitor) and (bool(vm.uuid) or self._shares_address())

    def _shares_address(self) -> bool:
        """Return whether the address of its monitor means the same here."""
        return shared(parse_address(self.monitor).kind if self.monitor else PATHS, self.spaces)
