# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what one call asks for and has done so far, and the lock of its VM."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import MonitorGone, Refused
from .._host.lock import locked
from .._qemu.monitor import Monitor
from .._qemu.query import inspect_vm
from .._qemu.vm_lock import host_lock_path, read_owners
from .examine import examine
from .steps import Situation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from .._host.preallocate import Writeback
    from .._host.process import Process
    from .request import DriveBackupRequest


@dataclass
class Session:
    """One call: what it asks for, and what it has done so far. C(commands) lists what QEMU was told.

    C(images) are the images that this process has made, by path. They stay open until it ends.
    """

    request: DriveBackupRequest
    commands: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changed: bool = False
    images: dict[str, Writeback] = field(default_factory=dict)

    def monitor(self) -> Monitor:
        """Return a conversation with QEMU that is still to be begun."""
        return Monitor(self.request.address, self.commands)


@dataclass(frozen=True)
class Locked:
    """A session that holds its VM's lock and its monitor. Whatever changes something takes one.

    C(fd) is the file descriptor of the lock.
    """

    session: Session
    monitor: Monitor
    fd: int


@asynccontextmanager
async def lock(session: Session, process: Process | None) -> AsyncIterator[Locked]:
    """Hold the lock of the VM whose QEMU is C(process), and its monitor after that."""
    address = session.request.address
    # In this order: nobody may wait for a lock while holding a monitor.
    async with locked(host_lock_path(process, address), str(address)) as fd, session.monitor() as monitor:
        if monitor.process != process:
            raise MonitorGone(f"{address}: QEMU was restarted in between")
        yield Locked(session, monitor, fd)


async def find_process(session: Session) -> Process | None:
    """Ask which QEMU serves the monitor; over TCP that is unknown."""
    async with session.monitor() as monitor:
        return monitor.process


async def observe(session: Session, monitor: Monitor, followed: str = "") -> Situation:
    """Look at the VM, and at all that is asked for."""
    request = session.request
    vm = await inspect_vm(monitor)
    owners = read_owners(host_lock_path(vm.process, request.address))
    copies = tuple(examine(drive, vm, owners) for drive in request.drives)
    nodes = [copy.disk.node for copy in copies]
    for copy in copies:
        if nodes.count(copy.disk.node) > 1:
            raise Refused("device", f"{copy.drive.device} is asked for more than once on VM {vm.name}")
    return Situation(request, vm, copies, followed)
