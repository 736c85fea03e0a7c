# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pins of what reads a set: written, kept and removed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import read_annotations
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import DiskRestore, RestoreMethod
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.pins import (
    make_pin,
    pinned,
    put_pin,
    remove_other_pins,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import manifest, put
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import IMAGE, MANIFEST, disk_restore

if TYPE_CHECKING:
    from pathlib import Path


VM = "web01"


@pytest.fixture
def published(repository: Repository) -> Repository:
    """A repository with the set that is restored."""
    image = replace(IMAGE, bytes=3)
    put(repository, replace(MANIFEST, disks=(image,)))
    return repository


def pin_paths(repository: Repository) -> list[str]:
    return [pin.path for pin in read_annotations(repository, VM).pins]


def held_by_another_machine(*_args: Any) -> Any:
    raise BackupError("held")


def test_a_pin_is_new_once(published: Repository, tmp_path: Path) -> None:
    disk = disk_restore(tmp_path / "disk", RestoreMethod.OVERLAY)
    assert asyncio.run(put_pin(published, VM, disk, []))
    assert not asyncio.run(put_pin(published, VM, disk, []))
    assert pin_paths(published) == [disk.target]


def test_a_set_is_read_without_a_pin_where_none_can_be_written(
    published: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Repository, "lock", held_by_another_machine)
    warnings: list[str] = []
    assert not asyncio.run(put_pin(published, VM, disk_restore(tmp_path / "disk"), warnings))
    assert "cannot be written to (held)" in warnings[0]
    assert pin_paths(published) == []


async def read(repository: Repository, disk: DiskRestore, error: Exception | None = None) -> list[str]:
    """Return the pins that there are while a disk is read."""
    async with pinned(repository, VM, disk, []):
        meanwhile = pin_paths(repository)
        if error:
            raise error
    return meanwhile


def test_a_copy_is_pinned_while_it_is_written_and_an_overlay_for_good(published: Repository, tmp_path: Path) -> None:
    copy = disk_restore(tmp_path / "copy")
    assert asyncio.run(read(published, copy)) == [copy.partial]
    assert pin_paths(published) == []
    overlay = disk_restore(tmp_path / "overlay", RestoreMethod.OVERLAY)
    assert asyncio.run(read(published, overlay)) == pin_paths(published) == [overlay.target]


def test_a_restore_that_fails_takes_back_a_pin_of_its_own_only(published: Repository, tmp_path: Path) -> None:
    overlay = disk_restore(tmp_path / "overlay", RestoreMethod.OVERLAY)
    for before in ([], [overlay.target]):
        if before:
            asyncio.run(put_pin(published, VM, overlay, []))
        with pytest.raises(ValueError, match="no space"):
            asyncio.run(read(published, overlay, ValueError("no space")))
        assert pin_paths(published) == before


def test_pins_of_what_stood_at_the_target_before(published: Repository, tmp_path: Path) -> None:
    now = disk_restore(tmp_path / "disk", RestoreMethod.OVERLAY)
    before = replace(now, chain=((manifest("s0"), IMAGE),))
    elsewhere = disk_restore(tmp_path / "other", RestoreMethod.OVERLAY)
    unfinished = replace(now, method=RestoreMethod.COPY)
    pins = [make_pin(disk) for disk in (now, before, elsewhere, unfinished)]
    remote = replace(pins[1], machine_id="another")
    for pin in (*pins, remote):
        write_annotation(published, VM, pin)
    asyncio.run(remove_other_pins(published, VM, now, []))
    left = read_annotations(published, VM).pins
    assert {replace(pin, since="") for pin in left} == {replace(pin, since="") for pin in (pins[0], pins[2], remote)}


def test_a_set_that_is_gone_is_an_error_without_the_lock_as_well(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Repository, "lock", held_by_another_machine)
    warnings: list[str] = []
    with pytest.raises(BackupError, match=r"set s1 was removed meanwhile"):
        asyncio.run(put_pin(repository, VM, disk_restore(tmp_path / "d"), warnings))
    assert warnings == []
