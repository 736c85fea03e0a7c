# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: what happens between its looks, and what fails at the very end of a copy."""

from __future__ import annotations

import os
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    backup,
    dirty_bytes,
    fail_backup,
    partial,
    receipt,
    release,
    start_foreign,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


INCREMENTAL = {"sync": "incremental", "bitmap": "b0"}


def test_increment_that_cannot_be_flushed_is_not_hidden(vm: Qemu, storage: Storage, full: Path) -> None:
    """QEMU has cleared the bitmap by then: what cannot be brought to stable storage is a gap."""
    mount = storage.mount("ext4", 96 * MIB)
    target = mount.path / "increment.qcow2"
    options = {**INCREMENTAL, "receipt": str(full.with_name("increment.receipt.json"))}
    backup(vm, target, state="started", **options)
    wait_concluded(vm)
    assert dirty_bytes(vm) == 0
    subprocess.run(["chattr", "+i", partial(target)], check=True)
    assert "stable storage" in fail_backup(vm, target, **options)["msg"]
    subprocess.run(["chattr", "-i", partial(target)], check=True)
    result = fail_backup(vm, target, **options)
    assert result["msg"].startswith("bitmap: ")
    assert "full backup" in result["msg"]
    assert backup(vm, target, overwrite=True, **options)["changed"]


def test_cancelled_copy_that_clears_its_bitmap_always_is_not_hidden(vm: Qemu, target: Path, full: Path) -> None:
    """QEMU takes out of the bitmap what was copied by then, and the image that holds it is removed."""
    assert full.exists()
    vm.write("drive0", 0x53, 16 * MIB, 32 * MIB)
    options = {"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "always"}
    before = dirty_bytes(vm)
    start_slowly(vm, target, **options)
    wait_until(lambda: vm.job["offset"] > MIB, "the copy of something")
    fail_backup(vm, target, timeout=1, **options)
    assert dirty_bytes(vm) < before
    assert not target.exists()
    assert not partial(target).exists()
    for _attempt in range(2):
        result = fail_backup(vm, target, **options)
        assert result["msg"].startswith("bitmap: ")
        assert "full backup" in result["msg"]
    assert backup(vm, target, overwrite=True, **options)["changed"]


def test_old_image_that_a_vm_uses_by_now_is_not_taken_from_under_it(vm: Qemu, vms: Vms, target: Path) -> None:
    """It was in nobody's use when the copy began, hours ago."""
    backup(vm, target)
    vm.write("drive0", 0x21, 0, MIB)
    start_slowly(vm, target, overwrite=True, sync="top")
    other = vms.start(Disk(target), name="other")
    before = os.stat(target).st_ino
    release(vm)
    wait_concluded(vm)
    result = fail_backup(vm, target, overwrite=True, sync="top")
    assert "in use" in result["msg"]
    assert os.stat(target).st_ino == before
    other.write("drive0", 0x77, 0, MIB)
    other.quit()
    assert backup(vm, target, overwrite=True, sync="top")["changed"]
    assert os.stat(target).st_ino != before


def test_job_that_began_after_the_look(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], slow_look: tuple[Path, Path]
) -> None:
    """The look at where a disk has data may take half a minute."""
    call = start_module("drive_backup", arguments(vm, target, job_id="nightly"))
    wait_until(slow_look[0].exists, "the look")
    create(directory / "foreign.qcow2", 64 * MIB)
    start_foreign(vm, directory / "foreign.qcow2", "nightly", speed=SLOW)
    slow_look[1].touch()
    result = call.result()
    assert result.get("failed")
    assert "busy" in result["msg"]
    assert [job["device"] for job in vm.block_jobs] == ["nightly"]
    assert vm.job["status"] == "running"
    vm.qmp.execute("block-job-cancel", device="nightly", force=True)
    wait_until(lambda: not vm.block_jobs, "the end of that job")


def test_file_that_appeared_after_the_look_is_not_removed(
    vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess], slow_look: tuple[Path, Path]
) -> None:
    call = start_module("drive_backup", arguments(vm, target))
    wait_until(slow_look[0].exists, "the look")
    growing = target.with_name(target.name + ".partial")
    growing.write_text("somebody's")
    slow_look[1].touch()
    assert call.result().get("failed")
    assert growing.read_text() == "somebody's"
    assert not receipt(target).exists()
    growing.unlink()
