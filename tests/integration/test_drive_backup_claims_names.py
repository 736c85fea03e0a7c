# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: whose name it is: a file that appears, goes or is exchanged in mid-job."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    partial,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

STRANGE = "somebody else's"


def test_file_that_appears_in_mid_job_is_not_replaced(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    target.write_text(STRANGE)
    release(vm)
    for overwrite in (False, True):
        result = fail_backup(vm, target, overwrite=overwrite)
        assert str(target) in result["msg"]
        assert "appeared" in result["msg"]
        assert [job["state"] for job in result["jobs"]] == ["failed"]
        assert target.read_text() == STRANGE
    target.rename(target.with_name("moved"))
    result = backup(vm, target)
    assert not sent(result, "drive-backup")
    assert_good(target, copy)


def test_file_that_takes_an_earlier_ones_place_in_mid_job_is_not_replaced(
    vm: Qemu, directory: Path, target: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target.write_text("an earlier one, that may go")
    start_slowly(vm, target, overwrite=True)
    newer = target.with_name("newer")
    newer.write_text(STRANGE)
    newer.replace(target)
    release(vm)
    for _attempt in range(2):
        result = fail_backup(vm, target, overwrite=True)
        assert "appeared" in result["msg"]
        assert target.read_text() == STRANGE
    target.rename(newer)
    result = backup(vm, target, overwrite=True)
    assert not sent(result, "drive-backup")
    assert_good(target, copy)


def test_file_that_is_made_where_an_earlier_one_was_removed_is_not_replaced(
    vm: Qemu, storage: Storage, directory: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target = storage.mount("ext4", 128 * MIB).path / "disk.qcow2"
    target.write_text("an earlier one, that may go")
    earlier = target.stat().st_ino
    start_slowly(vm, target, overwrite=True)
    target.unlink()
    target.write_text(STRANGE)
    # ext4 gives a new file the inode that was freed last: by its number it is the earlier one.
    assert target.stat().st_ino == earlier
    release(vm)
    assert "appeared" in fail_backup(vm, target, overwrite=True)["msg"]
    assert target.read_text() == STRANGE
    target.rename(target.with_name("moved"))
    assert not sent(backup(vm, target, overwrite=True), "drive-backup")
    assert_good(target, copy)


def test_earlier_file_removed_in_mid_job(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target.write_text("an earlier one, that may go")
    start_slowly(vm, target, overwrite=True)
    target.unlink()
    release(vm)
    assert not sent(backup(vm, target, overwrite=True), "drive-backup")
    assert_good(target, copy)


def test_growing_image_exchanged_in_mid_job_is_not_published(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    partial(target).rename(target.with_name("grown"))
    create(partial(target))
    release(vm)
    wait_concluded(vm)
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert any(str(partial(target)) in warning for warning in result["warnings"])
    assert_good(target, copy)


def test_growing_image_exchanged_after_the_end_is_not_published(vm: Qemu, storage: Storage, directory: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target = storage.mount("ext4", 128 * MIB).path / "disk.qcow2"
    backup(vm, target, state="started")
    wait_concluded(vm)
    ended = partial(target).stat().st_ino
    partial(target).unlink()
    create(partial(target))
    assert partial(target).stat().st_ino == ended
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert_good(target, copy)


def test_growing_image_exchanged_while_followed_is_a_failure(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    following = start_module("drive_backup", arguments(vm, target))
    wait_until(lambda: not following.running or vm.job["offset"] > 2 * MIB, "some progress")
    partial(target).rename(target.with_name("grown"))
    create(partial(target))
    release(vm)
    result = following.result()
    assert result["failed"] is True
    assert str(partial(target)) in result["msg"]
    assert_absent(target)
    backup(vm, target)
    assert_good(target, copy)


@pytest.mark.parametrize("moment", ["unwatched", "followed"])
def test_growing_image_removed_by_hand(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], moment: str
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    if moment == "followed":
        following = start_module("drive_backup", arguments(vm, target))
        wait_until(lambda: not following.running or vm.job["offset"] > 2 * MIB, "some progress")
        partial(target).unlink()
        release(vm)
        assert str(partial(target)) in following.result()["msg"]
        assert_absent(target)
        return
    release(vm)
    wait_concluded(vm)
    partial(target).unlink()
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert any(str(target) in warning for warning in result["warnings"])
    assert_good(target, copy)


@pytest.mark.parametrize("killed", ["following", "waiting for nobody"])
def test_existing_target_after_module_and_qemu_were_killed(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], killed: str
) -> None:
    create(target)
    if killed == "following":
        process = start_module("drive_backup", arguments(vm, target, mode="existing", speed=SLOW))
        wait_until(lambda: not process.running or (vm.block_jobs and vm.job["offset"] > 2 * MIB), "some progress")
        process.kill()
    else:
        start_slowly(vm, target, mode="existing")
        wait_until(lambda: vm.job["offset"] > 2 * MIB, "some progress")
    vm.kill()
    vm.restart()
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target, mode="existing")
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert_good(target, copy)
    assert backup(vm, target, mode="existing")["changed"] is False
