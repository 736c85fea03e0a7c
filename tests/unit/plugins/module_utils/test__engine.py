# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the engine knows without QEMU: whose turn it is."""

from __future__ import annotations

import asyncio

from ansible_collections.vmfleet.backup.plugins.module_utils import _engine


def test_turns_are_limited_but_what_copies_already_always_counts() -> None:
    async def run() -> None:
        turns = _engine._Turns(2)
        turns.join("a")
        turns.join("b")
        turns.join("c")
        assert turns.try_take("a")
        assert not turns.try_take("d")
        waiting = asyncio.ensure_future(turns.take("d"))
        await turns.leave("c")
        await asyncio.sleep(0)
        assert not waiting.done()
        await turns.leave("b")
        await asyncio.wait_for(waiting, 1)
        assert turns.taken == {"a", "d"}

    asyncio.run(run())


def test_no_limit() -> None:
    async def run() -> None:
        turns = _engine._Turns(0)
        assert all(turns.try_take(str(number)) for number in range(100))

    asyncio.run(run())
