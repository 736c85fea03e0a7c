# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Call a file system that may begin to hang at any moment: then a call never returns, and nothing can interrupt it.

Such a call is made in a thread. Whoever waits for it gets an error when the file system is seen to hang; the call is
left behind with its thread, and with the locks that were taken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from .._common.errors import RepositoryHangs
from .calls import DirectCalls

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ParamSpec, TypeVar

    from .probe import Watch

    P = ParamSpec("P")

    T = TypeVar("T")


MOMENT = 1.0
"""Seconds that a call may take before the file system is asked whether it answers at all."""
LONG_AT_ONCE = 6
"""How many calls that take long are made at the same time."""


class ThreadedCalls(DirectCalls):
    """Calls in threads: run() and close() one after the other in one of them, run_long() beside them.

    From the moment on that the file system is seen to hang, all of them raise RepositoryHangs, and nothing is begun any
    more. Belongs to the event loop that runs. Leaving the context ends the thread, unless that hangs.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._hangs = ""
        self._awaited: set[asyncio.Future[Any]] = set()
        self._asking: asyncio.Task[None] | None = None
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._places = asyncio.Semaphore(LONG_AT_ONCE)

    async def __aenter__(self) -> ThreadedCalls:
        return self

    async def __aexit__(self, *exc: object) -> None:
        # To close a file can hang as well, and nobody has waited for that.
        with contextlib.suppress(RepositoryHangs):
            await self.run(self._queue.put, None)
            if self._worker:
                self._worker.join()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function) after the calls before it, and return what it returns; RepositoryHangs where it hangs."""
        answer = self._begin()
        self._put(lambda: self._call(answer, lambda: function(*args, **kwargs)))
        found: T = await answer
        return found

    async def run_long(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function) beside the others, which do not wait for it, and return what it returns."""
        async with self._places:
            answer = self._begin()
            call = (answer, lambda: function(*args, **kwargs))
            threading.Thread(target=self._call, args=call, daemon=True).start()
            found: T = await answer
            return found

    def close(self, fd: int) -> None:
        self._put(lambda: _close(fd))

    def _put(self, work: Callable[[], None]) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, daemon=True)
            self._worker.start()
        self._queue.put(work)

    def _work(self) -> None:
        for work in iter(self._queue.get, None):
            work()

    def _call(self, answer: asyncio.Future[Any], function: Callable[[], Any]) -> None:
        if self._hangs:
            # Its caller was told already that it hangs.
            return
        found, error = None, None
        try:
            found = function()
        except BaseException as raised:  # noqa: BLE001
            error = raised
        # The file system may come back after the loop has ended.
        with contextlib.suppress(RuntimeError):
            answer.get_loop().call_soon_threadsafe(_settle, answer, found, error)

    def _begin(self) -> asyncio.Future[Any]:
        """Return an answer to wait for."""
        if self._hangs:
            raise RepositoryHangs(self._hangs)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._awaited.add(answer)
        answer.add_done_callback(self._awaited.discard)
        if self._asking is None:
            self._asking = loop.create_task(self._ask())
        return answer

    async def _ask(self) -> None:
        """Watch over the file system for as long as somebody waits for an answer."""
        try:
            while self._awaited:
                await asyncio.sleep(MOMENT)
                # No process could be started to ask: maybe the next time.
                with contextlib.suppress(OSError):
                    await self._give_up_what_hangs()
        finally:
            self._asking = None

    async def _give_up_what_hangs(self) -> None:
        reason = await self.watch.ask() if self._awaited else ""
        if reason and self.watch.hangs:
            self._hangs = reason
            for answer in self._awaited:
                _settle(answer, None, RepositoryHangs(reason))


def _close(fd: int) -> None:
    # Nobody can do anything about an error. The fsync before it has told those that matter.
    with contextlib.suppress(OSError):
        os.close(fd)


def _settle(answer: asyncio.Future[Any], found: Any, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(found)
    else:
        answer.set_exception(error)
