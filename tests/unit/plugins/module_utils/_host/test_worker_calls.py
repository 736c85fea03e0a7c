# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Calls that never return, of which a pipe that nobody writes to has many."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import RepositoryHangs
from ansible_collections.vmfleet.backup.plugins.module_utils._host import worker
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls

if TYPE_CHECKING:
    from collections.abc import Iterator


class ScriptedWatch:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.hangs = False

    async def ask(self) -> str:
        return "it hangs" if self.hangs else ""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MOMENT", 0.01)


@pytest.fixture
def hung() -> Iterator[int]:
    """What is read from it never comes."""
    source, sink = os.pipe()
    yield source
    os.close(sink)


def watched(watch: ScriptedWatch) -> ThreadedCalls:
    return ThreadedCalls(watch)  # type: ignore[arg-type]


def test_calls_are_made_in_their_order_by_one_thread() -> None:
    made: list[Any] = []

    def note(number: int) -> int:
        made.append((number, threading.get_ident()))
        return number

    async def work() -> list[int]:
        async with watched(ScriptedWatch()) as calls:
            return list(await asyncio.gather(*(calls.run(note, number) for number in range(20))))

    assert asyncio.run(work()) == list(range(20))
    assert [number for number, _thread in made] == list(range(20))
    assert len({thread for _number, thread in made}) == 1
    assert threading.get_ident() not in {thread for _number, thread in made}


def test_what_is_raised_is_told() -> None:
    async def work() -> None:
        async with watched(ScriptedWatch()) as calls:
            for run in (calls.run, calls.run_long):
                with pytest.raises(FileNotFoundError):
                    await run(os.stat, "/nowhere")

    asyncio.run(work())


def test_nothing_is_left_of_calls_that_return() -> None:
    before = threading.enumerate()

    async def work() -> None:
        async with watched(ScriptedWatch()) as calls:
            await asyncio.gather(calls.run(os.getpid), calls.run_long(os.getpid))

    asyncio.run(work())
    # A thread has answered a moment before it ends.
    for thread in set(threading.enumerate()) - set(before):
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("is_long", [False, True])
def test_who_waits_for_what_hangs_is_told(hung: int, is_long: bool) -> None:
    watch = ScriptedWatch()
    begun: list[int] = []

    async def work() -> None:
        async with watched(watch) as calls:
            run = calls.run_long if is_long else calls.run
            hanging = asyncio.ensure_future(run(os.read, hung, 1))
            behind = asyncio.ensure_future(calls.run(begun.append, 1))
            # Slow is not dead.
            await asyncio.sleep(0.1)
            assert not hanging.done()
            if is_long:
                await behind
            assert not behind.done() or is_long
            watch.hangs = True
            with pytest.raises(RepositoryHangs, match="it hangs"):
                await hanging
            if not is_long:
                with pytest.raises(RepositoryHangs, match="it hangs"):
                    await behind
            watch.hangs = False
            for later in (calls.run, calls.run_long):
                with pytest.raises(RepositoryHangs, match="it hangs"):
                    await later(begun.append, 2)

    asyncio.run(work())
    assert begun == ([1] if is_long else [])


def test_what_was_not_begun_before_the_hang_is_never_begun() -> None:
    watch = ScriptedWatch()
    source, sink = os.pipe()
    begun: list[int] = []

    async def work() -> None:
        async with watched(watch) as calls:
            waiting = [asyncio.ensure_future(calls.run(*call)) for call in ((os.read, source, 1), (begun.append, 1))]
            # Let them begin.
            await asyncio.sleep(0)
            held = os.dup(source)
            calls.close(held)
            watch.hangs = True
            for one in waiting:
                with pytest.raises(RepositoryHangs):
                    await one
            # It is back. All that is left to be done is to let go.
            os.close(sink)
            while _is_open(held):
                await asyncio.sleep(0.01)

    asyncio.run(work())
    os.close(source)
    assert not begun


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_that_cannot_be_closed_holds_up_nobody(hung: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = ScriptedWatch()
    close = os.close

    async def work() -> None:
        async with watched(watch) as calls:
            monkeypatch.setattr(os, "close", lambda fd: os.read(fd, 1))
            calls.close(hung)
            watch.hangs = True
        monkeypatch.setattr(os, "close", close)

    asyncio.run(work())
