# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the VMs of a hypervisor share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import (
    BandwidthLimiter,
    TimeSlice,
    VmSlots,
    first_of,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

AGES = {"old": "2026-01-01T00:00:00Z", "new": "2026-02-02T00:00:00Z", "never": ""}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def settle() -> None:
    """Let everybody go as far as they can."""
    for _dummy in range(20):
        await asyncio.sleep(0)


class TestTurns:
    def test_the_longest_without_a_backup_comes_first(self) -> None:
        async def main() -> list[str]:
            turns, came, never = VmSlots(1, AGES), [], asyncio.Event()

            async def copy(name: str) -> None:
                await turns.take(name, AGES[name], never)
                came.append(name)
                turns.leave(name)

            await asyncio.gather(*(copy(name) for name in ("new", "old", "never")))
            return came

        assert run(main()) == ["never", "old", "new"]

    def test_nobody_is_called_before_all_have_arrived(self) -> None:
        async def main() -> None:
            turns, never = VmSlots(1, ["a", "b"]), asyncio.Event()
            waiting = asyncio.ensure_future(turns.take("b", "2", never))
            await settle()
            assert not turns.has("b")
            turns.arrive("a")
            assert await waiting
            assert turns.has("b")

        run(main())

    def test_one_that_does_not_answer_holds_the_others_up_for_a_moment_only(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(VmSlots, "GRACE", 0.05)

        async def main() -> bool:
            return await VmSlots(1, ["silent", "b"]).take("b", "2", asyncio.Event())

        assert run(main())

    def test_who_does_not_want_to_wait_knows_as_soon_as_the_turns_are_taken(self) -> None:
        async def main() -> list[bool]:
            turns = VmSlots(2, AGES)
            return await asyncio.gather(*(turns.take(name, AGES[name]) for name in AGES))

        assert run(main()) == [True, False, True]

    def test_those_that_copy_already_count_however_many_there_are(self) -> None:
        async def main() -> list[bool]:
            turns = VmSlots(1, ["a", "b", "c"])
            turns.join("a")
            turns.join("b")
            assert turns.has("a")
            assert turns.has("b")
            turns.leave("a")
            turns.arrive("b")
            blocked = await turns.take("c", "")
            turns.leave("b")
            return [blocked, await turns.take("c", "")]

        assert run(main()) == [False, True]

    @pytest.mark.parametrize("limit", [0, 2, 3])
    def test_a_turn_for_everybody(self, limit: int) -> None:
        async def main() -> bool:
            return VmSlots(limit, ["a", "b"]).has("a")

        assert run(main())

    def test_the_end_of_a_call_ends_the_waiting(self) -> None:
        async def main() -> bool:
            turns, over = VmSlots(1, ["a", "other"]), asyncio.Event()
            turns.join("other")
            turns.arrive("other")
            waiting = asyncio.ensure_future(turns.take("a", "", over))
            await settle()
            assert not waiting.done()
            over.set()
            came = await waiting
            # It is not called behind its back.
            turns.leave("other")
            assert not turns.has("a")
            return came

        assert not run(main())


class TestBudget:
    @pytest.mark.parametrize(
        ("total", "ceiling", "jobs", "share"),
        [(0, 0, 3, 0), (0, 7, 3, 7), (90, 0, 3, 30), (90, 7, 3, 7), (90, 100, 3, 30), (2, 0, 3, 1), (90, 0, 0, 90)],
    )
    def test_share(self, total: int, ceiling: int, jobs: int, share: int) -> None:
        async def main() -> int:
            return BandwidthLimiter(total, ceiling).count("a", jobs)

        assert run(main()) == share

    def test_another_job_starts_when_the_others_have_come_down(self) -> None:
        async def main() -> int:
            budget = BandwidthLimiter(120, 0)
            budget.confirm("a", budget.count("a", 2))
            starting = asyncio.ensure_future(budget.reserve_share("b", 1))
            await settle()
            assert budget.share == 40
            assert not starting.done()
            budget.confirm("a", budget.count("a", 2))
            return await starting

        assert run(main()) == 40

    def test_one_that_starts_meanwhile_is_waited_for_until_it_has_come_down(self) -> None:
        async def main() -> list[int]:
            budget = BandwidthLimiter(120, 0)
            first = await budget.reserve_share("a", 1)
            second = asyncio.ensure_future(budget.reserve_share("b", 2))
            await settle()
            assert not second.done()
            budget.confirm("a", budget.count("a", 1))
            return [first, await second]

        assert run(main()) == [120, 40]

    def test_two_that_wait_do_not_wait_for_one_another(self) -> None:
        async def main() -> list[int]:
            budget = BandwidthLimiter(120, 0)
            budget.confirm("a", budget.count("a", 1))
            starting = [asyncio.ensure_future(budget.reserve_share(name, 1)) for name in ("b", "c")]
            await settle()
            budget.confirm("a", budget.count("a", 1))
            return await asyncio.gather(*starting)

        assert run(main()) == [40, 40]

    def test_one_that_never_comes_down_is_not_waited_for_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BandwidthLimiter, "PATIENCE", 0.05)

        async def main() -> int:
            budget = BandwidthLimiter(120, 0)
            # Found copying, and not asked yet.
            budget.count("a", 1)
            return await budget.reserve_share("b", 1)

        assert run(main()) == 60

    def test_one_that_has_ended_is_not_waited_for(self) -> None:
        async def main() -> int:
            budget = BandwidthLimiter(120, 0)
            budget.confirm("a", budget.count("a", 1))
            budget.count("a", 0)
            return await budget.reserve_share("b", 1)

        assert run(main()) == 120

    def test_a_change_wakes_those_that_pause(self) -> None:
        async def main() -> None:
            budget = BandwidthLimiter(120, 0)
            resting = asyncio.ensure_future(budget.pause(1000))
            await settle()
            budget.count("a", 1)
            await resting

        run(main())


class TestSlice:
    def test_it_is_over_after_its_time(self) -> None:
        async def main() -> None:
            await TimeSlice(0.01).over.wait()

        run(main())

    def test_nobody_is_interrupted(self) -> None:
        async def main() -> None:
            piece = TimeSlice(0.01)
            with piece.busy():
                await asyncio.sleep(0.1)
                assert not piece.over.is_set()
            # Goes on at once with the next thing.
            with piece.busy():
                await asyncio.sleep(0.1)
                assert not piece.over.is_set()
            await piece.over.wait()

        run(main())

    def test_without_an_end(self) -> None:
        async def main() -> bool:
            piece = TimeSlice(0)
            with piece.busy():
                await settle()
            await settle()
            return piece.over.is_set()

        assert not run(main())


def test_first_of_leaves_what_it_was_given() -> None:
    async def main() -> bool:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        event = asyncio.Event()
        event.set()
        await first_of(event, future)
        await first_of(future, timeout=0.01)
        return future.cancelled()

    assert not run(main())
