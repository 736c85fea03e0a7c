# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""When the files of a domain get their names: all of them, or none."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import restore
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.agreement import Agreement, Ended
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import RestoreOptions
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import disk_restore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

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


async def nothing(*_args: Any) -> None:
    """Have nothing to say against it."""


def test_what_is_done_for_a_disk_ends_when_another_one_fails() -> None:
    done: list[str] = []

    async def long() -> None:
        done.append("begun")
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            done.append("cleaned up")

    async def fail() -> None:
        raise OSError("no space")

    async def restore_disks() -> None:
        agreement = Agreement(nothing, DISKS)
        await agreement.unless_failed(nothing)
        with pytest.raises(OSError, match="no space"):
            await agreement.unless_failed(fail)
        asyncio.get_running_loop().call_later(0.01, agreement.leave, "/b")
        with pytest.raises(Ended):
            await agreement.unless_failed(long)
        assert done == ["begun", "cleaned up"]
        # What has not begun does not begin.
        with pytest.raises(Ended):
            await agreement.unless_failed(long)
        assert done == ["begun", "cleaned up"]
        await agreement.end()

    asyncio.run(asyncio.wait_for(restore_disks(), 60))


def test_copies_of_a_domain_end_with_the_first_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = [disk_restore(tmp_path / name, name=name) for name in ("vda", "vdb", "vdc", "vdd")]
    (tmp_path / "vdd").touch()
    copying: list[str] = []

    @asynccontextmanager
    async def reading(run: restore.RestoreRun, disk: Any) -> AsyncIterator[None]:
        run.settled[disk.target].set_result(True)
        yield

    async def copy(_run: Any, disk: Any, *_place: Any) -> None:
        copying.append(disk.name)
        if disk.name == "vdb":
            while len(copying) < len(disks):
                await asyncio.sleep(0.01)
            raise OSError("no space")
        if disk.name != "vdc":
            await asyncio.sleep(3600)

    async def check(*_args: Any) -> None:
        await asyncio.sleep(3600)

    for name, instead in (("_reading", reading), ("_copy", copy), ("_check", check)):
        monkeypatch.setattr(restore, name, instead)
    monkeypatch.setattr(restore, "check_device", lambda *_args: None)
    monkeypatch.setattr(target_files, "is_block_device", lambda path: path == disks[3].target)
    run = restore._restore_all(None, "web01", disks, RestoreOptions(), [], nothing, None)  # type: ignore[arg-type]
    with pytest.raises(BackupError) as caught:
        asyncio.run(asyncio.wait_for(run, 60))
    files = ", ".join(f"disk {disk.name} to {disk.target}" for disk in (disks[0], disks[2]))
    assert str(caught.value) == (
        f"VM web01: {files}: it was not put in its place, because another disk of the domain was not restored; disk vdb"
        f" to {disks[1].target}: no space; disk vdd to {disks[3].target}: its copy was ended, because another disk of"
        " the domain was not restored; do not use its content"
    )
    # What was written to a device stays.
    assert [path.name for path in tmp_path.iterdir()] == ["vdd"]
