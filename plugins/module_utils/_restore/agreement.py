# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Let the files of a domain that is restored get their names together, after another look at the domain, or not at all.

Their copies may have taken hours, and with a part of its disks replaced, a domain is neither the old nor the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from .._common.errors import BackupError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any


class Ended(BackupError):
    """Another disk of the domain has failed, so that nobody needs this one."""


class Agreement:
    """What the disks of a domain wait for. C(look) raises BackupError where the domain is not to get them any more."""

    def __init__(self, look: Callable[[], Awaitable[None]], targets: Iterable[str]) -> None:
        self.look = look
        self._ready: dict[str, asyncio.Future[bool]] = {
            target: asyncio.get_running_loop().create_future() for target in targets
        }
        self._agreed = asyncio.ensure_future(self._agree())

    def complete(self, target: str) -> None:
        """Say that a disk is complete."""
        self._ready[target].set_result(True)

    async def reached(self) -> None:
        """Wait for all disks and the look; BackupError where one of these has failed."""
        await self._agreed

    async def unless_failed(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Do some work for a disk that is not complete, and end it as soon as another disk has failed: Ended then."""
        if self._agreed.done():
            await self._agreed
        task = asyncio.ensure_future(work())
        try:
            await asyncio.wait([task, self._agreed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if task.cancelled() and self._agreed.done():
            await self._agreed
        await task

    def leave(self, target: str) -> None:
        """Say that nothing more comes of a disk: where it is not complete by now, the others do not get their names."""
        if not self._ready[target].done():
            self._ready[target].set_result(False)

    async def end(self) -> None:
        """Forget it, also where no disk has got so far that it waited."""
        self._agreed.cancel()
        with contextlib.suppress(asyncio.CancelledError, BackupError, OSError):
            await self._agreed

    async def _agree(self) -> None:
        for ready in asyncio.as_completed(list(self._ready.values())):
            if not await ready:
                raise Ended("it was not put in its place, because another disk of the domain was not restored")
        await self.look()
