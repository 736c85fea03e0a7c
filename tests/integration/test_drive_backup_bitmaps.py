# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: increments from a bitmap of the user's, and what becomes of the bitmap."""

from __future__ import annotations

import re
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    backup,
    dirty_bytes,
    fail_backup,
    rebase,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info
from ansible_collections.vmfleet.backup.tests.harness.modules import fail

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

NEVER = {"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "never"}
INCREMENTAL = {"sync": "incremental", "bitmap": "b0"}


@pytest.mark.parametrize("options", [NEVER, INCREMENTAL])
def test_increment_on_the_full_is_the_disk(
    vm: Qemu, directory: Path, target: Path, full: Path, options: dict[str, str]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    dirty = dirty_bytes(vm)
    assert dirty == 3 * MIB
    backup(vm, target, **options)
    assert info(target)["actual-size"] < 5 * MIB
    assert identical(copy, rebase(target, full))
    # QEMU clears the bitmap of an incremental: what it held is in the image alone now.
    assert dirty_bytes(vm) == (dirty if options is NEVER else 0)


@pytest.mark.parametrize("options", [NEVER, INCREMENTAL])
def test_increment_into_an_existing_image_with_backing_file(
    vm: Qemu, directory: Path, target: Path, full: Path, options: dict[str, str]
) -> None:
    create(target, backing=full)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, mode="existing", overwrite=True, **options)
    assert info(target)["full-backing-filename"] == str(full)
    assert identical(copy, target)


@pytest.mark.parametrize("options", [NEVER, INCREMENTAL])
def test_case_3_finished_increment_is_not_done_again(
    vm: Qemu, target: Path, full: Path, options: dict[str, str]
) -> None:
    assert full.exists()
    backup(vm, target, **options)
    vm.write("drive0", 0x52, 0, MIB)
    dirty = dirty_bytes(vm)
    again = backup(vm, target, **options)
    assert again["changed"] is False
    assert not sent(again, "drive-backup")
    assert dirty_bytes(vm) == dirty


def test_case_25_timeout_keeps_the_bitmap(vm: Qemu, target: Path, full: Path) -> None:
    assert full.exists()
    vm.write("drive0", 0x53, 16 * MIB, 16 * MIB)
    dirty = dirty_bytes(vm)
    fail_backup(vm, target, speed=SLOW, timeout=1, **INCREMENTAL)
    assert dirty_bytes(vm) == dirty
    assert_absent(target)


def test_cancelled_keeps_the_bitmap(vm: Qemu, target: Path, full: Path) -> None:
    assert full.exists()
    vm.write("drive0", 0x53, 16 * MIB, 16 * MIB)
    dirty = dirty_bytes(vm)
    start_slowly(vm, target, **INCREMENTAL)
    backup(vm, target, state="cancelled", **INCREMENTAL)
    assert dirty_bytes(vm) == dirty


def test_writes_while_it_runs_belong_to_the_next(vm: Qemu, directory: Path, target: Path, full: Path) -> None:
    vm.write("drive0", 0x53, 16 * MIB, 8 * MIB)
    copy = vm.freeze(vm.disks[0], directory / "first.qcow2")
    start_slowly(vm, target, **INCREMENTAL)
    vm.write("drive0", 0x54, 20 * MIB, 2 * MIB)
    release(vm)
    backup(vm, target, **INCREMENTAL)
    assert identical(copy, rebase(target, full))
    assert dirty_bytes(vm) == 2 * MIB
    second = target.with_name("second.qcow2")
    copy = vm.freeze(vm.disks[0], directory / "second.qcow2")
    backup(vm, second, **INCREMENTAL)
    assert identical(copy, rebase(second, target))


def test_bitmap_on_raw_lives_as_long_as_qemu(vms: t.Any, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, format="raw"))
    full = target.with_name("full.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
    backup(vm, full)
    vm.write("drive0", 0x51, 6 * MIB, 3 * MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, **INCREMENTAL)
    assert identical(copy, rebase(target, full))


def test_bitmap_is_found_below_a_filter(vms: t.Any, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, throttle=512 * MIB))
    full = target.with_name("full.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
    backup(vm, full)
    vm.write("drive0", 0x51, 6 * MIB, 3 * MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, **NEVER)
    assert identical(copy, rebase(target, full))


@pytest.mark.parametrize(
    ("trouble", "word"),
    [("disable", "disabled"), ("remove", "bitmap"), ("inconsistent", "inconsistent"), ("busy", "in use|busy")],
)
def test_bitmap_that_cannot_be_trusted(vm: Qemu, target: Path, full: Path, trouble: str, word: str) -> None:
    assert full.exists()
    if trouble == "inconsistent":
        # Stored once, so that the file knows it; then lost in a crash.
        vm.quit()
        vm.restart()
        vm.write("drive0", 0x54, 0, MIB)
        vm.kill()
        vm.restart()
    elif trouble == "busy":
        vm.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(vm.directory / "nbd")}})
        vm.qmp.execute("block-export-add", type="nbd", id="e", node_name="n0", bitmaps=["b0"], writable=True)
    else:
        vm.qmp.execute(f"block-dirty-bitmap-{trouble}", node="n0", name="b0")
    result = fail("drive_backup", arguments(vm, target, **NEVER))
    assert result["msg"].startswith("bitmap: ")
    assert re.search(word, result["msg"])
    assert_absent(target)


def test_lost_increment_is_said_and_not_hidden(vm: Qemu, target: Path, full: Path) -> None:
    # sync=incremental clears its bitmap in QEMU at the job's end: what is lost with the image then is lost for good.
    assert full.exists()
    backup(vm, target, state="started", **INCREMENTAL)
    wait_concluded(vm)
    vm.qmp.execute("job-dismiss", id=vm.job["device"])
    result = fail_backup(vm, target, **INCREMENTAL)
    assert "bitmap" in result["msg"]
    assert "full" in result["msg"]
    assert not target.exists()
    # Neither does the next call hide it, until somebody says that the gap is known.
    fail_backup(vm, target, **INCREMENTAL)
    assert backup(vm, target, overwrite=True, **INCREMENTAL)["changed"] is True


def test_failed_increment_keeps_the_bitmap(vm: Qemu, storage: Storage, full: Path) -> None:
    assert full.exists()
    mount = storage.mount("ext2", 24 * MIB)
    vm.write("drive0", 0x53, 16 * MIB, 32 * MIB)
    dirty = dirty_bytes(vm)
    result = fail_backup(vm, mount.path / "disk.qcow2", **INCREMENTAL)
    assert "No space left on device" in result["msg"]
    assert dirty_bytes(vm) == dirty
    assert_absent(mount.path / "disk.qcow2")
