# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make calls in a thread that may never return, and let an event loop wait for their answers.

Such a thread is a daemon: the process ends without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    T = TypeVar("T")


class CallThread:
    """A thread that makes calls, one after the other, for the event loop that runs."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Have C(work), which raises nothing, done after the calls before it."""
        self._queue.put(work)

    def call(self, function: Callable[[], Any], instead: Callable[[], None] | None = None) -> asyncio.Future[Any]:
        """Have C(function) called after the calls before it.

        One that nobody waits for by then is not called, but what is to be done C(instead).
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def work() -> None:
            if not answer.cancelled():
                answer_in_thread(answer, function)
            elif instead:
                instead()

        self.put(work)
        return answer

    def end(self) -> None:
        """Let the thread end after the calls before this."""
        self._queue.put(None)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()

    def _work(self) -> None:
        for work in iter(self._queue.get, None):
            work()


async def within(seconds: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call C(function) in a thread, and return what it returns; asyncio.TimeoutError where that takes longer."""
    answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    call = (answer, lambda: function(*args, **kwargs))
    threading.Thread(target=answer_in_thread, args=call, daemon=True).start()
    return await asyncio.wait_for(answer, seconds)


def wait_within(seconds: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do what within() does where no event loop can wait: this thread waits. TimeoutError where that takes longer."""
    answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            answers.put((function(*args, **kwargs), None))
        except BaseException as raised:  # noqa: BLE001
            answers.put((None, raised))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found  # type: ignore[no-any-return]


def answer_in_thread(answer: asyncio.Future[Any], function: Callable[[], Any]) -> None:
    """Call C(function) in this thread, and give what it returns or raises to whoever waits for C(answer)."""
    found, error = None, None
    try:
        found = function()
    except BaseException as raised:  # noqa: BLE001
        error = raised
    # What has hung may come back after the loop has ended.
    with contextlib.suppress(RuntimeError):
        answer.get_loop().call_soon_threadsafe(settle, answer, found, error)


def settle(answer: asyncio.Future[Any], found: Any, error: BaseException | None) -> None:
    """Settle an answer, unless it is settled already."""
    if answer.done():
        return
    if error is None:
        answer.set_result(found)
    else:
        answer.set_exception(error)
