# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A thread that makes calls for an event loop, one after the other, and hangs in one of them."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.threads import CallThread

PATIENCE = 30


def test_calls_are_made_in_their_order() -> None:
    made: list[int] = []

    async def call() -> list[Any]:
        thread = CallThread()
        found = await asyncio.gather(*(thread.call(lambda each=each: made.append(each) or each) for each in range(9)))  # type: ignore[misc]
        thread.end()
        return found

    assert asyncio.run(call()) == made == list(range(9))


def test_an_error_comes_to_the_caller() -> None:
    async def call() -> None:
        thread = CallThread()
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda: 1 // 0)
        thread.end()

    asyncio.run(call())


def test_what_nobody_waits_for_any_more_is_not_called() -> None:
    go_on, made = threading.Event(), []

    async def call() -> None:
        thread = CallThread()
        first = thread.call(lambda: go_on.wait(PATIENCE))
        second = thread.call(lambda: made.append("second"), lambda: made.append("instead"))
        third = thread.call(lambda: made.append("third"))
        second.cancel()
        go_on.set()
        await asyncio.gather(first, third)
        thread.end()

    asyncio.run(call())
    assert made == ["instead", "third"]


def test_a_loop_ends_without_a_call_that_hangs() -> None:
    go_on = threading.Event()
    # Those of the tests before may still be about to end.
    before = set(threading.enumerate())

    async def call() -> None:
        thread = CallThread()
        hanging = thread.call(lambda: go_on.wait(PATIENCE))
        thread.end()
        await asyncio.wait({hanging}, timeout=0)

    asyncio.run(call())
    [started] = set(threading.enumerate()) - before
    go_on.set()
    deadline = time.monotonic() + PATIENCE
    while started.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
