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
        if not all(await asyncio.gather(*self._ready.values())):
            raise BackupError("it was not put in its place, because another disk of the domain was not restored")
        await self.look()
