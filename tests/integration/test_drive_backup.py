# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: one disk, from check mode to the second call; started, followed, cancelled by different processes."""

from __future__ import annotations

import contextlib
import json
import os
import stat
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
    receipt,
    release,
    sent,
    snapshot,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, info
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import QmpError, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def test_case_1_full_backup_is_the_disk(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target)
    assert result["changed"] is True
    [job] = result["jobs"]
    assert job["state"] == "completed"
    assert job["node"] == "n0"
    assert job["device"] == "drive0"
    assert job["target"] == str(target)
    assert job["offset"] == job["len"] == 64 * MIB
    assert job["percent"] == 100
    assert not job["error"]
    assert_good(target, copy)
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name, receipt(target).name]


def test_image_is_private_and_holds_holes(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    for path in (target, receipt(target)):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert path.stat().st_uid == os.geteuid()
    image = info(target)
    assert image["format"] == "qcow2"
    assert image["virtual-size"] == 64 * MIB
    assert "backing-filename" not in image
    # What was reserved and not needed is given back.
    assert image["actual-size"] < 34 * MIB


def test_written_zeroes_take_no_space(vm: Qemu, directory: Path, target: Path) -> None:
    vm.write("drive0", 0, 0, 16 * MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)
    assert target.stat().st_blocks * 512 < 26 * MIB


def test_receipt_tells_what_the_image_is(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    told = json.loads(receipt(target).read_text())
    assert told["device"] == "drive0"
    assert told["sync"] == "full"
    assert told["virtual_size"] == 64 * MIB
    assert told["size"] == target.stat().st_size
    assert told["inode"] == target.stat().st_ino


def test_case_3_second_call_changes_nothing(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    before = snapshot(target.parent)
    again = backup(vm, target)
    assert again["changed"] is False
    assert not sent(again, "drive-backup")
    assert [job["state"] for job in again["jobs"]] == ["completed"]
    assert snapshot(target.parent) == before


def test_case_3_holds_after_the_vm_was_restarted(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    before = snapshot(target.parent)
    vm.quit()
    vm.restart()
    assert backup(vm, target)["changed"] is False
    assert snapshot(target.parent) == before


def test_started_twice_after_the_end_changes_nothing(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    assert backup(vm, target, state="started")["changed"] is False


@pytest.mark.parametrize("state", ["completed", "started"])
def test_case_4_check_mode_changes_nothing(vm: Qemu, target: Path, state: str) -> None:
    before = snapshot(target.parent)
    result = succeed("drive_backup", arguments(vm, target, state=state), check=True, diff=True)
    assert result["changed"] is True
    assert [job["state"] for job in result["jobs"]] == ["planned"]
    assert not sent(result, "drive-backup")
    assert str(target) in json.dumps(result["diff"])
    assert snapshot(target.parent) == before
    assert not vm.block_jobs
    events = {event["event"] for event in vm.qmp.events}
    assert "JOB_STATUS_CHANGE" not in events


def test_case_4_check_mode_agrees_with_what_follows(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    result = succeed("drive_backup", arguments(vm, target), check=True, diff=True)
    assert result["changed"] is False


def test_check_mode_leaves_a_running_job_alone(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    cancelled = succeed("drive_backup", arguments(vm, target, state="cancelled"), check=True)
    assert cancelled["changed"] is True
    assert vm.job["status"] == "running"
    followed = succeed("drive_backup", arguments(vm, target, speed=SLOW), check=True)
    assert vm.job["status"] == "running"
    assert followed["jobs"][0]["id"] == vm.job["device"]
    backup(vm, target, state="cancelled")


def test_case_5_completed_follows_the_job_that_started_made(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    started = start_slowly(vm, target)
    job = vm.job
    assert started["jobs"][0]["id"] == job["device"]
    assert started["jobs"][0]["state"] == "running"
    assert partial(target).exists()
    assert not target.exists()
    again = backup(vm, target, state="started", speed=SLOW)
    assert again["changed"] is False
    assert vm.job["device"] == job["device"]
    release(vm)
    completed = backup(vm, target, speed=SLOW)
    assert completed["jobs"][0]["id"] == job["device"]
    assert completed["jobs"][0]["state"] == "completed"
    assert not sent(completed, "drive-backup")
    assert_good(target, copy)


def test_image_holds_the_time_of_the_start(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    for number in range(8):
        vm.write("drive0", 0xA0 + number, number * 8 * MIB + 4 * MIB - 65536, 131072)
    release(vm)
    backup(vm, target)
    assert_good(target, copy)


def test_case_6_job_that_ended_unwatched_is_collected(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, state="started")
    wait_concluded(vm)
    assert not target.exists()
    result = backup(vm, target)
    assert result["jobs"][0]["state"] == "completed"
    assert not sent(result, "drive-backup")
    assert_good(target, copy)
    assert backup(vm, target)["changed"] is False


def test_following_is_quiet_for_other_clients(
    vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    start_slowly(vm, target)
    following = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: not following.running or vm.job["offset"] > 2 * MIB, "some progress")
    # The monitor serves one client at a time: it must not be held while the job is waited for.
    assert succeed("vm_info", {"monitors": [str(vm.monitor)]})["vms"][0]["jobs"]
    assert following.running
    release(vm)
    assert following.result()["jobs"][0]["state"] == "completed"


def test_cancelled_stops_and_cleans(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    result = backup(vm, target, state="cancelled")
    assert result["changed"] is True
    assert [job["state"] for job in result["jobs"]] == ["cancelled"]
    assert not vm.block_jobs
    assert_absent(target)
    assert backup(vm, target, state="cancelled")["changed"] is False
    assert backup(vm, target)["changed"] is True


def test_cancelled_leaves_a_finished_backup_alone(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    before = snapshot(target.parent)
    assert backup(vm, target, state="cancelled")["changed"] is False
    assert snapshot(target.parent) == before


def test_cancelled_takes_an_uncollected_job_away(vm: Qemu, target: Path) -> None:
    backup(vm, target, state="started")
    wait_concluded(vm)
    backup(vm, target, state="cancelled")
    assert not vm.block_jobs
    assert not partial(target).exists()


def test_other_speed_is_set_on_the_job_that_runs(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    assert vm.job["speed"] == SLOW
    result = backup(vm, target, state="started", speed=2 * SLOW)
    assert result["changed"] is True
    assert vm.job["speed"] == 2 * SLOW
    # A call that asks for no limit leaves the one that is there.
    assert backup(vm, target, state="started")["changed"] is False
    assert vm.job["speed"] == 2 * SLOW
    release(vm)
    assert backup(vm, target)["jobs"][0]["state"] == "completed"


def test_case_25_timeout_cancels(vm: Qemu, target: Path) -> None:
    result = fail_backup(vm, target, speed=SLOW, timeout=1)
    assert "timeout" in result["msg"]
    [job] = result["jobs"]
    assert job["state"] == "cancelled"
    assert 0 < job["offset"] < job["len"]
    assert not vm.block_jobs
    assert_absent(target)
    assert vm.status == "running"


def test_case_25_timeout_leaves_the_job_if_told(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = fail_backup(vm, target, speed=SLOW, timeout=1, on_timeout="leave")
    assert "timeout" in result["msg"]
    [job] = result["jobs"]
    assert job["state"] == "running"
    assert vm.job["device"] == job["id"]
    assert partial(target).exists()
    release(vm)
    assert backup(vm, target)["jobs"][0]["id"] == job["id"]
    assert_good(target, copy)


def test_stall_is_found(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    vm.qmp.execute("job-pause", id=vm.job["device"])
    result = fail_backup(vm, target, stall_timeout=1)
    assert "stall_timeout" in result["msg"]
    assert not vm.block_jobs
    assert_absent(target)


def test_case_26_cancel_by_somebody_else_is_a_failure(
    vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    start_slowly(vm, target)
    following = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: not following.running or vm.job["offset"] > MIB, "some progress")
    vm.qmp.execute("block-job-cancel", device=vm.job["device"], force=True)
    result = following.result()
    assert result["failed"] is True
    assert "cancel" in result["msg"].lower()
    assert [job["state"] for job in result["jobs"]] == ["cancelled"]
    assert_absent(target)


def test_case_26_cancel_while_nobody_watched(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    vm.qmp.execute("block-job-cancel", device=vm.job["device"], force=True)
    wait_concluded(vm)
    result = fail_backup(vm, target)
    assert "cancel" in result["msg"].lower()
    assert not vm.block_jobs
    assert_absent(target)
    assert backup(vm, target)["changed"] is True


def test_vanished_job_is_a_failure(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, state="started")
    vm.qmp.execute("job-dismiss", id=wait_concluded(vm)["device"])
    # Nobody knows any more how that job ended. Whatever the call makes of it, its image is not passed off as good.
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert_good(target, copy)


def test_job_that_vanishes_while_followed_is_a_failure(
    vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    start_slowly(vm, target)
    following = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: not following.running or vm.job["offset"] > MIB, "some progress")
    job = vm.job["device"]
    vm.qmp.execute("block-job-cancel", device=job, force=True)
    wait_concluded(vm)
    # The module may be quicker, which is as good.
    with contextlib.suppress(QmpError):
        vm.qmp.execute("job-dismiss", id=job)
    result = following.result()
    assert result["failed"] is True
    assert_absent(target)


def test_overwrite_replaces_when_the_new_one_is_good(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    old_copy, copy = (vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks)
    backup(vm, target)
    old = target.stat().st_ino
    start_slowly(vm, target, device="drive1", overwrite=True)
    assert target.stat().st_ino == old
    assert identical(old_copy, target)
    release(vm)
    backup(vm, target, device="drive1", overwrite=True)
    assert target.stat().st_ino != old
    assert_good(target, copy)
    assert backup(vm, target, device="drive1")["changed"] is False


def test_overwrite_keeps_the_old_one_when_cancelled(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    start_slowly(vm, target, device="drive1", overwrite=True)
    backup(vm, target, device="drive1", overwrite=True, state="cancelled")
    assert_good(target, copy)
    assert backup(vm, target)["changed"] is False


def test_overwrite_of_a_finished_backup_changes_nothing(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    before = snapshot(target.parent)
    assert backup(vm, target, overwrite=True)["changed"] is False
    assert snapshot(target.parent) == before


def test_overwrite_of_a_strange_file(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target.write_text("somebody else's")
    assert backup(vm, target, overwrite=True)["changed"] is True
    assert_good(target, copy)
