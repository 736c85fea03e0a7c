# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Connect to the socket of a monitor, and tell why nobody answers there."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from typing import TYPE_CHECKING

from .._common.errors import MonitorError, MonitorGone, MonitorTimeout, why
from .._host.process import Process

if TYPE_CHECKING:
    from .address import Address


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
    return MonitorError(f"{address}: cannot connect: {why(error)}")


def no_greeting(address: Address, process: Process | None) -> str:
    """Return why there was no greeting, as far as the kernel's list of sockets can tell."""
    start = f"{address}: no QMP greeting within {CONNECT_TIMEOUT:g} s: "
    held = (
        "another client holds this monitor, which serves one at a time; find it with `ss -xp`"
        " (libvirt, another backup, an open shell), or give the VM a second -qmp socket"
    )
    frozen = "QEMU does not accept connections: it is stopped, or its main loop is blocked by a hung disk or target"
    other = "it accepted the connection and sent nothing: it is no QMP monitor, or its QEMU hangs"
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
