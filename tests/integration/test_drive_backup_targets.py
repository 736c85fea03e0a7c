# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: targets that exist, block devices, and targets that QEMU itself could not open."""

from __future__ import annotations

import json
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
    partial,
    receipt,
    release,
    sent,
    start_slowly,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, patterned, unlocked
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def test_root_only_directory_and_qemu_without_rights(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(unprivileged=True)
    target.parent.chmod(0o700)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)
    assert target.stat().st_uid == 0


def test_root_only_increment_whose_base_qemu_cannot_read(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(unprivileged=True)
    full = target.with_name("full.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
    backup(vm, full)
    vm.write("drive0", 0x41, 0, MIB)
    create(target, backing=full)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, mode="existing", overwrite=True, sync="bitmap", bitmap="b0", bitmap_mode="never")
    assert identical(copy, target)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "ext2"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_file_systems(vm: Qemu, storage: Storage, directory: Path, kind: str, fmt: str) -> None:
    """With O_DIRECT and without, with fallocate and without."""
    target = storage.mount(kind, 128 * MIB).path / "disk"
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, format=fmt)
    assert_good(target, copy, fmt)


def test_direct_where_it_can_be(vm: Qemu, storage: Storage) -> None:
    result = backup(vm, storage.mount("ext4", 128 * MIB).path / "disk")
    [told] = sent(result, "drive-backup")
    assert json.loads(told["target"].removeprefix("json:"))["file"]["cache"]["direct"] is True


def test_compressed_is_buffered(vm: Qemu, storage: Storage) -> None:
    result = backup(vm, storage.mount("ext4", 128 * MIB).path / "disk", compress=True)
    [told] = sent(result, "drive-backup")
    assert json.loads(told["target"].removeprefix("json:"))["file"]["cache"]["direct"] is False


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_existing_image(vm: Qemu, directory: Path, target: Path, fmt: str) -> None:
    patterned(target, fmt, seed=200)
    inode = target.stat().st_ino
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target, mode="existing", format=fmt, overwrite=True)
    assert result["changed"] is True
    assert target.stat().st_ino == inode
    assert_good(target, copy, fmt)
    assert backup(vm, target, mode="existing", format=fmt)["changed"] is False


def test_existing_image_is_probed(vm: Qemu, directory: Path, target: Path) -> None:
    create(target)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target, mode="existing", overwrite=True)
    assert sent(result, "drive-backup")[0]["format"] == "qcow2"
    assert_good(target, copy)


def test_existing_image_keeps_its_mode(vm: Qemu, target: Path) -> None:
    create(target)
    target.chmod(0o640)
    backup(vm, target, mode="existing", overwrite=True)
    assert target.stat().st_mode & 0o777 == 0o640


def test_receipt_goes_before_a_job_writes_into_its_image(vm: Qemu, directory: Path, target: Path) -> None:
    create(target)
    backup(vm, target, mode="existing")
    # The image is the same, and its receipt is for another kind of backup.
    start_slowly(vm, target, mode="existing", overwrite=True, sync="top")
    assert not receipt(target).exists()
    vm.kill()
    vm.restart()
    # Half of one backup and half of the other: never taken for a good one.
    vm.write("drive0", 0x41, 0, MIB)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target, mode="existing")
    assert result["changed"] is True
    assert_good(target, copy)


def test_cancelled_existing_image_is_not_taken_for_a_backup(vm: Qemu, directory: Path, target: Path) -> None:
    create(target)
    start_slowly(vm, target, mode="existing")
    wait_until(lambda: vm.job["offset"] > 0, "some progress")
    backup(vm, target, mode="existing", state="cancelled")
    assert unlocked(target)
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    assert backup(vm, target, mode="existing")["changed"] is True
    assert_good(target, copy)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_block_device_with_receipt(vm: Qemu, storage: Storage, directory: Path, target: Path, fmt: str) -> None:
    device = storage.loop(80 * MIB if fmt == "qcow2" else 64 * MIB)
    if fmt == "qcow2":
        create(device)
    memory = target.with_name("device.json")
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    options = {"mode": "existing", "format": fmt, "receipt": str(memory), "overwrite": True}
    assert backup(vm, device, **options)["changed"] is True
    assert identical(copy, device, other_format=fmt)
    assert unlocked(device, fmt)
    assert memory.exists()
    assert backup(vm, device, **{**options, "overwrite": False})["changed"] is False


def test_block_device_without_receipt_always_runs_and_says_so(vm: Qemu, storage: Storage, directory: Path) -> None:
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "overwrite": True}
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    first = backup(vm, device, **options)
    assert any("receipt" in warning for warning in first["warnings"])
    assert identical(copy, device, other_format="raw")
    vm.write("drive0", 0x41, 0, MIB)
    copy = vm.freeze(vm.disks[0], directory / "second.qcow2")
    assert backup(vm, device, **options)["changed"] is True
    assert identical(copy, device, other_format="raw")


def test_block_device_without_receipt_can_be_followed(vm: Qemu, storage: Storage, directory: Path) -> None:
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "overwrite": True}
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    started = start_slowly(vm, device, **options)
    release(vm)
    assert backup(vm, device, **options)["jobs"][0]["id"] == started["jobs"][0]["id"]
    assert identical(copy, device, other_format="raw")


def test_block_device_needs_mode_existing(vm: Qemu, storage: Storage) -> None:
    device = storage.loop(64 * MIB)
    result = fail_backup(vm, device, format="raw", overwrite=True)
    assert result["msg"].startswith("mode: ")
    assert device.read_bytes() == bytes(64 * MIB)


def test_block_device_in_use(vm: Qemu, storage: Storage) -> None:
    mount = storage.mount("ext4", 64 * MIB)
    device = Path(mount.source)
    result = fail_backup(vm, device, mode="existing", format="raw", overwrite=True)
    assert result["msg"].startswith("target: ")
    assert "in use" in result["msg"]


def test_block_device_whose_receipt_is_for_another_backup(vms: Vms, storage: Storage, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "receipt": str(target.with_name("device.json"))}
    backup(vm, device, **options)
    before = device.read_bytes()
    result = fail_backup(vm, device, **{**options, "device": "drive1"})
    assert "overwrite" in result["msg"]
    assert device.read_bytes() == before
    backup(vm, device, overwrite=True, **{**options, "device": "drive1"})
    assert device.read_bytes() != before


def test_block_device_of_another_size(vm: Qemu, storage: Storage) -> None:
    device = storage.loop(32 * MIB)
    result = fail_backup(vm, device, mode="existing", format="raw", overwrite=True)
    assert result["msg"].startswith("target: ")
    assert device.read_bytes() == bytes(32 * MIB)


def test_cancelled_block_device(vm: Qemu, storage: Storage) -> None:
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "overwrite": True}
    start_slowly(vm, device, **options)
    backup(vm, device, state="cancelled", **options)
    assert device.is_block_device()
    assert unlocked(device, "raw")


def test_receipt_elsewhere(vm: Qemu, directory: Path, target: Path) -> None:
    memory = directory / "memory.json"
    backup(vm, target, receipt=str(memory))
    assert memory.exists()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert backup(vm, target, receipt=str(memory))["changed"] is False


def test_tcp_monitor(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(tcp=True, uuid="f0f84d2c-8a3e-4b7d-9c55-2f1f6f1f0a01")
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    monitor = f"tcp:127.0.0.1:{vm.tcp_port}"
    result = succeed("drive_backup", arguments(vm, target, monitor=monitor))
    assert not sent(result, "add-fd")
    assert_good(target, copy)
    # The same VM over another door: the same backup.
    assert backup(vm, target)["changed"] is False


def test_tcp_monitor_and_target_out_of_qemu_s_reach(vms: Vms, target: Path) -> None:
    vm = vms.start(tcp=True, unprivileged=True)
    result = fail("drive_backup", arguments(vm, target, monitor=f"tcp:127.0.0.1:{vm.tcp_port}"))
    assert "Permission denied" in result["msg"]
    assert_absent(target)


@pytest.mark.parametrize(
    "name",
    ["a:b.qcow2", "with space.qcow2", "comma,eq=1.qcow2", "q'uo\"te\\.qcow2", "-dash.qcow2", "ünï.qcow2", "%s{}.qcow2"],
)
def test_strange_names(vm: Qemu, directory: Path, target: Path, name: str) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    path = target.with_name(name)
    backup(vm, path)
    assert path.exists()
    # qemu-img reads file: as a prefix of its own, and so leaves the name after it alone.
    plain = target.with_name("plain.qcow2")
    path.rename(plain)
    assert_good(plain, copy)


def test_long_name(vm: Qemu, target: Path) -> None:
    longest = target.with_name("n" * 200)
    backup(vm, longest)
    assert info(longest)["format"] == "qcow2"
    result = fail_backup(vm, target.with_name("n" * 250))
    assert "bytes too long" in result["msg"]


def test_image_grows_under_another_name(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    assert partial(target).exists()
    assert partial(target).stat().st_mode & 0o777 == 0o600
    assert not target.exists()
    # And what tells about it, too, bears names that say: not finished.
    assert all(".partial" in path.name for path in target.parent.iterdir())
    backup(vm, target, state="cancelled")


def test_speed_is_not_part_of_a_backup_s_identity(vm: Qemu, target: Path) -> None:
    backup(vm, target, speed=64 * MIB)
    assert backup(vm, target, speed=SLOW)["changed"] is False
