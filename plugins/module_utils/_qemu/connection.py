# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the address of a monitor, connect to its socket, and tell why nobody answers there.

An Origin tells whether the QEMU that an attempt has met there has ended, as far as this process can see it.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import MonitorError, MonitorGone, MonitorTimeout, Refused
from .._host.process import PATHS, PORTS, PROCESSES, Process, shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import Vm


@dataclass(frozen=True)
class Address:
    """Where a monitor listens: a UNIX socket's path, or a TCP host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return ("tcp:[%s]:%d" if ":" in self.host else "tcp:%s:%d") % (self.host, self.port)


def parse_address(text: str, option: str = "monitor") -> Address:
    """Read C(unix:/path), C(/path) or C(tcp:host:port); anything else is Refused under the name of C(option)."""
    if text.startswith("libvirt:"):
        raise Refused(
            option,
            f"{text!r}: libvirt addresses are not supported yet; give the domain a monitor of its own"
            " (qemu:commandline with -qmp) and name its socket. Where AppArmor is on, it needs a rule for that socket,"
            " or the domain does not start any more: see 'Domains of libvirt' in the guide 'Getting started'",
        )
    if text.startswith("tcp:"):
        match = re.fullmatch(r"tcp:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", text)
        if not match or not 0 < int(match.group("port")) < 65536:
            raise Refused(option, f"{text!r} is not of the form tcp:HOST:PORT")
        return Address(host=match.group("v6") or match.group("host"), port=int(match.group("port")))
    path = text[len("unix:") :] if text.startswith("unix:") else text
    if not path.startswith("/"):
        raise Refused(option, f"{text!r} is neither unix:/PATH (or an absolute path) nor tcp:HOST:PORT")
    return Address(path=path)


CONNECT_TIMEOUT = 10.0
"""Seconds for the connection and the greeting: QEMU needs milliseconds, a monitor that is taken never sends one."""
RETRY_INTERVAL = 0.05
"""Seconds between attempts to enter a full backlog."""


async def connect(address: Address, deadline: float) -> tuple[socket.socket, Process | None]:
    """Connect to a monitor; return the connection, and the process at its other end where that can be told."""
    if not address.path:
        return await _connect_tcp(address, deadline), None
    while True:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise _unreachable(address, error) from error
        connection.setblocking(False)
        try:
            connection.connect(address.path)
        except BlockingIOError:
            # The backlog is full of clients that wait for their turn.
            connection.close()
            if time.monotonic() >= deadline:
                raise MonitorTimeout(no_greeting(address, None)) from None
            await asyncio.sleep(RETRY_INTERVAL)
        except OSError as error:
            connection.close()
            raise _unreachable(address, error) from error
        else:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return connection, Process.of(struct.unpack("3i", credentials)[0])


async def _connect_tcp(address: Address, deadline: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        connection = socket.socket(found[0][0], socket.SOCK_STREAM)
        connection.setblocking(False)
    except UnicodeError as error:
        raise MonitorError(f"{address}: cannot connect: {error}") from error
    except OSError as error:
        raise _unreachable(address, error) from error
    try:
        await asyncio.wait_for(loop.sock_connect(connection, found[0][4]), max(0.1, deadline - time.monotonic()))
    except asyncio.TimeoutError:
        connection.close()
        raise MonitorTimeout(f"{address}: no connection within {CONNECT_TIMEOUT:g} s") from None
    except OSError as error:
        connection.close()
        raise _unreachable(address, error) from error
    return connection


def _unreachable(address: Address, error: OSError) -> MonitorError:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        reason = "there is no such socket" if error.errno == errno.ENOENT else "nobody listens there"
        return MonitorGone(f"{address}: {reason}: the VM is off, or its monitor is elsewhere")
    return MonitorError(f"{address}: cannot connect: {error.strerror or error}")


def no_greeting(address: Address, process: Process | None) -> str:
    """Return why there was no greeting, as far as the kernel's list of sockets can tell."""
    start = f"{address}: no QMP greeting within {CONNECT_TIMEOUT:g} s: "
    held = (
        "another client holds this monitor, which serves one at a time; find it with `ss -xp`"
        " (libvirt, another backup, an open shell), or give the VM a second -qmp socket"
    )
    frozen = "QEMU does not accept connections: it is stopped, or its main loop is blocked by a hung disk or target"
    other = "the connection was accepted in silence: this is no QMP monitor, or its QEMU hangs"
    if not address.path:
        return f"{start}{held}, or {frozen}"
    stopped = f" (process {process.pid} is stopped)" if process and process.stopped else ""
    accepted, waiting = _clients(address.path)
    if accepted is None:
        return f"{start}{held}, or {frozen}"
    if not waiting:
        return start + other + stopped
    return start + (held if accepted else frozen) + stopped


def _clients(path: str) -> tuple[int | None, int]:
    """Return how many clients the socket at C(path) serves, and how many wait to be accepted.

    None where the kernel does not show it: it is of another network namespace, or has another path there. See unix(7),
    and net/unix/af_unix.c of Linux.
    """
    counts = {"03": 0, "02": 0}
    is_shown = False
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
            lines = table.readlines()
    except OSError:
        return None, 0
    for line in lines:
        columns = line.split(maxsplit=7)
        if len(columns) == 8 and columns[7].rstrip("\n") == path:
            is_shown = True
            if columns[5] in counts:
                counts[columns[5]] += 1
    return counts["03"] if is_shown else None, counts["02"]


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
        is_path = not self.monitor or bool(parse_address(self.monitor).path)
        return shared(PATHS if is_path else PORTS, self.spaces)
