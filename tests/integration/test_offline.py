# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs that are off: their sets, and those of the same VMs when they are on, follow each other."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import sent
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.offline import NAME, SIZE, OffHistory
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")

UUID = "6f9b16e4-7b8c-4a52-9df3-5c2b1f0c7a10"


@pytest.mark.parametrize("uuid", first(1, [UUID, ""]))
def test_on_and_off_in_turns(vms: Vms, off: OffHistory, uuid: str) -> None:
    if uuid:
        off.entry["uuid"] = uuid
        off.vm = vms.start(*off.vm.disks, name=NAME, uuid=uuid)
        off.entry["monitor"] = str(off.vm.monitor)
        off.vm.quit()
    assert off.make("s1")["level"] == "full"
    off.assert_released("s1")
    off.vm.restart()
    off.write(0xA1, MIB, 65536)
    off.write(0xA2, 3 * MIB, 65536, "drive1")
    assert off.make("s2")["level"] == "incremental"
    off.write(0xB1, 2 * MIB, 65536)
    off.vm.quit()
    assert off.make("s3")["level"] == "incremental"
    off.assert_released("s3")
    off.vm.restart()
    off.write(0xC1, 5 * MIB, 65536)
    assert off.make("s4")["level"] == "incremental"
    off.check()
    manifest = off.sets.manifest(NAME, "s3")
    assert (manifest["vm"]["uuid"], manifest["consistency"]) == (uuid, "crash")
    assert manifest["consistency_reason"].startswith("the VM was off")
    assert manifest["vm"] == off.sets.manifest(NAME, "s4")["vm"]


def test_a_block_device_is_only_read(vms: Vms, sets: Sets, storage: Storage, directory: Path) -> None:
    """Its VM may run on another machine, and then whoever writes to its image ruins it."""
    device = storage.loop(2 * SIZE)
    qemu_img("create", "-q", "-f", "qcow2", device, str(SIZE))
    off = OffHistory(
        vms.start(Disk(device, file={"driver": "host_device", "filename": str(device)}), name=NAME), sets, directory
    )
    off.write(0xA1, MIB, 65536)
    off.make("s1")
    off.vm.quit()
    before = device.read_bytes()
    found = off.make("s2")
    assert found["level"] == "full"
    assert "keeps none" in off.sets.reasons(NAME, "s2")["drive0"]
    assert device.read_bytes() == before
    off.vm.restart()
    assert off.make("s3")["level"] == "full"
    off.write(0xA2, 3 * MIB, 65536)
    assert off.make("s4")["level"] == "incremental"
    off.check()


def test_only_what_has_changed_is_copied(off: OffHistory) -> None:
    first = off.make("s1")
    assert len(sent(first, "drive-backup")) == 2
    off.write(0xA1, MIB, 65536, "drive1")
    second = off.make("s2")
    [copy] = sent(second, "drive-backup")
    assert copy["device"] == "off1"
    assert off.sets.reasons(NAME, "s2") == {
        "drive0": "it has not changed since set s1",
        "drive1": "changes since set s1",
    }
    before = off.sets.manifest(NAME, "s1")["disks"][0]["bitmap"]
    assert off.sets.manifest(NAME, "s2")["disks"][0]["bitmap"] == before
    off.assert_released("s2")
    off.check()
    # And both disks go on from there.
    off.write(0xA2, 3 * MIB, 65536)
    assert off.make("s3")["level"] == "incremental"
    off.assert_released("s3")
    off.check()


def test_a_vm_that_has_not_changed_is_not_touched(off: OffHistory, directory: Path) -> None:
    off.make("s1")
    before = {path: path.stat().st_mtime_ns for path in directory.glob("source*")}
    made = off.make("s2")
    assert not made["qmp"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    off.vm.restart()
    off.write(0xA1, MIB, 65536)
    assert off.make("s3")["level"] == "incremental"
    assert off.reason("s3") == "changes since set s2"
    off.vm.quit()
    off.make("s4")
    off.make("s5", level="differential")
    off.check()


def test_the_plan_says_what_it_means(off: OffHistory) -> None:
    result = succeed("backup_plan", off.arguments("s1"))
    [vm] = result["plan"]["vms"]
    assert (vm["action"], vm["level"]) == ("start", "full")
    assert vm["reason"].endswith("it is off, and cannot be started while it is copied")
    assert not off.stored()
    everything = vm["bytes"]
    off.make("s1")
    [vm] = off.plan("s2")["vms"]
    assert vm["reason"].endswith("it is off, and has not changed")
    assert vm["bytes"] < everything / 2
    off.make("s2")
    assert off.plan("s2")["vms"][0]["action"] == "skip"
    # In check mode nothing is begun either.
    off.write(0xA1, MIB, 65536)
    before = off.stored()
    checked = succeed("backup_set", {"plan": off.plan("s3")}, check=True)
    assert checked["changed"]
    assert off.stored() == before
    assert {path.name for path in (off.sets.path / NAME).iterdir()} == {".lock", "s1", "s2"}


@pytest.mark.parametrize(("offline", "action"), [("fail", "fail"), ("skip", "skip")])
def test_other_policies_leave_it_alone(off: OffHistory, offline: str, action: str) -> None:
    [vm] = off.plan("s1", offline=offline)["vms"]
    assert vm["action"] == action


def test_raw_disks_and_disks_with_layers(vms: Vms, off: OffHistory, directory: Path) -> None:
    overlay = create(directory / "overlay.qcow2", SIZE, backing=directory / "source1.qcow2")
    raw = vms.disk(2, size=SIZE, format="raw")
    disks = [off.vm.disks[0], Disk(overlay, id="drive1", node="n1"), raw]
    off = OffHistory(vms.start(*disks, name=NAME), off.sets, directory)
    off.vm.quit()
    assert off.make("s1")["level"] == "full"
    assert off.sets.manifest(NAME, "s1")["disks"][1]["layers"] == [str(directory / "source1.qcow2")]
    off.write(0xA1, MIB, 65536, "drive1")
    off.write(0xA2, MIB, 65536, "drive2")
    off.make("s2")
    assert off.sets.levels(NAME, "s2") == {"drive0": "incremental", "drive1": "incremental", "drive2": "full"}
    off.vm.restart()
    off.write(0xA3, 2 * MIB, 65536, "drive1")
    off.make("s3")
    assert off.sets.levels(NAME, "s3") == {"drive0": "incremental", "drive1": "incremental", "drive2": "full"}
    off.check()


def test_external_snapshots_while_it_is_off(off: OffHistory, directory: Path) -> None:
    off.make("s1")
    off.write(0xA1, MIB, 65536)
    # As libvirt does: an overlay with an empty bitmap of the same name.
    bitmap = off.sets.manifest(NAME, "s1")["disks"][0]["bitmap"]
    overlay = create(directory / "overlay.qcow2", SIZE, backing=directory / "source0.qcow2")
    qemu_img("bitmap", "--add", overlay, bitmap)
    off.vm.disks[0].path = overlay
    off.entry["disks"][0]["file"] = str(overlay)
    off.write(0xA2, 3 * MIB, 65536)
    made = off.make("s2")
    assert made["level"] == "incremental"
    assert "2 layers" in off.reason("s2")
    off.check()


def test_a_bitmap_that_is_lost_makes_it_full(off: OffHistory) -> None:
    off.make("s1")
    off.vm.restart()
    off.write(0xA1, MIB, 65536)
    off.vm.kill()
    off.make("s2")
    assert off.sets.levels(NAME, "s2") == {"drive0": "full", "drive1": "full"}
    assert "is inconsistent: QEMU was not shut down cleanly" in off.reason("s2")
    off.assert_released("s2")
    off.check()


def test_quiesce_require_has_nothing_to_freeze(off: OffHistory) -> None:
    made = off.make("s1", quiesce="require")
    assert (made["consistency"], made["frozen_ms"], made["warnings"]) == ("crash", 0, [])


def test_untracked_and_cancelled(off: OffHistory) -> None:
    plan = off.start("s1")
    found = succeed("backup_set", {"repository": str(off.sets.path), "names": [NAME], "state": "cancelled"})
    assert [vm["state"] for vm in found["vms"]] == ["cancelled"]
    off.assert_released()
    off.sets.assert_absent(NAME, "s1")
    assert fail("backup_set", {"plan": plan})["vms"][0]["state"] == "cancelled"
    off.make("s2")
    found = succeed("backup_set", {"plan": off.plan("s3"), "state": "untracked"})
    assert [vm["state"] for vm in found["vms"]] == ["untracked"]
    assert not off.stored()
    assert not off.stored("drive1")
    off.make("s3")
    assert off.sets.levels(NAME, "s3") == {"drive0": "full", "drive1": "full"}


def test_a_disk_that_is_not_copied_is_held_too(off: OffHistory) -> None:
    """A VM that opened it, and then failed at the other, would lose its bitmaps."""
    off.make("s1")
    off.write(0xA1, MIB, 65536, "drive1")
    options = {"level": "full", "exclude_disks": ["drive0"]}
    off.start("s2", **options)
    off.assert_held()
    off.daemon.release()
    succeed("backup_set", {"plan": off.plan("s2", **options)})
    assert set(off.sets.levels(NAME, "s2")) == {"drive1"}
    assert identical(off.copies("s2")["drive1"], off.sets.images(NAME, "s2")["drive1"])


def test_compressed_and_limited(off: OffHistory) -> None:
    off.make("s1", compression="zstd", speed="64M")
    off.write(0xA1, MIB, 65536)
    off.make("s2", compression="zstd", checksum=True)
    off.check()


def test_how_it_is_built_is_told_by_the_set_before(off: OffHistory) -> None:
    off.make("s1")
    off.vm.restart()
    off.make("s2")
    off.vm.quit()
    off.write(0xA1, MIB, 65536)
    off.make("s3")
    first, second, third = (
        json.loads((off.sets.path / NAME / each / "vm.json").read_text()) for each in ("s1", "s2", "s3")
    )
    assert (first["command_line"], [disk["file"] for disk in first["disks"]]) == (
        None,
        [str(disk.path) for disk in off.vm.disks],
    )
    assert second["command_line"]
    assert third == second
