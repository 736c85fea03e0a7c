# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""block_job and block_job_info against real jobs."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    backup,
    sent,
    start_foreign,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, write
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu


def block_job(vm: Qemu, job_id: str = "j", check: bool = False, **options: t.Any) -> dict[str, t.Any]:
    """Run block_job, which has to succeed."""
    return succeed("block_job", {"monitor": f"unix:{vm.monitor}", "job_id": job_id, **options}, check, diff=True)


def fail_block_job(vm: Qemu, job_id: str = "j", **options: t.Any) -> dict[str, t.Any]:
    """Run block_job, which has to fail."""
    return fail("block_job", {"monitor": f"unix:{vm.monitor}", "job_id": job_id, **options})


def info(vm: Qemu, **options: t.Any) -> list[dict[str, t.Any]]:
    """What block_job_info tells."""
    result = succeed("block_job_info", {"monitor": f"unix:{vm.monitor}", **options})
    assert result["changed"] is False
    jobs: list[dict[str, t.Any]] = result["jobs"]
    return jobs


@pytest.fixture
def job(vm: Qemu, directory: Path) -> Qemu:
    """A VM with a slow job `j` of somebody's."""
    start_job(vm, directory)
    return vm


def start_job(vm: Qemu, directory: Path, job_id: str = "j", **options: t.Any) -> None:
    """Start a job behind the collection's back."""
    given = {"speed": SLOW, "auto_dismiss": False, **options}
    target = create(directory / f"{job_id}.qcow2")
    start_foreign(vm, target, job_id, **given)


def test_info_of_no_jobs(vm: Qemu) -> None:
    assert info(vm) == []


def test_info_agrees_with_qemu(job: Qemu) -> None:
    wait_until(lambda: job.job["offset"] > 0, "some progress")
    job.qmp.execute("job-pause", id="j")
    wait_until(lambda: not job.job["busy"], "the pause")
    [told] = info(job)
    seen = job.job
    assert told["id"] == "j"
    assert told["type"] == "backup"
    assert told["status"] == "paused"
    for name in ("offset", "len", "speed", "paused", "busy"):
        assert told[name] == seen[name]
    assert told["io_status"] == "ok"
    assert told["error"] == ""
    assert told["percent"] == pytest.approx(100 * seen["offset"] / seen["len"], abs=0.1)


def test_info_tells_of_ended_jobs(job: Qemu) -> None:
    job.qmp.execute("block-job-cancel", device="j", force=True)
    wait_concluded(job)
    [told] = info(job)
    assert told["status"] == "concluded"
    assert told["error"] == "Operation canceled"


def test_info_filters(vms: Vms, directory: Path) -> None:
    base = create(directory / "base.qcow2")
    write(base, "write -P 1 0 32M")
    vm = vms.start(vms.disk(0), Disk(create(directory / "top.qcow2", backing=base), id="drive1", node="n1"))
    start_job(vm, directory)
    vm.qmp.execute("block-stream", device="drive1", job_id="s", speed=SLOW)
    assert {entry["id"] for entry in info(vm)} == {"j", "s"}
    assert [entry["id"] for entry in info(vm, type="backup")] == ["j"]
    assert [entry["id"] for entry in info(vm, type="stream")] == ["s"]
    assert [entry["id"] for entry in info(vm, job_id="s")] == ["s"]
    assert info(vm, job_id="nosuch") == []
    assert info(vm, job_id="s", type="backup") == []
    assert info(vm, type="mirror") == []


def test_pause_and_resume(job: Qemu) -> None:
    result = block_job(job, state="paused")
    assert result["changed"] is True
    assert sent(result, "job-pause") == [{"id": "j"}]
    assert result["job"]["paused"] is True
    assert job.job["paused"] is True
    assert block_job(job, state="paused")["changed"] is False
    result = block_job(job, state="running")
    assert result["changed"] is True
    assert job.job["paused"] is False
    assert block_job(job, state="running")["changed"] is False


def test_cancel(job: Qemu) -> None:
    result = block_job(job, state="cancelled")
    assert result["changed"] is True
    assert job.job["status"] == "concluded"
    assert result["job"]["error"] == "Operation canceled"
    assert block_job(job, state="cancelled")["changed"] is False


def test_cancel_of_a_paused_job(job: Qemu) -> None:
    job.qmp.execute("job-pause", id="j")
    assert block_job(job, state="cancelled")["changed"] is True
    assert job.job["status"] == "concluded"


def test_cancel_of_a_job_that_is_gone(vm: Qemu) -> None:
    result = block_job(vm, state="cancelled")
    assert result["changed"] is False
    assert result["job"] == {}


def test_dismiss(job: Qemu) -> None:
    job.qmp.execute("block-job-cancel", device="j", force=True)
    wait_concluded(job)
    assert block_job(job, state="dismissed")["changed"] is True
    assert not job.block_jobs
    assert block_job(job, state="dismissed")["changed"] is False


def test_dismiss_of_a_running_job_is_refused(job: Qemu) -> None:
    result = fail_block_job(job, state="dismissed")
    assert "j" in result["msg"]
    assert job.job["status"] == "running"


def test_finalize(vm: Qemu, directory: Path) -> None:
    start_job(vm, directory, speed=0, auto_finalize=False)
    wait_until(lambda: vm.job["status"] == "pending", "the end of the copy")
    assert block_job(vm, state="finalized")["changed"] is True
    assert vm.job["status"] == "concluded"
    assert block_job(vm, state="finalized")["changed"] is False


def test_finalize_of_a_running_job_is_refused(job: Qemu) -> None:
    fail_block_job(job, state="finalized")
    assert job.job["status"] == "running"


@pytest.mark.parametrize(("given", "bytes_per_second"), [("2M", 2 * MIB), (3 * MIB, 3 * MIB), ("0", 0)])
def test_speed(job: Qemu, given: object, bytes_per_second: int) -> None:
    job.qmp.execute("job-pause", id="j")
    result = block_job(job, speed=given)
    assert result["changed"] is True
    assert result["job"]["speed"] == bytes_per_second
    assert job.job["speed"] == bytes_per_second
    assert block_job(job, speed=given)["changed"] is False


def test_speed_and_state_together(job: Qemu) -> None:
    job.qmp.execute("job-pause", id="j")
    result = block_job(job, state="running", speed="4M")
    assert result["changed"] is True
    assert job.job["speed"] == 4 * MIB
    assert job.job["paused"] is False


@pytest.mark.parametrize(
    "options", [{"state": "paused"}, {"state": "cancelled"}, {"speed": "8M"}], ids=["paused", "cancelled", "speed"]
)
def test_case_4_check_mode_changes_nothing(job: Qemu, options: dict[str, str]) -> None:
    result = block_job(job, check=True, **options)
    assert result["changed"] is True
    assert result["diff"]["before"] != result["diff"]["after"]
    assert not result["qmp"]
    seen = job.job
    assert seen["status"] == "running"
    assert seen["speed"] == SLOW


def test_no_difference_where_nothing_changes(job: Qemu) -> None:
    result = block_job(job, state="running")
    assert result["diff"]["before"] == result["diff"]["after"]


@pytest.mark.parametrize("options", [{"state": "paused"}, {"state": "running"}, {"speed": "1M"}])
def test_unknown_job_is_told_the_known_ones(job: Qemu, options: dict[str, str]) -> None:
    result = fail_block_job(job, "nosuch", **options)
    assert "job_id" in result["msg"]
    assert "nosuch" in result["msg"]
    assert ": j" in result["msg"]


@pytest.mark.parametrize("options", [{"state": "paused"}, {"state": "running"}, {"speed": "8M"}])
def test_ended_job_cannot_go_on(job: Qemu, options: dict[str, str]) -> None:
    job.qmp.execute("block-job-cancel", device="j", force=True)
    wait_concluded(job)
    assert "ended" in fail_block_job(job, **options)["msg"]


def test_one_of_state_and_speed_is_needed(job: Qemu) -> None:
    fail_block_job(job)


def test_bad_speed(job: Qemu) -> None:
    assert "speed" in fail_block_job(job, speed="-1")["msg"]
    assert job.job["speed"] == SLOW


def test_paused_by_hand_a_backup_goes_on_when_let(vm: Qemu, target: Path) -> None:
    started = start_slowly(vm, target)
    job_id = started["jobs"][0]["id"]
    block_job(vm, job_id, state="paused")
    assert vm.job["paused"] is True
    block_job(vm, job_id, state="running", speed=0)
    assert backup(vm, target)["jobs"][0]["id"] == job_id


def test_cancelled_by_block_job_a_backup_has_failed(vm: Qemu, target: Path) -> None:
    started = start_slowly(vm, target)
    block_job(vm, started["jobs"][0]["id"], state="cancelled")
    fail("drive_backup", {"monitor": str(vm.monitor), "device": "drive0", "target": str(target)})
    assert not list(target.parent.iterdir())
