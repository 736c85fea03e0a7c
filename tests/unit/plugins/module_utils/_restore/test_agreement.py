# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""When the files of a domain get their names: all of them, or none."""

from __future__ import annotations

import asyncio
from typing import Any

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.agreement import Agreement

DISKS = ("/a", "/b")


def agree(error: str = "", failing: tuple[str, ...] = ()) -> tuple[list[Any], list[str]]:
    """Return what becomes of two disks, and in which order things were done."""
    done: list[str] = []

    async def look() -> None:
        done.append("look")
        if error:
            raise BackupError(error)

    async def disk(agreement: Agreement, target: str) -> None:
        try:
            await asyncio.sleep(0.01 * DISKS.index(target))
            if target in failing:
                raise OSError(target)
            done.append(target)
            agreement.complete(target)
            await agreement.reached()
            done.append(f"named {target}")
        finally:
            agreement.leave(target)

    async def restore() -> list[Any]:
        agreement = Agreement(look, DISKS)
        found: list[Any] = await asyncio.gather(*(disk(agreement, one) for one in DISKS), return_exceptions=True)
        await agreement.end()
        return found

    return asyncio.run(restore()), done


def test_all_get_their_names_after_the_look() -> None:
    assert agree() == ([None, None], ["/a", "/b", "look", "named /a", "named /b"])


def test_what_has_changed_keeps_all_from_it() -> None:
    found, done = agree("it runs")
    assert [str(error) for error in found] == ["it runs"] * 2
    assert found[0] is found[1]
    assert done == ["/a", "/b", "look"]


def test_a_disk_that_fails_keeps_the_others_from_it() -> None:
    for failing in DISKS:
        found, done = agree(failing=(failing,))
        assert isinstance(found[DISKS.index(failing)], OSError)
        assert "because another disk of the domain was not restored" in str(found[1 - DISKS.index(failing)])
        assert [what for what in done if what not in DISKS] == []
    # Nobody waits for it.
    found, done = agree(failing=DISKS)
    assert done == []
