# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold a conversation with the QEMU of a domain through libvirt, which passes commands on as they are.

libvirt marks such a domain as tainted (custom-monitor): it does not know what was done there. It gives each command an
id of its own, and refuses one that has one.
Reference: libvirt 9.0, virDomainQemuMonitorCommandWithFiles() in libvirt-qemu.h.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from .._common.errors import CommandError, MonitorError, MonitorGone
from .._common.redaction import redact_text
from .._host.process import Process
from .answers import check_answer, senseless, version_text
from .libvirt_domain import LibvirtDomain

if TYPE_CHECKING:
    from typing import Any

    from .address import Address


class LibvirtClient:
    """A conversation with the QEMU of one domain. Of several questions at a time, one goes after the other."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.version = ""
        self._domain = LibvirtDomain(address)
        self._process: Process | None = None

    @property
    def domain(self) -> LibvirtDomain:
        """The domain, for questions that are not for its QEMU."""
        return self._domain

    async def open(self) -> Process | None:
        """Begin the conversation; return the domain's QEMU. None where its processes are out of sight."""
        await self._domain.open()
        try:
            if not await self._domain.call("the look for the domain", self._domain.connection.domain.isActive):
                raise MonitorGone(f"{self.address}: the domain is shut off")
            await self._domain.wait_until_free()
            await self._meet()
        except BaseException:
            await self.close()
            raise
        return self._process

    async def _meet(self) -> None:
        """Ask which QEMU this is."""
        try:
            self.version = version_text(await self.execute("query-version"))
            cpus = await self.execute("query-cpus-fast")
            check_answer("query-cpus-fast", cpus)
            self._process = _qemu_of(cpus, self._domain.connection.uuid)
        except ValueError as odd:
            raise senseless(self.address, "query-version or query-cpus-fast", odd) from odd

    async def close(self, _is_told: bool = True) -> None:
        """End the conversation."""
        await self._domain.close()

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """Run one QMP command and return its C(return) member. The open file C(fd) goes with it."""
        if self._process and not self._process.alive:
            # Another one, of the same name, is not the one that this conversation is with.
            raise MonitorGone(f"{self.address}: its QEMU (process {self._process.pid}) has ended")
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        file = self._copied(fd)
        told = await self._domain.call(command, lambda: self._ask(json.dumps(request), file), lambda: _close(file))
        try:
            answer = json.loads(told)
            if "error" in answer:
                error = answer["error"]
                raise CommandError(str(self.address), command, str(error["class"]), redact_text(str(error["desc"])))
            return answer["return"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise senseless(self.address, command, told) from None

    def _copied(self, fd: int | None) -> int | None:
        """Return a descriptor that nobody else closes while libvirt takes it."""
        try:
            return fd if fd is None else os.dup(fd)
        except OSError as error:
            raise MonitorError(f"{self.address}: cannot hand an open file to QEMU: {error.strerror}") from error

    def _ask(self, request: str, file: int | None) -> str:
        """Ask in the thread of the domain."""
        domain, qemu = self._domain.connection.domain, self._domain.connection.qemu
        try:
            if file is None:
                return str(qemu.qemuMonitorCommand(domain, request, 0))
            return str(qemu.qemuMonitorCommandWithFiles(domain, request, [file], 0)[0])
        finally:
            _close(file)


def _close(file: int | None) -> None:
    if file is not None:
        os.close(file)


def _qemu_of(cpus: list[dict[str, Any]], uuid: str) -> Process | None:
    """Return the process whose threads are the processors of the VM, if it is seen to be a QEMU of this uuid.

    QEMU tells ids of its own name space, which may be those of other processes here.
    """
    found = Process.of_thread(cpus[0]["thread-id"]) if cpus else None
    return found if found and uuid in found.arguments else None
