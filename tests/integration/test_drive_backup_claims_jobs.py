# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: whose job it is: jobs of one id are not taken for each other."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    release,
    sent,
    start_foreign,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.claims import cancel_from_outside
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

NIGHTLY = "nightly"


@pytest.fixture
def days(vm: Qemu, target: Path) -> tuple[Path, Path]:
    """Two targets whose jobs are called the same; that of the first was cancelled and dismissed by somebody else."""
    monday, tuesday = target.with_name("mon.qcow2"), target.with_name("tue.qcow2")
    start_slowly(vm, monday, job_id=NIGHTLY)
    cancel_from_outside(vm, NIGHTLY)
    vm.qmp.execute("job-dismiss", id=NIGHTLY)
    start_slowly(vm, tuesday, job_id=NIGHTLY)
    return monday, tuesday


def test_running_job_of_the_same_id_is_another_targets(vm: Qemu, directory: Path, days: tuple[Path, Path]) -> None:
    monday, tuesday = days
    # Nothing has been written since the job began.
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    for state in ("completed", "started", "completed"):
        result = fail_backup(vm, monday, state=state, job_id=NIGHTLY)
        assert "busy" in result["msg"]
        assert NIGHTLY in result["msg"]
        assert (vm.job["status"], vm.job["speed"]) == ("running", SLOW)
        assert_absent(monday)
    backup(vm, monday, state="cancelled", job_id=NIGHTLY)
    assert vm.job["status"] == "running"
    release(vm)
    result = backup(vm, tuesday, job_id=NIGHTLY)
    assert not sent(result, "drive-backup")
    assert_good(tuesday, copy)
    backup(vm, monday, job_id=NIGHTLY)
    assert_good(monday, copy)


def test_cancelled_does_not_cancel_another_targets_job(vm: Qemu, directory: Path, days: tuple[Path, Path]) -> None:
    monday, tuesday = days
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, monday, state="cancelled", job_id=NIGHTLY)
    assert_absent(monday)
    assert vm.job["status"] == "running"
    release(vm)
    assert not sent(backup(vm, tuesday, job_id=NIGHTLY), "drive-backup")
    assert_good(tuesday, copy)


def test_ended_job_of_the_same_id_is_another_targets(vm: Qemu, directory: Path, days: tuple[Path, Path]) -> None:
    monday, tuesday = days
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    release(vm)
    wait_concluded(vm)
    result = fail_backup(vm, monday, job_id=NIGHTLY)
    assert NIGHTLY in result["msg"]
    assert_absent(monday)
    assert vm.job["device"] == NIGHTLY
    assert not sent(backup(vm, tuesday, job_id=NIGHTLY), "drive-backup")
    assert_good(tuesday, copy)


def test_finished_backup_does_not_dismiss_another_targets_job(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    tuesday = target.with_name("tue.qcow2")
    backup(vm, target, job_id=NIGHTLY)
    backup(vm, tuesday, state="started", job_id=NIGHTLY)
    wait_concluded(vm)
    for state in ("completed", "started", "cancelled"):
        assert backup(vm, target, state=state, job_id=NIGHTLY)["changed"] is False
        assert (vm.job["device"], vm.job["status"]) == (NIGHTLY, "concluded")
    result = backup(vm, tuesday, job_id=NIGHTLY)
    assert not sent(result, "drive-backup")
    assert_good(tuesday, copy)


def test_ended_foreign_job_is_not_a_bare_block_devices(
    vm: Qemu, storage: Storage, directory: Path, target: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "job_id": NIGHTLY}
    start_foreign(vm, create(target), NIGHTLY, auto_dismiss=False)
    wait_concluded(vm)
    for state in ("completed", "started"):
        result = fail_backup(vm, device, state=state, **options)
        assert result["msg"].startswith("job_id: ")
        assert [job["state"] for job in result["jobs"]] == []
    assert [job["state"] for job in backup(vm, device, state="cancelled", **options)["jobs"]] == ["absent"]
    assert not identical(copy, device, other_format="raw")
    vm.qmp.execute("job-dismiss", id=NIGHTLY)
    result = backup(vm, device, **options)
    assert sent(result, "drive-backup")
    assert identical(copy, device, other_format="raw")


def test_running_job_of_another_target_is_not_a_bare_block_devices(
    vm: Qemu, storage: Storage, directory: Path, target: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "job_id": NIGHTLY}
    start_slowly(vm, target, job_id=NIGHTLY)
    assert "busy" in fail_backup(vm, device, **options)["msg"]
    backup(vm, device, state="cancelled", **options)
    assert vm.job["status"] == "running"
    release(vm)
    assert not sent(backup(vm, target, job_id=NIGHTLY), "drive-backup")
    assert_good(target, copy)


def test_bare_block_devices_own_job_is_followed(vm: Qemu, storage: Storage, directory: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "job_id": NIGHTLY}
    start_slowly(vm, device, **options)
    release(vm)
    result = backup(vm, device, **options)
    assert not sent(result, "drive-backup")
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert identical(copy, device, other_format="raw")


def test_speed_zero_leaves_a_running_jobs_limit_alone(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    result = backup(vm, target, state="started")
    assert result["changed"] is False
    assert vm.job["speed"] == SLOW
    result = backup(vm, target, state="started", speed=2 * SLOW)
    assert result["changed"] is True
    assert vm.job["speed"] == 2 * SLOW
    assert result["jobs"][0]["id"] == vm.job["device"]
    release(vm)
    backup(vm, target)
