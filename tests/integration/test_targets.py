# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""New images, and the space they get, with the real qemu-img and under a job of a real QEMU."""

from __future__ import annotations

import asyncio
import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import target_image
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.harness.backup import (
    assert_good,
    backup,
    partial,
    release,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, info, sound

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

TIB = 1 << 40


@pytest.mark.parametrize(
    ("size", "options", "backing"),
    [
        (64 * MIB, {}, None),
        (64 * MIB + 512, {"compress": True}, None),
        (64 * MIB, {"compress": True, "compression_type": "zlib"}, None),
        (16 * TIB, {}, None),
        (64 * MIB, {}, ("../2026-11-22/drive0.qcow2", "qcow2")),
    ],
    ids=["plain", "zstd", "zlib", "huge", "increment"],
)
def test_copy_of_a_new_image_is_like_one_from_qemu_img(
    size: int, options: dict[str, t.Any], backing: tuple[str, str] | None, directory: Path
) -> None:
    made: dict[tuple[str, ...], target_image.Blank] = {}
    first, second = directory / "first.qcow2", directory / "second.qcow2"
    for path in (first, second):
        os.close(asyncio.run(target_image.create(Target(str(path), "qcow2", size, **options), backing, made=made)))
    assert len(made) == 1
    assert first.read_bytes() == second.read_bytes()
    told = [info(path) for path in (first, second)]
    for entry in told:
        assert entry.pop("filename")
        entry.pop("full-backing-filename", None)
        entry.pop("actual-size")
        # Since QEMU 10.0: the layer below, with its own name and sizes.
        entry.pop("children", None)
    assert told[0] == told[1]
    assert told[0]["virtual-size"] == size
    if backing is None:
        assert sound(second)


def test_copy_of_a_new_image_takes_a_backup(vm: Qemu, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = directory / "x.qcow2"
    made: dict[tuple[str, ...], target_image.Blank] = {}
    os.close(asyncio.run(target_image.create(Target(str(directory / "first.qcow2"), "qcow2", 64 * MIB), made=made)))
    monkeypatch.setenv("PATH", "")
    os.close(asyncio.run(target_image.create(Target(str(target), "qcow2", 64 * MIB), made=made)))
    monkeypatch.undo()
    backup(vm, target, mode="existing", overwrite=True)
    assert vm.disks[0].path
    assert_good(target, vm.freeze(vm.disks[0], directory / "frozen.qcow2"))


def test_space_is_reserved_under_a_running_job(vm: Qemu, target: Path, directory: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    assert preallocate.top_up(str(partial(target)), 256 * MIB)
    status = partial(target).stat()
    assert status.st_blocks * 512 >= 256 * MIB
    assert status.st_size < 256 * MIB
    release(vm)
    assert "error" not in wait_concluded(vm)
    backup(vm, target)
    assert_good(target, copy)
    assert target.stat().st_blocks * 512 < 64 * MIB
