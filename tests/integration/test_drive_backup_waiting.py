# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: waits that end early: time-outs, held monitors, jobs on hold, frozen and full file systems."""

from __future__ import annotations

import contextlib
import os
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    rebase,
    receipt,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Qmp, wait_until

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

INCREMENTAL = {"sync": "incremental", "bitmap": "b0"}

# Seconds for which the module waits for a held monitor: a timeout of as many has passed when it has found one held.
LONG_ENOUGH = 10


@contextlib.contextmanager
def _frozen(path: Path) -> t.Iterator[None]:
    subprocess.run(["fsfreeze", "--freeze", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", path], check=True)


def _follow(vm: Qemu, start: t.Callable[..., ModuleProcess], target: Path, **options: t.Any) -> ModuleProcess:
    """Follow the job that runs; returns when the call has taken it up, which the job's new limit tells."""
    limit = SLOW // 2
    following = start("drive_backup", arguments(vm, target, speed=limit, **options))
    wait_until(lambda: not following.running or vm.job["speed"] == limit, "the new limit")
    assert following.running, following.result()
    return following


def _sockets(process: ModuleProcess) -> set[str]:
    """The sockets that a process has open."""
    found = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        # The process goes on meanwhile, and may end.
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(link))
    return {name for name in found if name.startswith("socket:")}


# Time-outs


def test_frozen_target_does_not_keep_the_job(
    vm: Qemu, storage: Storage, start_module: t.Callable[..., ModuleProcess]
) -> None:
    mount = storage.mount("ext4", 128 * MIB)
    # Neither a write under way nor a table to be written at the end: QEMU itself has nothing to wait for.
    target = mount.path / "disk.raw"
    start_slowly(vm, target, format="raw")
    vm.qmp.execute("job-pause", id=vm.job["device"])
    wait_until(lambda: vm.job["status"] == "paused" and not vm.job["busy"], "the pause")
    with _frozen(mount.path):
        following = start_module("drive_backup", arguments(vm, target, format="raw", timeout=2))
        wait_until(
            lambda: not vm.block_jobs or vm.job["status"] == "concluded",
            "the end of the job, whatever the module does",
        )
        # The guest's writes are its own again.
        vm.write("drive0", 0x11, 57 * MIB, 65536)
    result = following.result()
    assert result["failed"] is True
    assert "timeout" in result["msg"]
    assert not vm.block_jobs
    assert_absent(target)


@pytest.mark.slow
def test_frozen_target_under_a_write_is_told_and_cleaned_up_later(
    vm: Qemu, storage: Storage, start_module: t.Callable[..., ModuleProcess]
) -> None:
    mount = storage.mount("ext4", 128 * MIB)
    target = mount.path / "disk.raw"
    start_slowly(vm, target, format="raw")
    with _frozen(mount.path):
        release(vm)
        following = start_module("drive_backup", arguments(vm, target, format="raw", timeout=2))
        wait_until(lambda: not following.running, "the end of the call, whatever the job does")
        result = following.result()
        assert result["failed"] is True
        assert sent(result, "block-job-cancel")
        assert "target hangs" in result["msg"]
        assert vm.job["device"] in result["msg"]
    # It was told to end, and does.
    assert "canceled" in wait_concluded(vm)["error"]
    backup(vm, target, format="raw", state="cancelled")
    assert_absent(target)


@pytest.mark.slow
def test_increment_that_ends_as_the_time_is_up_is_finished(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    full = target.with_name("full.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    backup(vm, full)
    vm.write("drive0", 0x51, 16 * MIB, 16 * MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target, **INCREMENTAL)
    following = _follow(vm, start_module, target, timeout=LONG_ENOUGH, **INCREMENTAL)
    # While it cannot look, the job ends and its time is up: it goes on to cancel what it believes to run.
    holder = Qmp(vm.monitor)
    try:
        release(vm)
        wait_concluded(vm)
        assert vm.bitmaps("n0")["b0"]["count"] == 0
        own = _sockets(following)
        wait_until(lambda: not following.running or _sockets(following) - own, "the next try to reach the monitor")
    finally:
        holder.close()
    result = following.result()
    assert result["rc"] == 0, result["msg"]
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert receipt(target).exists()
    assert backup(vm, target, **INCREMENTAL)["changed"] is False
    rebase(target, full)
    assert identical(copy, target)


def test_image_that_had_ended_is_finished_when_the_others_time_is_up(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    first, second = target.with_name("first.qcow2"), target.with_name("second.qcow2")
    backup(vm, first, state="started")
    ended = wait_concluded(vm)["device"]
    backup(vm, second, device="drive1", state="started", speed=SLOW)
    drives = [{"device": "drive0", "target": str(first)}, {"device": "drive1", "target": str(second)}]
    result = fail_backup(vm, drives=drives, completion_mode="individual", timeout=1)
    assert result["msg"].startswith("timeout: ")
    assert {job["device"]: job["state"] for job in result["jobs"]} == {"drive0": "completed", "drive1": "cancelled"}
    assert ended not in [job["device"] for job in vm.block_jobs]
    assert receipt(first).exists()
    assert_good(first, copy)
    assert not vm.block_jobs
    assert_absent(second)


# Stalls


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    first(1, [{"stall_timeout": 2}, {"timeout": LONG_ENOUGH}, {"timeout": LONG_ENOUGH, "on_timeout": "leave"}]),
    ids=["stall", "timeout", "leave"],
)
def test_held_monitor_does_not_get_the_job_cancelled(
    vm: Qemu,
    directory: Path,
    target: Path,
    start_module: t.Callable[..., ModuleProcess],
    options: dict[str, t.Any],
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    job = vm.job["device"]
    following = _follow(vm, start_module, target, **options)
    holder = Qmp(vm.monitor)
    try:
        result = following.result()
    finally:
        holder.close()
    assert result["failed"] is True
    assert ("continues" if "on_timeout" in options else "left") in result["msg"]
    assert str(vm.monitor) in result["msg"]
    assert not sent(result, "block-job-cancel")
    assert [(entry["id"], entry["target"], entry["state"]) for entry in result["jobs"]] == [
        (job, str(target), "running")
    ]
    assert (vm.job["device"], vm.job["status"]) == (job, "running")
    release(vm)
    assert not sent(backup(vm, target), "drive-backup")
    assert_good(target, copy)


def test_job_paused_by_hand_is_left_and_goes_on(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    job = {"monitor": f"unix:{vm.monitor}", "job_id": vm.job["device"]}
    succeed("block_job", {**job, "state": "paused"})
    wait_until(lambda: vm.job["status"] == "paused", "the pause")
    result = fail_backup(vm, target, stall_timeout=0, timeout=1, on_timeout="leave")
    assert result["msg"].startswith("timeout: ")
    assert [entry["id"] for entry in result["jobs"]] == [job["job_id"]]
    assert vm.job["status"] == "paused"
    succeed("block_job", {**job, "state": "running"})
    release(vm)
    assert not sent(backup(vm, target), "drive-backup")
    assert_good(target, copy)


def test_job_that_does_not_move_stalls(vm: Qemu, target: Path) -> None:
    # After its first piece it waits for as long as that is ahead of its limit.
    backup(vm, target, state="started", speed=1024)
    result = fail_backup(vm, target, stall_timeout=1)
    assert result["msg"].startswith("stall_timeout: ")
    assert [job["state"] for job in result["jobs"]] == ["cancelled"]
    assert not vm.block_jobs
    assert_absent(target)


# Full file systems


def test_fine_bitmap_reserves_whole_clusters(vm: Qemu, storage: Storage, directory: Path) -> None:
    mount = storage.mount("ext4", 128 * MIB)
    target = mount.path / "disk.qcow2"
    full = directory / "full.qcow2"
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", granularity=512)
    backup(vm, full)
    for cluster in range(512):
        vm.write("drive0", 0x05, cluster * 65536, 512)
    assert vm.bitmaps("n0")["b0"]["count"] == 512 * 512
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, state="started", speed=16384, **INCREMENTAL)
    mount.fill()
    # Whole clusters before the job comes to them: each old one must find its room at the target first.
    for cluster in range(511, 255, -1):
        vm.write("drive0", 0x06, cluster * 65536, 65536)
    assert vm.job["status"] == "running"
    release(vm)
    assert [job["state"] for job in backup(vm, target, **INCREMENTAL)["jobs"]] == ["completed"]
    rebase(target, full)
    assert identical(copy, target)
