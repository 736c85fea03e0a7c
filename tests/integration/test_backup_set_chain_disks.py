# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and chains: disks of all sorts, and what happens to them between two sets."""

from __future__ import annotations

import shutil
import typing as t
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, info, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, run_for_a_moment, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")


def merge(vm: Qemu, into: str) -> None:
    """Commit the layers above a node into it, and go on with it."""
    vm.qmp.execute("block-commit", job_id="merge", device="drive0", base_node=into)
    wait_until(lambda: vm.job["ready"], "the merge")
    vm.qmp.execute("block-job-complete", device="merge")
    wait_until(lambda: not vm.block_jobs, "the end of the merge")


def test_case_43_grown_and_shrunk_disks(history: History) -> None:
    vm = history.vm
    history.back_up("s1")
    for set_id, size in (("s2", 12 * MIB), ("s3", 6 * MIB), ("s4", 10 * MIB)):
        vm.qmp.execute("block_resize", node_name="n0", size=size)
        vm.write("drive0", 0xA1, size - 65536, 65536)
        assert history.back_up(set_id) == "full"
        assert f"to {size} bytes" in history.reason(set_id)
    vm.write("drive0", 0xB1, MIB, 65536)
    assert history.back_up("s5") == "incremental"
    # Shrunk and grown on, beyond what it was.
    for size in (6 * MIB, 11 * MIB):
        vm.qmp.execute("block_resize", node_name="n0", size=size)
    assert history.back_up("s6") == "full"
    history.check()


def test_case_44_a_disk_that_is_hot_added(history: History, directory: Path) -> None:
    vm = history.vm
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    path = create(directory / "added.qcow2", SIZE)
    file = {"driver": "file", "filename": str(path)}
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="added", file=file)
    vm.disks = (*vm.disks, Disk(path, id=None, node="added"))
    vm.write("added", 0xA2, MIB, 65536)
    assert history.back_up("s2") == "incremental"
    assert history.note("s2") == {"drive0": "incremental", "added": "full"}
    assert history.reason("s2", "added") == "it is not in set s1"
    vm.write("added", 0xB2, 2 * MIB, 65536)
    vm.write("drive0", 0xB1, 2 * MIB, 65536)
    history.back_up("s3")
    assert history.note("s3") == {"drive0": "incremental", "added": "incremental"}
    # It goes, and comes back: what was written to it elsewhere is in no record that could be trusted.
    vm.qmp.execute("blockdev-del", node_name="added")
    disks, vm.disks = vm.disks, vm.disks[:1]
    history.back_up("s4")
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="added", file=file)
    vm.disks = disks
    history.back_up("s5")
    assert history.note("s5") == {"drive0": "incremental", "added": "full"}
    history.check()


def test_case_12_disks_behind_a_throttle(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(size=SIZE, throttle=1 << 30), name="web01"), sets, directory)
    vm = history.vm
    history.back_up("s1")
    # On the node below the filter, where it is recorded and stored.
    assert list(history.bitmaps()) == ["n0"]
    overwrite(vm, 0xA1)
    history.freeze("s2")
    plan = sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xA8, 6 * MIB + 65536, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert history.note("s2") == {"drive0": "incremental"}
    vm.quit()
    vm.restart()
    vm.write("drive0", 0xA3, 3 * MIB, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()
    assert [disk["node"] for disk in sets.manifest("web01", "s3")["disks"]] == ["n0"]


def test_a_disk_that_is_shrunk_behind_a_throttle_while_it_is_copied(
    vms: Vms, sets: Sets, start_module: t.Callable[..., t.Any]
) -> None:
    vm = vms.start(vms.disk(size=SIZE, throttle=1 << 30), name="web01")
    process = start_module("backup_set", {"plan": sets.plan(vm, id="s1", speed="1M")["plan"]})
    wait_until(lambda: vm.block_jobs, "the start of the job")
    vm.qmp.execute("block_resize", device="drive0", size=6 * MIB)
    release(vm)
    result = process.result()
    assert "drive0 has been shrunk" in result["msg"]
    sets.assert_absent("web01", "s1")


def test_case_13_disks_with_backing_files(vms: Vms, sets: Sets, directory: Path) -> None:
    base = vms.disk(size=SIZE).path
    assert base
    top = create(directory / "top.qcow2", SIZE, backing=create(directory / "middle.qcow2", SIZE, backing=base))
    write(directory / "middle.qcow2", "write -P 0x31 2M 128k")
    history = History(vms.start(Disk(top), name="web01"), sets, directory)
    vm = history.vm
    vm.write("drive0", 0xA1, MIB, 65536)
    history.back_up("s1")
    assert "backing-filename" not in info(sets.images("web01", "s1")["drive0"])
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    vm.io("drive0", "write -z 0 64k")
    assert history.back_up("s2") == "incremental"
    # Another layer on top: the bitmap is in the one below, and writes go past it.
    overlay = create(directory / "overlay.qcow2", SIZE)
    vm.qmp.execute(
        "blockdev-snapshot-sync", node_name="n0", snapshot_file=str(overlay), snapshot_node_name="n1", format="qcow2"
    )
    vm.disks = (Disk(overlay, node="n1"),)
    vm.write("drive0", 0xB1, 3 * MIB, 65536)
    assert history.back_up("s3") == "full"
    assert "is in a layer below (node n0): somebody took an external snapshot" in history.reason("s3")
    vm.write("drive0", 0xB2, 4 * MIB, 65536)
    assert history.back_up("s4") == "incremental"
    # The layers become one again: the bitmap above goes, and the one below is too old.
    merge(vm, "n0")
    vm.disks = (Disk(top),)
    vm.write("drive0", 0xB3, 5 * MIB, 65536)
    assert history.back_up("s5") == "full"
    assert history.bitmaps() == history.recorded("s5")
    history.check()


def test_an_external_snapshot_that_comes_and_goes_between_sets(history: History, directory: Path) -> None:
    vm = history.vm
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    overlay = str(directory / "overlay.qcow2")
    vm.qmp.execute(
        "blockdev-snapshot-sync", node_name="n0", snapshot_file=overlay, snapshot_node_name="n1", format="qcow2"
    )
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    merge(vm, "n0")
    vm.write("drive0", 0xA3, 3 * MIB, 65536)
    # What was merged into the disk is in its record.
    assert history.back_up("s2") == "incremental"
    history.check()


def test_disks_with_node_names_only(vms: Vms, sets: Sets, directory: Path) -> None:
    disks = [vms.disk(0, size=SIZE, id=None), vms.disk(1, size=SIZE, id=None, device="virtio-blk-pci,id=vd0")]
    vm = vms.start(*disks, name="web01", machine="q35,accel=tcg", paused=True)
    # How qemu-io calls them: what is in use by a device can be written to through that device only.
    handles = {"n0": "n0", "vd0": "-d /machine/peripheral/vd0/virtio-backend"}
    copies: dict[str, dict[str, Path]] = {}
    for number in range(3):
        set_id = f"s{number}"
        copies[set_id] = {}
        for disk, (name, handle) in zip(disks, handles.items(), strict=True):
            vm.write(handle, 0xA1 + number, number * MIB, 65536)
            copy = directory / f"frozen-{set_id}-{name}.qcow2"
            copies[set_id][name] = vm.freeze(replace(disk, id=handle), copy)
        sets.back_up(vm, id=set_id)
    run_for_a_moment(vm)
    for set_id, frozen in copies.items():
        level = "full" if set_id == "s0" else "incremental"
        sets.assert_good("web01", frozen, set_id, dict.fromkeys(frozen, level))


def test_case_15_uefi_variables(vms: Vms, sets: Sets, directory: Path) -> None:
    code, variables = (create(directory / f"pflash{unit}.raw", MIB, "raw") for unit in range(2))
    flash = [
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
    ]
    vm = vms.start(vms.disk(size=SIZE), name="web01", machine="q35,accel=tcg", paused=True, extra=flash)
    copies = {}
    for number in range(3):
        vm.write("pflash1", 0xA1 + number, number * 65536, 4096)
        set_id = f"s{number}"
        copies[set_id] = {
            "drive0": vm.freeze(vm.disks[0], directory / f"frozen-{set_id}-0.qcow2"),
            "pflash1": vm.freeze(Disk(variables, id="pflash1", format="raw"), directory / f"frozen-{set_id}-1.qcow2"),
        }
        sets.back_up(vm, id=set_id)
    run_for_a_moment(vm)
    for set_id, frozen in copies.items():
        level = "full" if set_id == "s0" else "incremental"
        sets.assert_good("web01", frozen, set_id, dict.fromkeys(frozen, level))


def test_disks_swapped_at_a_restart(vms: Vms, sets: Sets, directory: Path) -> None:
    one, other = vms.disk(0, size=SIZE), vms.disk(1, size=SIZE)
    history = History(vms.start(one, other, name="web01"), sets, directory)
    history.back_up("s1")
    for disk in ("drive0", "drive1"):
        history.vm.write(disk, 0xA1, MIB, 65536)
    vm = history.reopen(vms, replace(one, path=other.path), replace(other, path=one.path))
    vm.write("drive0", 0xB1, 2 * MIB, 65536)
    history.back_up("s2")
    assert history.note("s2") == {"drive0": "full", "drive1": "full"}
    assert "is on disk drive1: the disks were swapped" in history.reason("s2", "drive0")
    vm.write("drive1", 0xB2, 3 * MIB, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()
    assert history.bitmaps() == history.recorded("s3")


def test_a_disk_replaced_by_a_copy_of_another(vms: Vms, sets: Sets, directory: Path) -> None:
    one, other = vms.disk(0, size=SIZE), vms.disk(1, size=SIZE)
    history = History(vms.start(one, other, name="web01"), sets, directory)
    history.back_up("s1")
    history.vm.write("drive0", 0xA1, MIB, 65536)
    history.vm.quit()
    assert one.path
    assert other.path
    # With its bitmaps.
    shutil.copyfile(one.path, other.path)
    history.vm.restart()
    history.vm.write("drive0", 0xA2, 2 * MIB, 65536)
    history.vm.write("drive1", 0xA3, 3 * MIB, 65536)
    history.back_up("s2")
    assert history.note("s2") == {"drive0": "incremental", "drive1": "full"}
    assert history.bitmaps() == history.recorded("s2")
    assert history.back_up("s3") == "incremental"
    history.check()


def test_a_disk_rolled_back_to_an_older_state(history: History, directory: Path) -> None:
    vm = history.vm
    path = vm.disks[0].path
    assert path
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    vm.quit()
    shutil.copyfile(path, directory / "rollback.qcow2")
    vm.restart()
    # Since s1 in the file as well as in its record.
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    vm.quit()
    shutil.copyfile(directory / "rollback.qcow2", path)
    vm.restart()
    assert history.back_up("s2") == "incremental"
    vm.quit()
    shutil.copyfile(directory / "rollback.qcow2", path)
    vm.restart()
    # It knows of s1 and nothing of s2.
    assert history.back_up("s3") == "full"
    history.check()


def test_an_image_as_old_as_qcow2_v2_chains_like_a_raw_one(vms: Vms, sets: Sets, directory: Path) -> None:
    path = directory / "old.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, str(SIZE))
    history = History(vms.start(Disk(path), name="web01"), sets, directory)
    history.back_up("s1")
    history.vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "incremental"
    history.vm.quit()
    history.vm.restart()
    assert history.back_up("s3") == "full"
    history.check()


def test_differential_after_a_set_without_a_disk(vms: Vms, sets: Sets, directory: Path) -> None:
    vm = vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name="web01")
    history = History(vm, sets, directory)
    first, second = (str(disk.name) for disk in vm.disks)
    history.back_up("s1", level="differential")
    vm.write(second, 0xA1, MIB, 65536)
    left_out = [{"monitor": str(vm.monitor), "exclude_disks": [second], "level": "differential"}]
    history.back_up("s2", first, vms=left_out)
    vm.write(second, 0xB1, 2 * MIB, 65536)
    history.back_up("s3", level="differential")
    assert sets.levels("web01", "s3") == dict.fromkeys((first, second), "differential")
    history.check()
