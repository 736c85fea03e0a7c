# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: target file systems that are full, or become so; the guest's writes come first."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    arguments,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    partial,
    release,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, patterned
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize("options", [{}, {"format": "raw"}, {"compress": True}], ids=["qcow2", "raw", "compressed"])
@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_filled_by_somebody_else_in_mid_job(
    vm: Qemu, storage: Storage, directory: Path, kind: str, options: dict[str, t.Any]
) -> None:
    mount = storage.mount(kind, 160 * MIB)
    target = mount.path / "disk"
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target, **options)
    mount.fill()
    assert mount.free < 65536
    # Into what the job has yet to copy: the old data must find room on the full file system first.
    for number in range(8):
        vm.write("drive0", 0xC0 + number, (56 - number * 8) * MIB, MIB)
        vm.write("drive0", 0xC0 + number, (60 - number * 8) * MIB + 65536, 3 * MIB)
    release(vm)
    assert backup(vm, target, **options)["jobs"][0]["state"] == "completed"
    assert_good(target, copy, options.get("format", "qcow2"))
    assert vm.status == "running"


def test_reserved_space_is_given_back(vm: Qemu, storage: Storage) -> None:
    mount = storage.mount("ext4", 160 * MIB)
    target = mount.path / "disk"
    start_slowly(vm, target)
    growing = partial(target).stat()
    assert growing.st_blocks * 512 > 32 * MIB
    assert vm.job["offset"] < 8 * MIB
    release(vm)
    backup(vm, target)
    finished = target.stat()
    assert finished.st_blocks * 512 <= finished.st_size + 65536


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "ext2"])
def test_case_18_too_small_from_the_start(vm: Qemu, storage: Storage, kind: str) -> None:
    mount = storage.mount(kind, 24 * MIB)
    target = mount.path / "disk.qcow2"
    result = fail_backup(vm, target)
    assert "No space left on device" in result["msg"]
    assert "target" in result["msg"]
    assert not vm.block_jobs
    assert_absent(target)
    assert vm.status == "running"
    vm.write("drive0", 0x11, 57 * MIB, 65536)


def test_full_to_the_last_block(vm: Qemu, storage: Storage) -> None:
    mount = storage.mount("ext4", 96 * MIB)
    mount.fill()
    result = fail_backup(vm, mount.path / "disk.qcow2")
    assert "No space left on device" in result["msg"]
    assert_absent(mount.path / "disk.qcow2")


def test_case_20_space_freed_and_called_again(vm: Qemu, storage: Storage, directory: Path) -> None:
    mount = storage.mount("ext4", 96 * MIB)
    target = mount.path / "disk.qcow2"
    mount.fill(leave=16 * MIB)
    fail_backup(vm, target)
    mount.clear()
    vm.write("drive0", 0x12, 0, MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    assert backup(vm, target)["changed"] is True
    assert_good(target, copy)


def _start_and_fill(vm: Qemu, mount: FileSystem, **options: t.Any) -> Path:
    """A backup on a file system that cannot reserve, and that is full before the job is half through."""
    target = mount.path / "disk.qcow2"
    started = start_slowly(vm, target, **options)
    assert any("reserve" in warning for warning in started["warnings"])
    mount.fill()
    return target


def test_unreservable_and_filled_in_mid_job(vm: Qemu, storage: Storage) -> None:
    target = _start_and_fill(vm, storage.mount("ext2", 96 * MIB))
    # What a guest sees of that: its write of something that cannot be saved any more fails.
    assert "No space left on device" in vm.io("drive0", "write -P 0x11 57M 64k")
    release(vm)
    result = fail_backup(vm, target)
    assert "No space left on device" in result["msg"]
    assert [job["state"] for job in result["jobs"]] == ["failed"]
    assert "No space left on device" in result["jobs"][0]["error"]
    assert not vm.block_jobs
    assert_absent(target)
    assert vm.status == "running"
    # Nothing stands in the guest's way any more.
    vm.write("drive0", 0x11, 57 * MIB, 65536)


def test_case_19_full_while_nobody_watched(vm: Qemu, storage: Storage, directory: Path) -> None:
    mount = storage.mount("ext2", 96 * MIB)
    target = _start_and_fill(vm, mount)
    release(vm)
    wait_concluded(vm)
    result = fail_backup(vm, target)
    assert "No space left on device" in result["msg"]
    assert [job["state"] for job in result["jobs"]] == ["failed"]
    assert not vm.block_jobs
    assert_absent(target)
    mount.clear()
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    assert backup(vm, target)["changed"] is True
    assert_good(target, copy)


@pytest.mark.parametrize("policy", ["stop", "enospc"])
def test_paused_for_lack_of_space_and_let_go_on(vm: Qemu, storage: Storage, directory: Path, policy: str) -> None:
    mount = storage.mount("ext2", 96 * MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target = _start_and_fill(vm, mount, on_target_error=policy)
    release(vm)
    wait_until(lambda: vm.job["paused"] and vm.job["io-status"] == "nospace", "the pause")
    result = fail_backup(vm, target, on_target_error=policy)
    job = vm.job
    assert job["paused"] is True
    assert [entry["state"] for entry in result["jobs"]] == ["paused"]
    assert job["device"] in result["msg"]
    for words in ("No space left on device", "block_job", "running"):
        assert words in result["msg"]
    assert partial(target).exists()
    mount.clear()
    resumed = succeed("block_job", {"monitor": str(vm.monitor), "job_id": job["device"], "state": "running"})
    assert resumed["changed"] is True
    result = backup(vm, target, on_target_error=policy)
    assert result["jobs"][0]["id"] == job["device"]
    assert_good(target, copy)


def test_pause_is_reported_to_a_call_that_waits(
    vm: Qemu, storage: Storage, start_module: t.Callable[..., ModuleProcess]
) -> None:
    target = _start_and_fill(vm, storage.mount("ext2", 96 * MIB), on_target_error="stop")
    following = start_module("drive_backup", arguments(vm, target, on_target_error="stop"))
    release(vm)
    result = following.result()
    assert result["failed"] is True
    assert [job["state"] for job in result["jobs"]] == ["paused"]
    backup(vm, target, state="cancelled")
    assert_absent(target)


def test_several_drives_and_one_full_target(vms: Vms, storage: Storage, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    mount = storage.mount("tmpfs", 24 * MIB)
    drives = [
        {"device": "drive0", "target": str(target)},
        {"device": "drive1", "target": str(mount.path / "second.qcow2")},
    ]
    result = fail("drive_backup", arguments(vm, drives=drives))
    assert "second.qcow2" in result["msg"]
    assert not list(target.parent.iterdir())
    assert not vm.block_jobs


def test_data_that_never_reached_the_disk(vms: Vms, storage: Storage, directory: Path) -> None:
    """A device that fails when the page cache is written back: fsync tells, and QEMU does not ask (cache=unsafe)."""
    storage.mount("tmpfs", 16 * MIB)
    # A sparse file on a file system that is much smaller: what does not fit there is an I/O error here.
    mount = storage.mount("ext2", 96 * MIB, "mnt/inner")
    # Of a size that rules O_DIRECT out.
    size = 48 * MIB + 512
    source = patterned(directory / "source.raw", "raw", size)
    vm = vms.start(Disk(source, format="raw", cache={"no-flush": "on"}))
    target = mount.path / "disk.raw"
    backup(vm, target, format="raw", state="started")
    assert "error" not in wait_concluded(vm)
    result = fail_backup(vm, target, format="raw")
    # Which of the two the loop device says depends on when it was written back.
    assert "Input/output error" in result["msg"] or "No space left on device" in result["msg"]
    assert [job["state"] for job in result["jobs"]] == ["failed"]
    assert not target.exists()
    assert vm.status == "running"
    backup(vm, target, format="raw", state="cancelled")
