# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: what can be backed up, and by which name it is found."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    release,
    sent,
    start_slowly,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, patterned, write
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qmp, faulty

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

# A machine with guest devices that never runs: enough for qdev ids and firmware.
PC = {"machine": "q35,accel=tcg", "paused": True}


@pytest.mark.parametrize("device", ["drive0", "n0"])
def test_case_7_backend_and_node_name(vm: Qemu, directory: Path, target: Path, device: str) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target, device=device)
    # Whatever the disk is called by: QEMU is only ever given the name of its node.
    assert [action["device"] for action in sent(result, "drive-backup")] == ["n0"]
    assert_good(target, copy)


@pytest.mark.parametrize("device", ["vd1", "/machine/peripheral/vd1/virtio-backend", "drive1", "n1"])
def test_case_7_qdev_id_and_path(vms: Vms, directory: Path, target: Path, device: str) -> None:
    vm = vms.start(
        *(vms.disk(number, device=f"virtio-blk-pci,id=vd{number}") for number in range(2)),
        machine="q35,accel=tcg",
    )
    copy = vm.freeze(vm.disks[1], directory / "frozen.qcow2")
    result = backup(vm, target, device=device)
    assert result["jobs"][0]["node"] == "n1"
    assert_good(target, copy)


def test_case_7_device_without_backend_name(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, id=None, device="virtio-blk-pci,id=vd0"), machine="q35,accel=tcg")
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, device="vd0")
    assert_good(target, copy)


def test_names_of_one_disk_mean_one_backup(vms: Vms, target: Path) -> None:
    vm = vms.start(vms.disk(0, device="virtio-blk-pci,id=vd0"), machine="q35,accel=tcg")
    backup(vm, target, device="drive0")
    assert backup(vm, target, device="vd0")["changed"] is False
    assert backup(vm, target, device="n0")["changed"] is False


def test_node_alone(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, id=None))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, device="n0")
    assert_good(target, copy)


def test_case_8_disk_without_node_name(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, node=None))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)
    vm.quit()
    vm.restart()
    second = target.with_name("second.qcow2")
    backup(vm, second)
    assert_good(second, copy)
    assert backup(vm, target)["changed"] is False


def test_case_8_job_is_found_though_the_node_has_no_name(vms: Vms, target: Path) -> None:
    vm = vms.start(vms.disk(0, node=None))
    started = start_slowly(vm, target)
    release(vm)
    assert backup(vm, target)["jobs"][0]["id"] == started["jobs"][0]["id"]


def test_case_9_same_file_name_in_two_directories(vms: Vms, directory: Path, target: Path) -> None:
    disks = []
    for number in range(2):
        (directory / str(number)).mkdir()
        path = patterned(directory / str(number) / "disk.qcow2", seed=number)
        disks.append(Disk(path, id=f"drive{number}", node=f"n{number}"))
    vm = vms.start(*disks)
    targets = [target.with_name("one.qcow2"), target.with_name("two.qcow2")]
    drives = [{"device": disk.id, "target": str(path)} for disk, path in zip(disks, targets, strict=True)]
    copies = [vm.freeze(disk, directory / f"frozen{disk.node}.qcow2") for disk in disks]
    backup(vm, drives=drives)
    for path, copy in zip(targets, copies, strict=True):
        assert_good(path, copy)
    assert not identical(targets[0], targets[1])


def test_case_10_paused_vm_stays_paused(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(paused=True)
    assert vm.status == "prelaunch"
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert vm.status == "prelaunch"
    assert identical(copy, target)
    # QEMU 7.2 closes files that were passed to it only while the VM runs, and when a monitor is let go.
    vm.qmp.execute("cont")
    Qmp(vm.monitor).close()
    assert_good(target, copy)


def test_case_12_behind_a_throttle_filter(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, throttle=512 * MIB))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target)
    assert result["jobs"][0]["node"] == "n0"
    assert [action["device"] for action in sent(result, "drive-backup")] == ["n0"]
    assert_good(target, copy)


def test_case_12_guest_writes_through_the_filter_are_seen(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, throttle=512 * MIB))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    vm.write("drive0", 0x99, 40 * MIB, 8 * MIB)
    release(vm)
    backup(vm, target)
    assert_good(target, copy)


def _overlay(directory: Path) -> tuple[Disk, Path]:
    base = patterned(directory / "base.qcow2")
    middle = create(directory / "middle.qcow2", backing=base)
    write(middle, f"write -P 0x61 {2 * MIB} 4M")
    top = create(directory / "top.qcow2", backing=middle)
    write(top, f"write -P 0x62 {4 * MIB} 4M", f"write -z {16 * MIB} 1M")
    return Disk(top), middle


def test_case_13_overlay_becomes_a_whole_image(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(_overlay(directory)[0])
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert "backing-filename" not in info(target)
    assert_good(target, copy)


def test_sync_top_copies_the_top_layer(vms: Vms, directory: Path, target: Path) -> None:
    disk, middle = _overlay(directory)
    vm = vms.start(disk)
    copy = vm.freeze(disk, directory / "frozen.qcow2")
    result = backup(vm, target, sync="top")
    assert [action["sync"] for action in sent(result, "drive-backup")] == ["top"]
    image = info(target)
    assert image["full-backing-filename"] == str(middle)
    assert image["backing-filename-format"] == "qcow2"
    assert image["actual-size"] < 8 * MIB
    assert_good(target, copy)


def test_case_14_raw_disk(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, format="raw"))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)


def test_case_14_raw_disk_has_no_bitmap(vms: Vms, target: Path) -> None:
    vm = vms.start(vms.disk(0, format="raw"))
    result = fail_backup(vm, target, sync="incremental", bitmap="none-such")
    assert "bitmap" in result["msg"]
    assert "none-such" in result["msg"]
    assert_absent(target)


def test_case_14_block_device_as_source(vms: Vms, storage: t.Any, directory: Path, target: Path) -> None:
    source = storage.loop(16 * MIB)
    write(source, "write -P 0x21 4M 4M", fmt="raw")
    disk = Disk(source, format="raw", file={"driver": "host_device", "filename": str(source)})
    vm = vms.start(disk)
    copy = vm.freeze(disk, directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)


@pytest.mark.parametrize("size", [512, 65536, 10 * MIB + 512])
def test_odd_sizes(vms: Vms, directory: Path, target: Path, size: int) -> None:
    source = directory / "source.raw"
    source.write_bytes(bytes(range(256)) * (size // 256))
    vm = vms.start(Disk(source, format="raw"))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)
    raw = target.with_name("disk.raw")
    backup(vm, raw, format="raw")
    assert_good(raw, copy, "raw")


def test_case_15_firmware_variables(vms: Vms, directory: Path, target: Path) -> None:
    variables = directory / "vars.fd"
    variables.write_bytes(bytes(range(256)) * 512)
    disk = Disk(variables, id=None, node="vars", format="raw")
    vm = vms.start(vms.disk(0), disk, machine="q35,accel=tcg,pflash1=vars,pflash0=code", extra=_code(directory))
    copy = vm.freeze(disk, directory / "frozen.qcow2")
    backup(vm, target, device="vars")
    assert_good(target, copy)


def _code(directory: Path) -> list[str]:
    code = directory / "code.fd"
    code.write_bytes(bytes(131072))
    return ["-blockdev", f"driver=raw,node-name=code,read-only=on,file.driver=file,file.filename={code}"]


def test_case_15_drive_without_medium(vms: Vms, target: Path) -> None:
    vm = vms.start(vms.disk(0), Disk(None, id="cd", node=None))
    result = fail_backup(vm, target, device="cd")
    assert result["msg"].startswith("device: ")
    assert "medium" in result["msg"]
    assert_absent(target)
    backup(vm, target)


def test_medium_in_a_cdrom_drive(vms: Vms, directory: Path, target: Path) -> None:
    disk = vms.disk(0, format="raw", read_only=True)
    vm = vms.start(disk)
    copy = vm.freeze(disk, directory / "frozen.qcow2")
    backup(vm, target)
    assert_good(target, copy)


def test_case_34_read_error(vms: Vms, directory: Path, target: Path) -> None:
    image = patterned(directory / "source.raw", "raw")
    vm = vms.start(Disk(image, format="raw", file=faulty(image, "read_aio", sector=32768)))
    result = fail_backup(vm, target)
    assert "Input/output error" in result["msg"]
    [job] = result["jobs"]
    assert job["state"] == "failed"
    assert "Input/output error" in job["error"]
    assert vm.status == "running"
    assert_absent(target)


def test_case_34_read_error_while_nobody_watched(vms: Vms, directory: Path, target: Path) -> None:
    image = patterned(directory / "source.raw", "raw")
    vm = vms.start(Disk(image, format="raw", file=faulty(image, "read_aio", sector=32768, once="on")))
    copy = patterned(directory / "copy.qcow2")
    backup(vm, target, state="started")
    result = fail_backup(vm, target)
    assert "Input/output error" in result["msg"]
    assert_absent(target)
    # The error was a passing one: the same call starts anew.
    backup(vm, target)
    assert_good(target, copy)


def test_several_vms_do_not_meet(vms: Vms, directory: Path, target: Path) -> None:
    first = vms.start(vms.disk(0), name="first")
    second = vms.start(Disk(patterned(directory / "other.qcow2", seed=99)), name="second")
    backup(first, target)
    # Same device name, same target, another VM: the receipt tells them apart.
    result = fail_backup(second, target)
    assert "overwrite" in result["msg"]
    assert backup(first, target)["changed"] is False
