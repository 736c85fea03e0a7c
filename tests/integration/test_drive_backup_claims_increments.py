# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: no increment is lost, whoever dies on its way."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    backup,
    dirty_bytes,
    fail_backup,
    partial,
    rebase,
    receipt,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.claims import (
    cancel_from_outside,
    drives_of,
    kill_when,
    kill_when_copied,
    record_of,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, sound
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

INCREMENTAL = {"sync": "incremental", "bitmap": "b0"}


@pytest.fixture
def full(vm: Qemu, full: Path) -> Path:
    """A full backup, and more writes since than a short job copies."""
    vm.write("drive0", 0x52, 16 * MIB, 16 * MIB)
    return full


def _kill_after_the_start(vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]) -> None:
    def tidy() -> None:
        for path in target.parent.glob(f"{target.name}*"):
            path.unlink()

    kill_when(start_module, arguments(vm, target, speed=SLOW, **INCREMENTAL), lambda: vm.block_jobs, tidy, first=28)


def test_increment_whose_starter_was_killed_is_not_forgotten(
    vm: Qemu, target: Path, full: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    assert full.exists()
    _kill_after_the_start(vm, target, start_module)
    release(vm)
    wait_concluded(vm)
    assert dirty_bytes(vm) == 0
    vm.quit()
    vm.restart()
    vm.write("drive0", 0x54, 40 * MIB, MIB)
    for state in ("completed", "started", "completed", "cancelled"):
        result = fail_backup(vm, target, state=state, **INCREMENTAL)
        assert result["msg"].startswith("bitmap: ")
        assert "b0" in result["msg"]
        assert "full backup" in result["msg"]
        assert not sent(result, "drive-backup")
        assert not target.exists()
        assert dirty_bytes(vm) == MIB
    result = backup(vm, target, overwrite=True, **INCREMENTAL)
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert sound(target)


def test_increment_whose_starter_was_killed_is_finished(
    vm: Qemu, directory: Path, target: Path, full: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    _kill_after_the_start(vm, target, start_module)
    release(vm)
    wait_concluded(vm)
    result = backup(vm, target, **INCREMENTAL)
    assert not sent(result, "drive-backup")
    assert identical(copy, rebase(target, full))


def test_increment_that_has_ended_is_finished_by_cancelled(vm: Qemu, directory: Path, target: Path, full: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target, **INCREMENTAL)
    release(vm)
    wait_concluded(vm)
    assert dirty_bytes(vm) == 0
    result = backup(vm, target, state="cancelled", **INCREMENTAL)
    assert result["changed"] is True
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert receipt(target).exists()
    assert not vm.block_jobs
    assert backup(vm, target, **INCREMENTAL)["changed"] is False
    assert identical(copy, rebase(target, full))


def test_increment_that_was_flushed_is_finished_by_cancelled(
    vm: Qemu, directory: Path, target: Path, full: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, state="started", **INCREMENTAL)
    wait_concluded(vm)
    kill_when_copied(start_module, arguments(vm, target, **INCREMENTAL), record_of(target))
    result = backup(vm, target, state="cancelled", **INCREMENTAL)
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert receipt(target).exists()
    assert identical(copy, rebase(target, full))


@pytest.mark.parametrize("completion_mode", ["grouped", "individual"])
def test_good_increment_is_kept_when_another_drive_fails(
    two: Qemu, directory: Path, target: Path, completion_mode: str
) -> None:
    two.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    full = target.with_name("full.qcow2")
    backup(two, full)
    two.write("drive0", 0x51, 6 * MIB, 3 * MIB)
    copy = two.freeze(two.disks[0], directory / "frozen.qcow2")
    drives = drives_of(two, target.parent)
    drives[0].update(INCREMENTAL)
    drives[1].update(speed=SLOW)
    started = backup(two, drives=drives, completion_mode="individual", state="started")
    good, bad = (job["id"] for job in started["jobs"])
    wait_until(lambda: {j["device"]: j["status"] for j in two.block_jobs}[good] == "concluded", "the increment")
    assert dirty_bytes(two) == 0
    cancel_from_outside(two, bad)
    result = fail_backup(two, drives=drives, completion_mode=completion_mode)
    assert "cancel" in result["msg"].lower()
    assert {job["device"]: job["state"] for job in result["jobs"]} == {"drive0": "completed", "drive1": "cancelled"}
    assert not two.block_jobs
    increment = target.with_name("drive0.qcow2")
    assert receipt(increment).exists()
    assert_absent(target.with_name("drive1.qcow2"))
    assert backup(two, increment, **INCREMENTAL)["changed"] is False
    assert identical(copy, rebase(increment, full))


def test_increment_removed_by_hand_before_it_had_its_name(vm: Qemu, target: Path, full: Path) -> None:
    assert full.exists()
    backup(vm, target, state="started", **INCREMENTAL)
    wait_concluded(vm)
    partial(target).unlink()
    for _attempt in range(2):
        result = fail_backup(vm, target, **INCREMENTAL)
        assert "bitmap b0" in result["msg"]
        assert not target.exists()
    assert backup(vm, target, overwrite=True, **INCREMENTAL)["changed"] is True
