# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make calls about one domain of libvirt, in a thread.

A call cannot be interrupted, and while its QEMU hangs, so does it. The daemon has 20 workers for all its clients, and
answers five calls of a connection at a time (max_workers, max_client_requests): too many calls that hang would keep
everybody from healthy domains. So there is a connection for each domain, with one call at a time; and after one that
has hung, there is no other.
Reference: libvirt 9.0, virDomainGetControlInfo() in libvirt-domain.h.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .._common.errors import MonitorError, MonitorTimeout
from .._host.threads import CallThread
from .libvirt_connection import LibvirtConnection

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .address import Address


CALL_TIMEOUT = 35.0
"""Seconds for one call. Where another one holds the domain, libvirt itself gives up after 30."""
CLOSE_TIMEOUT = 5.0
"""Seconds for the end of a connection, which takes milliseconds."""
OCCUPIED_LIMIT = 10.0
"""Seconds that a command may be on its way in a domain, whoever has sent it, until it is taken to hang."""
OCCUPIED_PAUSE = 0.1
OCCUPIED = 2
"""The state of virDomainGetControlInfo() of a domain in which a command is on its way."""


class LibvirtDomain:
    """One domain, on a connection of its own. Calls are made one after the other; each has an end."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.connection: LibvirtConnection
        self._thread: CallThread | None = None
        self._turn: asyncio.Lock
        self._hangs = ""

    async def open(self) -> None:
        """Connect, and find the domain."""
        self.connection = LibvirtConnection(self.address)
        self._turn = asyncio.Lock()
        self._thread = CallThread()
        try:
            await self._in_turn("the look for the domain", self.connection.open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the connection. A call that hangs is left to its thread, which ends the connection after it."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        closed = thread.call(self.connection.close)
        thread.end()
        if not self._hangs:
            await asyncio.wait({closed}, timeout=CLOSE_TIMEOUT)

    async def call(self, what: str, function: Callable[[], Any], instead: Callable[[], None] | None = None) -> Any:
        """Call C(function) in the thread, in its turn. C(what) it does is told where that goes wrong.

        Where it is given up before it is called, what is to be done C(instead) is.
        """
        return await self._in_turn(what, lambda: self.connection.call(what, function), instead)

    async def _in_turn(self, what: str, function: Callable[[], Any], instead: Callable[[], None] | None = None) -> Any:
        async with self._turn:
            if self._thread is None:
                raise MonitorError(f"{self.address}: not connected")
            if self._hangs:
                raise MonitorTimeout(self._hangs)
            answer = self._thread.call(function, instead)
            try:
                await asyncio.wait({answer}, timeout=CALL_TIMEOUT)
            finally:
                if not answer.done():
                    answer.cancel()
            if answer.cancelled():
                who = "QEMU's main loop is blocked, usually by a hung disk or backup target, or " * (
                    self.connection.domain is not None
                )
                self._hangs = (
                    f"{self.address}: no answer to {what} within {CALL_TIMEOUT:g} s: {who}libvirt itself hangs. The"
                    " module sends no more commands to this domain"
                )
                raise MonitorTimeout(self._hangs)
            return answer.result()

    async def wait_until_free(self) -> None:
        """Wait while a command is on its way in the domain, whoever has sent it. MonitorTimeout where that hangs."""
        deadline = time.monotonic() + OCCUPIED_LIMIT
        control_info = self.connection.domain.controlInfo
        while True:
            state, _details, milliseconds = await self.call("the look for commands", control_info)
            if state != OCCUPIED:
                return
            if milliseconds >= OCCUPIED_LIMIT * 1000:
                raise MonitorTimeout(
                    f"{self.address}: QEMU has not answered a command to this domain, from any program, for"
                    f" {milliseconds / 1000:.0f} s (virsh domcontrol): QEMU is stopped, or a hung disk or target"
                    " blocks its main loop. This module sent no command to it"
                )
            if time.monotonic() >= deadline:
                # Those were several: it takes its turn among them.
                return
            await asyncio.sleep(OCCUPIED_PAUSE)
