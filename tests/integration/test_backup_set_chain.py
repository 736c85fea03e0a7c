# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and chains: every set holds what the guest's disks held at its moment, whatever has happened since."""

from __future__ import annotations

import json
import shutil
import typing as t
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, sent, snapshot, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.history import History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qmp, faulty, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

SIZE = 8 * MIB
# After its first pieces QEMU waits for minutes, so that a job with more to copy is there until it is let go.
SLOW = "64K"
UUID = "4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e"


@pytest.fixture
def sets(directory: Path) -> Sets:
    return Sets(directory / "repository")


@pytest.fixture
def history(vms: Vms, sets: Sets, directory: Path) -> History:
    """A VM of one disk of 8 MiB, `drive0`, node `n0`, without a set."""
    return History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)


def reopened(vms: Vms, history: History, *disks: Disk, **options: t.Any) -> Qemu:
    """The VM of a history ends in order, and another QEMU with these disks takes its place."""
    if history.vm.alive:
        history.vm.quit()
    history.vm = vms.start(*disks, name="web01", **options)
    return history.vm


def run(vm: Qemu) -> None:
    """Let a paused VM run for a moment: QEMU 7.2 closes files that were passed to it only then."""
    vm.qmp.execute("cont")
    # And when a monitor is let go.
    Qmp(vm.monitor).close()
    vm.qmp.execute("stop")


def merge(vm: Qemu, into: str) -> None:
    """Commit the layers above a node into it, and go on with it."""
    vm.qmp.execute("block-commit", job_id="merge", device="drive0", base_node=into)
    wait_until(lambda: vm.job["ready"], "the merge")
    vm.qmp.execute("block-job-complete", device="merge")
    wait_until(lambda: not vm.block_jobs, "the end of the merge")


def overwrite(vm: Qemu, pattern: int, disk: str = "drive0") -> None:
    """Change half of a disk of 8 MiB: more than QEMU copies at one go."""
    for at in range(4):
        vm.write(disk, pattern + at, 2 * at * MIB, MIB)


def test_case_36_each_set_holds_what_there_was_then(history: History, sets: Sets) -> None:
    vm = history.vm
    assert history.back_up("s1") == "full"
    assert history.bitmaps() == history.recorded("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "incremental"
    assert history.bitmaps() == history.recorded("s2")
    vm.write("drive0", 0xB1, MIB + 4096, 65536)
    vm.write("drive0", 0xB2, 7 * MIB, 512)
    assert history.back_up("s3") == "incremental"
    assert history.reason("s3") == "changes since set s2"
    # Nothing has changed since.
    assert history.back_up("s4") == "incremental"
    assert history.bitmaps() == history.recorded("s4")
    history.check()
    sizes = [
        path.stat().st_size for set_id in ("s1", "s2", "s3", "s4") for path in sets.images("web01", set_id).values()
    ]
    assert sizes[0] > 4 * MIB > MIB > max(sizes[1:])
    [image] = sets.images("web01", "s3").values()
    assert info(image)["backing-filename"] == "../s2/drive0.qcow2"
    assert [sets.manifest("web01", set_id)["disks"][0]["parent"] for set_id in ("s1", "s3")] == [
        None,
        {
            "id": "s2",
            "sha256": sets.manifest("web01", "s2")["disks"][0]["sha256"],
            "attempt": sets.manifest("web01", "s2")["attempt"],
        },
    ]


def test_case_3_a_second_run_of_an_increment_changes_nothing(history: History, sets: Sets) -> None:
    history.back_up("s1")
    history.back_up("s2")
    before = snapshot(sets.path), history.bitmaps()
    again = sets.back_up(history.vm, id="s2")
    assert (again["changed"], again["qmp"]) == (False, [])
    assert result_of(again, "web01")["level"] == "incremental"
    assert (snapshot(sets.path), history.bitmaps()) == before


def test_case_36_writes_while_an_increment_is_copied_are_in_the_next(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    history.freeze("s2")
    plan = sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xB1, 6 * MIB + 65536, 65536)
    vm.write("drive0", 0xB2, 7 * MIB, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert history.note("s2") == {"drive0": "incremental"}
    assert [bitmap["count"] for bitmap in vm.bitmaps("n0").values()] == [2 * 65536]
    assert history.back_up("s3") == "incremental"
    history.check()


def test_case_37_zeroed_and_discarded_blocks_read_as_zeroes(history: History, sets: Sets, directory: Path) -> None:
    vm = history.vm
    # A disk that gives discarded blocks back to its file system.
    path = create(directory / "thin.qcow2", SIZE)
    write(path, f"write -P 7 0 {SIZE}")
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="thin", discard="unmap", file=file)
    vm.disks = (*vm.disks, Disk(path, id=None, node="thin"))
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, MIB)
    history.back_up("s2")
    # In what the full has, in what the increment has, and in what is a hole anyhow.
    for command in ("write -z 0 128k", "write -z -u 1M 256k", "discard 1280k 128k", "write -z 512k 64k"):
        vm.io("drive0", command)
    vm.io("thin", "discard 2M 1M")
    vm.io("thin", "write -z -u 4M 1M")
    assert history.back_up("s3") == "incremental"
    history.check()
    # What they read as then, they read as for ever: nothing of the full shines through.
    vm.write("drive0", 0xC1, 0, 65536)
    assert history.back_up("s4") == "incremental"
    history.check()
    assert "read 131072/131072" in vm.io("thin", "read -P 0 2M 128k")
    assert sets.images("web01", "s3")["thin"].stat().st_size < MIB


def test_case_38_a_clean_restart_goes_on_with_the_chain(vms: Vms, sets: Sets, directory: Path) -> None:
    raw = vms.disk(1, size=SIZE, format="raw")
    history = History(vms.start(vms.disk(size=SIZE), raw, name="web01"), sets, directory)
    vm = history.vm
    history.back_up("s1")
    for disk in ("drive0", "drive1"):
        vm.write(disk, 0xA1, MIB, 65536)
    # A raw image keeps no bitmap, but while its QEMU lives there is one.
    assert history.back_up("s2") == "incremental"
    assert history.note("s2") == {"drive0": "incremental", "drive1": "incremental"}
    vm.write("drive0", 0xB1, 2 * MIB, 65536)
    vm.write("drive1", 0xB1, 2 * MIB, 65536)
    vm.quit()
    # Written to while the VM is off, by something that knows of bitmaps.
    assert vm.disks[0].path
    write(vm.disks[0].path, "write -P 0xC1 3M 64k")
    vm.restart()
    vm.write("drive0", 0xD1, 4 * MIB, 65536)
    history.back_up("s3")
    assert history.note("s3") == {"drive0": "incremental", "drive1": "full"}
    assert "a disk like this one (raw) keeps none when QEMU ends" in history.reason("s3", "drive1")
    vm.write("drive1", 0xD1, 5 * MIB, 65536)
    assert history.back_up("s4") == "incremental"
    assert history.note("s4")["drive1"] == "incremental"
    history.check()


@pytest.mark.parametrize("stored", [False, True])
def test_case_39_qemu_killed_between_sets(history: History, stored: bool) -> None:
    vm = history.vm
    history.back_up("s1")
    if stored:
        vm.quit()
        vm.restart()
    vm.write("drive0", 0xA1, MIB, 65536)
    vm.io("drive0", "flush")
    vm.kill()
    vm.restart()
    assert history.back_up("s2") == "full"
    assert ("is inconsistent" if stored else "is gone") in history.reason("s2")
    assert history.bitmaps() == history.recorded("s2")
    vm.write("drive0", 0xB1, MIB, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()


def test_case_40_bitmaps_removed_and_disabled_by_hand(history: History) -> None:
    vm = history.vm
    history.back_up("s1")
    vm.qmp.execute("block-dirty-bitmap-remove", node="n0", name=history.bitmaps()["n0"][0])
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "full"
    assert "is gone" in history.reason("s2")
    vm.qmp.execute("block-dirty-bitmap-disable", node="n0", name=history.bitmaps()["n0"][0])
    vm.write("drive0", 0xB1, 2 * MIB, 65536)
    assert history.back_up("s3") == "full"
    assert "is disabled" in history.reason("s3")
    assert history.bitmaps() == history.recorded("s3")
    assert history.back_up("s4") == "incremental"
    history.check()


def test_case_41_bitmaps_of_others_are_left_alone(history: History) -> None:
    vm = history.vm
    others = {"backup-of-somebody": 0, "vmfleet-00000000-0123456789abcdef": 0}
    for name in others:
        vm.qmp.execute("block-dirty-bitmap-add", node="n0", name=name, persistent=True)
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "incremental"
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()
    counts = {name: bitmap["count"] for name, bitmap in vm.bitmaps("n0").items() if name in others}
    assert counts == dict.fromkeys(others, 2 * 65536)
    assert len(vm.bitmaps("n0")) == 3


def test_case_41_two_repositories_for_one_vm(vms: Vms, sets: Sets, directory: Path) -> None:
    vm = vms.start(vms.disk(size=SIZE), name="web01")
    near, far = History(vm, sets, directory), History(vm, Sets(directory / "far"), directory)
    near.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    far.back_up("s1")
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    assert near.back_up("s2") == "incremental"
    vm.write("drive0", 0xA3, 3 * MIB, 65536)
    assert far.back_up("s2") == "incremental"
    # At the same time: the second one is told to wait, and nothing happens to the first.
    overwrite(vm, 0xA4)
    near.freeze("s3")
    plan = sets.start(vm, id="s3", speed=SLOW)
    bitmaps = set(vm.bitmaps("n0"))
    assert "busy: job vmfleet." in far.sets.fail(vm, id="s3")["msg"]
    assert set(vm.bitmaps("n0")) == bitmaps
    vm.write("drive0", 0xA9, 4 * MIB, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert near.note("s3") == {"drive0": "incremental"}
    assert far.back_up("s3") == "incremental"
    assert near.back_up("s4") == "incremental"
    near.check()
    far.check()
    assert near.bitmaps() == near.recorded("s4")
    assert far.bitmaps() == far.recorded("s3")
    # Both records, and not a third.
    assert len(vm.bitmaps("n0")) == 2
    # One repository's end is not the other's.
    untracked = {"repository": str(sets.path), "names": ["web01"], "state": "untracked"}
    assert succeed("backup_set", untracked)["changed"] is True
    assert (near.bitmaps(), far.bitmaps()) == ({}, far.recorded("s3"))


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


def test_case_45_what_a_dead_run_left_is_removed_by_hand(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xA8, 3 * MIB, 65536)
    shutil.rmtree(sets.path / "web01" / ".s2.staging")
    vm.write("drive0", 0xA3, 4 * MIB, 65536)
    # The dead run's job has the record in its hands when this one looks: any doubt means a full image.
    assert history.back_up("s3") == "full"
    assert "is in use by another operation" in history.reason("s3")
    assert history.bitmaps() == history.recorded("s3")
    vm.write("drive0", 0xA4, 5 * MIB, 65536)
    assert history.back_up("s4") == "incremental"
    history.check()


def test_case_50_a_long_chain_whose_ids_and_clocks_say_nothing(history: History, sets: Sets) -> None:
    vm = history.vm
    ids = ["zulu", "2026-01-02", "2026-01-01", "s10", "s9", "b", "B2", "a.failed.json", "c.staging", "d.new", "1", "0"]
    for number, set_id in enumerate(ids):
        vm.write("drive0", 0x10 + number, number * 512 * 1024, 65536)
        assert history.back_up(set_id) == ("incremental" if number else "full")
        manifest = sets.path / "web01" / set_id / "manifest.json"
        # As if the clock had been set back by a year before each of the next sets.
        said = {**json.loads(manifest.read_text()), "started": f"{2040 - number}-01-01T00:00:00Z"}
        said["finished"] = said["started"]
        manifest.unlink()
        manifest.write_text(json.dumps(said))
    assert [sets.manifest("web01", set_id)["sequence"] for set_id in ids] == list(range(1, 13))
    parents = [sets.manifest("web01", set_id)["disks"][0]["parent"] for set_id in ids]
    assert [parent and parent["id"] for parent in parents] == [None, *ids[:-1]]
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
    run(vm)
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
    run(vm)
    for set_id, frozen in copies.items():
        level = "full" if set_id == "s0" else "incremental"
        sets.assert_good("web01", frozen, set_id, dict.fromkeys(frozen, level))


def test_disks_swapped_at_a_restart(vms: Vms, sets: Sets, directory: Path) -> None:
    one, other = vms.disk(0, size=SIZE), vms.disk(1, size=SIZE)
    history = History(vms.start(one, other, name="web01"), sets, directory)
    history.back_up("s1")
    for disk in ("drive0", "drive1"):
        history.vm.write(disk, 0xA1, MIB, 65536)
    vm = reopened(vms, history, replace(one, path=other.path), replace(other, path=one.path))
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


@pytest.mark.parametrize("compression", ["zstd", "zlib"])
def test_case_53_compressed_increments(history: History, sets: Sets, compression: str) -> None:
    vm = history.vm
    history.back_up("s1", compression=compression)
    vm.write("drive0", 0xA1, MIB, MIB)
    vm.io("drive0", "write -z 0 128k")
    assert history.back_up("s2", compression=compression) == "incremental"
    # A chain may be of both sorts.
    vm.write("drive0", 0xA2, MIB + 4096, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()
    [image] = sets.images("web01", "s2").values()
    assert info(image)["format-specific"]["data"]["compression-type"] == compression
    assert image.stat().st_size < 512 * 1024


def test_without_checksums(vms: Vms, sets: Sets, directory: Path) -> None:
    vm = vms.start(vms.disk(size=SIZE), name="web01")
    copies = {}
    for number in range(3):
        vm.write("drive0", 0xA1 + number, number * MIB, 65536)
        copies[f"s{number}"] = vm.freeze(vm.disks[0], directory / f"frozen-{number}.qcow2")
        sets.back_up(vm, id=f"s{number}", checksum=False)
    for set_id, copy in copies.items():
        assert identical(copy, sets.images("web01", set_id)["drive0"])
    newest = sets.manifest("web01", "s2")["disks"][0]
    assert (newest["level"], newest["sha256"], newest["parent"]["sha256"]) == ("incremental", None, None)
    assert newest["parent"]["attempt"] == sets.manifest("web01", "s1")["attempt"]


def test_case_26_a_cancelled_increment_loses_nothing(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    plan = sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xA8, 3 * MIB, 65536)
    vm.qmp.execute("block-job-cancel", device=vm.job["device"])
    assert "cancelled from outside" in fail("backup_set", {"plan": plan})["msg"]
    assert history.bitmaps() == history.recorded("s1")
    # Once more, cancelled in order, and under another id.
    sets.start(vm, id="s3", speed=SLOW)
    vm.write("drive0", 0xA3, 4 * MIB, 65536)
    cancel = {"repository": str(sets.path), "names": ["web01"], "state": "cancelled"}
    assert succeed("backup_set", cancel)["vms"][0]["state"] == "cancelled"
    assert history.bitmaps() == history.recorded("s1")
    assert history.back_up("s2") == "incremental"
    assert history.reason("s2") == "changes since set s1"
    sets.back_up(vm, id="s3")
    assert history.bitmaps() == history.recorded("s3")


def test_case_21_one_disk_fails_and_neither_advances(vms: Vms, sets: Sets, directory: Path) -> None:
    one, other = vms.disk(0, size=SIZE), vms.disk(1, size=SIZE)
    history = History(vms.start(one, other, name="web01"), sets, directory)
    history.back_up("s1")
    before = history.bitmaps()
    for disk in ("drive0", "drive1"):
        overwrite(history.vm, 0xA1, disk)
    history.vm.quit()
    assert other.path
    # What is in the first changed cluster of drive1 cannot be read.
    place = json.loads(qemu_img("map", "--output=json", other.path))[0]["offset"]
    vm = reopened(vms, history, one, replace(other, file=faulty(other.path, "read_aio", sector=place // 512)))
    failed = sets.fail(vm, id="s2", speed="1M")
    assert "disk drive1: Input/output error" in failed["msg"]
    assert "block-job-cancel" in [command["execute"] for command in failed["qmp"]]
    assert sorted(path.name for path in sets.directory("web01").iterdir()) == [".lock", ".s2.failed.json", "s1"]
    assert vm.block_jobs == []
    assert history.bitmaps() == before
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    vm = reopened(vms, history, one, other)
    vm.write("drive1", 0xA3, 3 * MIB, 65536)
    history.back_up("s2")
    assert history.note("s2") == {"drive0": "incremental", "drive1": "incremental"}
    history.check()


def test_case_21_a_disk_that_was_through_loses_nothing_either(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name="web01"), sets, directory)
    vm = history.vm
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    overwrite(vm, 0xA1, "drive1")
    plan = sets.start(vm, id="s2", speed=SLOW)

    def running() -> list[str]:
        return [job["device"] for job in vm.block_jobs if job["status"] != "concluded"]

    [last] = wait_until(lambda: running() if len(running()) == 1 else [], "the end of the shorter copy")
    vm.qmp.execute("block-job-cancel", device=last)
    assert "cancelled from outside" in fail("backup_set", {"plan": plan})["msg"]
    history.back_up("s2")
    assert history.note("s2") == {"drive0": "incremental", "drive1": "incremental"}
    history.check()


def test_a_set_that_is_there_is_asked_for_while_the_next_is_made(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    history.freeze("s2")
    plan = sets.start(vm, id="s2", speed=SLOW)
    bitmaps, jobs = set(vm.bitmaps("n0")), [job["device"] for job in vm.block_jobs]
    again = sets.back_up(vm, id="s1")
    assert (again["changed"], again["qmp"]) == (False, [])
    assert (set(vm.bitmaps("n0")), [job["device"] for job in vm.block_jobs]) == (bitmaps, jobs)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert history.note("s2") == {"drive0": "incremental"}
    assert history.back_up("s3") == "incremental"
    history.check()


def test_an_image_that_is_replaced_while_it_is_copied(history: History, sets: Sets) -> None:
    history.back_up("s1")
    overwrite(history.vm, 0xA1)
    plan = sets.start(history.vm, id="s2", speed=SLOW)
    image = sets.path / "web01" / ".s2.staging" / "drive0.qcow2"
    shutil.copyfile(image, image.with_name("copy"))
    image.with_name("copy").rename(image)
    release(history.vm)
    assert "is not the file that the backup was started with" in fail("backup_set", {"plan": plan})["msg"]
    assert history.back_up("s2") == "incremental"
    history.check()


def test_case_18_a_full_repository_fails_the_increment_only(
    vms: Vms, sets: Sets, directory: Path, storage: Storage
) -> None:
    small = storage.mount("tmpfs", 10 * MIB)
    sets = Sets(small.path / "repository")
    history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
    history.back_up("s1")
    for at in range(4):
        history.vm.write("drive0", 0xA1, at * 2 * MIB, MIB + 65536)
    small.fill(leave=2 * MIB)
    assert "not enough space" in sets.fail(history.vm, id="s2")["msg"]
    assert history.bitmaps() == history.recorded("s1")
    small.clear()
    history.vm.write("drive0", 0xA2, MIB + 65536, 65536)
    assert run_module("backup_plan", sets.arguments(history.vm, id="s2"))["plan"]["vms"][0]["action"] == "fail"
    small.grow(64 * MIB)
    assert history.back_up("s2") == "incremental"
    history.check()


def test_vm_json_says_how_the_vm_was_built(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUID), sets, directory)
    history.back_up("s1")
    history.back_up("s2")
    told = [json.loads((sets.path / "web01" / set_id / "vm.json").read_text()) for set_id in ("s1", "s2")]
    assert told[0]["uuid"] == UUID
    command = told[0]["command_line"]
    assert command[command.index("-uuid") + 1] == UUID
    assert f"file.filename={history.vm.disks[0].path}" in " ".join(command)
    assert told[0]["qemu"] == sets.manifest("web01", "s1")["qemu"]


def test_started_here_and_completed_there(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    history.freeze("s2")
    planned = sets.plan(vm, id="s2", speed=SLOW)["plan"]
    started = succeed("backup_set", {"plan": planned, "state": "started"})
    assert result_of(started, "web01")["level"] == "incremental"
    assert sent(started, "drive-backup")[0]["bitmap-mode"] == "never"
    # From another process, which has a plan of its own or none.
    again = succeed("backup_set", {"plan": planned, "state": "started"})
    assert (again["changed"], result_of(again, "web01")["state"]) == (False, "running")
    release(vm)
    wait_concluded(vm)
    attached = sets.plan(vm, id="s2")["plan"]
    assert [(found["action"], found["level"]) for found in attached["vms"]] == [("attach", "incremental")]
    done = succeed("backup_set", {"plan": attached})
    assert result_of(done, "web01")["disks"][0]["reason"] == "changes since set s1"
    assert history.note("s2") == {"drive0": "incremental"}
    assert history.back_up("s3") == "incremental"
    history.check()
