# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_plan and backup_set: which level an image gets, what is said of it, and which bitmaps are kept for that."""

from __future__ import annotations

import os
import shutil
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import LONGEST_NAME
from ansible_collections.vmfleet.backup.tests.harness.backup import release, sent, snapshot
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, run_for_a_moment, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")


def planned(history: History, set_id: str, **options: t.Any) -> dict[str, t.Any]:
    """What backup_plan says of the VM."""
    [found] = history.sets.plan(history.vm, id=set_id, **options)["plan"]["vms"]
    return dict(found)


def test_a_differential_builds_on_the_newest_full_of_each_disk(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
    vm = history.vm
    assert history.back_up("s1", level="differential") == "full"
    assert history.reason("s1") == "it is the VM's first set"
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2", level="differential") == "differential"
    # A disk that comes later has another full.
    path = create(directory / "added.qcow2", SIZE)
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="added", file={"driver": "file", "filename": str(path)})
    vm.disks = (*vm.disks, Disk(path, id=None, node="added"))
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    assert history.back_up("s3", level="differential") == "differential"
    assert history.note("s3") == {"drive0": "differential", "added": "full"}
    assert history.reason("s3", "added") == "no set holds it in full"
    vm.write("drive0", 0xA3, 3 * MIB, 65536)
    vm.write("added", 0xA3, 3 * MIB, 65536)
    history.back_up("s4", level="differential")
    parents = {disk["name"]: disk["parent"]["id"] for disk in sets.manifest("web01", "s4")["disks"]}
    assert parents == {"drive0": "s1", "added": "s3"}
    # The bitmaps of the newest set for increments, those of the fulls for differentials.
    kept = {node: sorted(names) for node, names in history.bitmaps().items()}
    assert kept == {
        "n0": sorted(history.recorded("s1")["n0"] + history.recorded("s4")["n0"]),
        "added": sorted(history.recorded("s3")["added"] + history.recorded("s4")["added"]),
    }
    # An increment on a differential; the fulls' bitmaps go with the wish for differentials.
    vm.write("drive0", 0xA4, 4 * MIB, 65536)
    assert history.back_up("s5") == "incremental"
    assert history.reason("s5") == "changes since set s4"
    assert history.bitmaps() == history.recorded("s5")
    history.back_up("s6", level="differential")
    assert history.note("s6") == {"drive0": "full", "added": "full"}
    assert "is gone: set s5 was incremental" in history.reason("s6")
    history.check()


def test_a_differential_survives_the_loss_of_another(history: History, sets: Sets) -> None:
    for number in range(3):
        history.vm.write("drive0", 0xA1, number * MIB, 65536)
        history.back_up(f"s{number}", level="differential")
    next(iter(sets.images("web01", "s1").values())).unlink()
    history.vm.write("drive0", 0xA1, 5 * MIB, 65536)
    assert history.back_up("s3", level="differential") == "differential"
    for set_id in ("s2", "s3"):
        assert identical(history.copies(set_id)["drive0"], sets.images("web01", set_id)["drive0"])


def test_max_chain(history: History) -> None:
    levels = []
    for number in range(7):
        history.vm.write("drive0", 0xA1 + number, number * MIB, 65536)
        levels.append(history.back_up(f"s{number}", max_chain=3))
    assert levels == ["full", "incremental", "incremental"] * 2 + ["full"]
    assert history.reason("s3") == "its chain has 3 images (max_chain is 3)"
    history.check()
    assert planned(history, "s7", max_chain=1)["level"] == "full"
    assert "max_chain" in fail("backup_plan", history.sets.arguments(history.vm, max_chain=0))["msg"]


def test_the_longest_names_that_a_chain_may_have_can_be_opened(directory: Path) -> None:
    """QEMU puts the names of backing files together, one ../ after the other, until the path is too long for it."""
    name = "d" * 58 + ".qcow2"
    below = create(directory / "full.qcow2", MIB)
    total = 0
    while total + len(f"../{total:064}/{name}") <= LONGEST_NAME:
        image = directory / f"{total:064}" / name
        image.parent.mkdir()
        total += len(f"../{image.parent.name}/{name}")
        backing = f"../{below.parent.name}/{below.name}" if below.parent != directory else str(below)
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", image, str(MIB))
        below = image
    assert total > LONGEST_NAME - 200
    assert identical(directory / "full.qcow2", below)


def test_a_full_in_the_middle_of_a_chain(history: History) -> None:
    levels = {}
    for number, level in enumerate(("auto", "incremental", "full", "incremental", "auto")):
        history.vm.write("drive0", 0xA1 + number, number * MIB, 65536)
        levels[level, number] = history.back_up(f"s{number}", level=level)
    assert list(levels.values()) == ["full", "incremental", "full", "incremental", "incremental"]
    assert history.reason("s2") == "a full image is asked for"
    assert history.reason("s3") == "changes since set s2"
    history.check()


def test_a_set_of_another_level_is_said_and_not_made_anew(history: History, sets: Sets) -> None:
    history.back_up("s1")
    history.back_up("s2")
    for level, said in (("full", True), ("differential", True), ("incremental", False), ("auto", False)):
        again = sets.back_up(history.vm, id="s2", level=level)
        assert again["changed"] is False
        found = [warning for warning in again["warnings"] if "the set is incremental and stays so" in warning]
        assert len(found) == said
    # A full one serves whatever is asked for.
    assert sets.back_up(history.vm, id="s1", level="differential")["warnings"] == []
    history.check()


def test_without_tracking(history: History, sets: Sets) -> None:
    history.back_up("s1")
    assert history.back_up("s2", tracking=False) == "full"
    assert history.reason("s2") == "changes are not tracked"
    # Neither a new one nor an old one, which would keep internal snapshots from being loaded.
    assert history.vm.bitmaps("n0") == {}
    assert sets.manifest("web01", "s2")["disks"][0]["bitmap"] is None
    assert history.back_up("s3") == "full"
    assert history.reason("s3") == "set s2 was made without a record of the changes after it"
    assert history.back_up("s4") == "incremental"
    history.check()


def test_a_vms_own_level_replaces_the_general_one(vms: Vms, sets: Sets, directory: Path) -> None:
    histories = [
        History(vms.start(vms.disk(number, size=SIZE), name=f"vm{number}"), sets, directory, f"vm{number}")
        for number in range(3)
    ]
    own = ("full", "differential", None)
    listed = [
        {"monitor": str(history.vm.monitor), **({"level": level} if level else {})}
        for history, level in zip(histories, own, strict=True)
    ]
    for set_id in ("s1", "s2", "s3"):
        sets.back_up(vms=listed, id=set_id, level="incremental")
    found = [sets.manifest(history.name, "s3")["level"] for history in histories]
    assert found == ["full", "differential", "incremental"]
    assert sets.manifest("vm1", "s3")["disks"][0]["parent"]["id"] == "s1"


DAMAGES: dict[str, tuple[t.Callable[[Path], object], str]] = {
    "missing": (lambda image: image.unlink(), "is missing"),
    "truncated": (lambda image: os.truncate(image, MIB), "is not the file"),
    "elsewhere": (lambda image: image.rename(image.with_name("x")).with_name("drive0.qcow2").symlink_to("x"), "is not"),
}


@pytest.mark.parametrize("victim", ["s1", "s2"])
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_chain_is_not_built_upon(
    history: History, sets: Sets, damage: t.Callable[[Path], object], said: str, victim: str
) -> None:
    history.back_up("s1")
    history.vm.write("drive0", 0xA1, MIB, 65536)
    history.back_up("s2")
    image = sets.images("web01", victim)["drive0"]
    damage(image)
    assert planned(history, "s3")["disks"][0]["level"] == "full"
    history.back_up("s3")
    assert f"image {image} {said}" in history.reason("s3")
    assert history.back_up("s4") == "incremental"
    for set_id in ("s3", "s4"):
        assert identical(history.copies(set_id)["drive0"], sets.images("web01", set_id)["drive0"])


def test_a_parent_that_goes_while_its_increment_is_made(history: History, sets: Sets, directory: Path) -> None:
    vm = history.vm
    for number in range(2):
        history.back_up(f"s{number}")
        for at in range(4):
            vm.write("drive0", 0xA1 + at, 2 * at * MIB, MIB)
    for victim in ("s0", "s1"):
        plan = sets.start(vm, id="s2", speed="64K")
        (sets.path / "web01" / victim).rename(directory / victim)
        release(vm)
        assert (
            "set s1, which the increment of disk drive0 builds on, was removed"
            in fail("backup_set", {"plan": plan})["msg"]
        )
        assert not (sets.path / "web01" / "s2").exists()
        (directory / victim).rename(sets.path / "web01" / victim)
    # It is as if nothing had been tried.
    assert history.back_up("s2") == "incremental"
    history.check()


def test_parents_that_are_gone_or_others(history: History, sets: Sets, directory: Path) -> None:
    history.back_up("s1")
    history.vm.write("drive0", 0xA1, MIB, 65536)
    history.back_up("s2")
    one = sets.path / "web01" / "s1"
    # Somebody has removed the full below an increment...
    one.rename(directory / "s1")
    assert "set s1, which s2 builds on, is gone" in planned(history, "s3")["disks"][0]["reason"]
    # ...or the newest set, and with it all that was recorded since.
    (directory / "s1").rename(one)
    (sets.path / "web01" / "s2").rename(directory / "s2")
    assert "is gone" in planned(history, "s3")["disks"][0]["reason"]
    (directory / "s2").rename(sets.path / "web01" / "s2")
    assert planned(history, "s3")["disks"][0]["level"] == "incremental"
    # One of the same id has taken its place: that is another one, whatever it holds.
    one.rename(directory / "s1")
    other = Sets(directory / "other")
    other.back_up(history.vm, id="s1")
    shutil.copytree(other.path / "web01" / "s1", one)
    assert "set s1 is not the one that s2 builds on" in planned(history, "s3")["disks"][0]["reason"]
    assert history.back_up("s3") == "full"
    assert identical(history.copies("s3")["drive0"], sets.images("web01", "s3")["drive0"])


def test_a_disk_without_a_lasting_name_is_always_full(vms: Vms, sets: Sets, directory: Path) -> None:
    vm = vms.start(
        vms.disk(size=SIZE, id=None, device="virtio-blk-pci"), name="web01", machine="q35,accel=tcg", paused=True
    )
    # Moved to another image, whose node nobody has named, below a device that has no id either.
    moved = str(directory / "moved.qcow2")
    vm.qmp.execute("drive-mirror", job_id="move", device="n0", target=moved, sync="full", format="qcow2")
    wait_until(lambda: vm.job["ready"], "the mirror")
    vm.qmp.execute("block-job-complete", device="move")
    wait_until(lambda: not vm.block_jobs, "the end of the move")
    vm.qmp.execute("blockdev-del", node_name="n0")
    for set_id in ("s1", "s2"):
        sets.back_up(vm, id=set_id)
        assert sets.levels("web01", set_id) == {"disk0": "full"}
        assert "its name changes when QEMU restarts" in sets.reasons("web01", set_id)["disk0"]
        assert sets.manifest("web01", set_id)["disks"][0]["bitmap"] is None
    run_for_a_moment(vm)
    assert all(not node.get("dirty-bitmaps") for node in vm.qmp.execute("query-named-block-nodes"))


def test_disks_of_one_name_are_refused_by_name(vms: Vms, sets: Sets) -> None:
    twins = [vms.disk(0, size=SIZE, id=None, node="vda")]
    twins += [vms.disk(1, size=SIZE, id=None, device="virtio-blk-pci,id=vda")]
    vm = vms.start(*twins, name="web01", machine="q35,accel=tcg", paused=True)
    assert "several disks of VM web01 are called vda (nodes n1, vda)" in sets.fail(vm)["msg"]
    sets.back_up(vm, exclude_disks=["n1"])
    assert sets.levels("web01") == {"vda": "full"}
    run_for_a_moment(vm)


def test_a_read_only_disk_is_always_full(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(size=SIZE, read_only=True), name="web01"), sets, directory)
    for set_id in ("s1", "s2"):
        assert history.back_up(set_id, include_disks=["drive0"]) == "full"
    assert "without a record" in history.reason("s2")
    assert history.vm.bitmaps("n0") == {}
    history.check()
    # Left out where nobody names it: a VM without any other disk has no set.
    assert result_of(sets.back_up(history.vm, id="s3"), "web01")["state"] == "skipped"


def test_a_disk_that_was_left_out_for_once(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name="web01"), sets, directory)
    history.back_up("s1")
    history.vm.write("drive1", 0xA1, MIB, 65536)
    history.back_up("s2", "drive0", exclude_disks=["drive1"])
    assert list(history.bitmaps()) == ["n0"]
    history.back_up("s3")
    assert history.note("s3") == {"drive0": "incremental", "drive1": "full"}
    history.check()


def test_plan_result_and_diff_name_level_and_reason(history: History, sets: Sets) -> None:
    vm = history.vm
    first = sets.plan(vm, id="s1")
    assert any("drive0: full, about " in line and "it is the VM's first set" in line for line in first["text"])
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    before = snapshot(sets.path), vm.bitmaps("n0")
    plan = run_module("backup_plan", sets.arguments(vm, id="s2"), check=True, diff=True)
    [said] = [line for line in plan["text"] if "drive0" in line]
    assert "drive0: incremental, about " in said
    assert said.endswith(": changes since set s1")
    assert said in plan["diff"]["after"]
    [disk] = plan["plan"]["vms"][0]["disks"]
    assert (disk["level"], disk["parent"], disk["target"]) == ("incremental", "s1", "drive0.qcow2")
    # About the 64 KiB that have changed, and not the 4 MiB that the full took.
    assert 65536 <= disk["bytes"] < 3 * MIB < planned(history, "s2", level="full")["disks"][0]["bytes"]
    for state in ("started", "completed"):
        predicted = run_module("backup_set", {"plan": plan["plan"], "state": state}, check=True, diff=True)
        assert predicted["changed"] is True
        assert result_of(predicted, "web01")["level"] == "incremental"
        assert predicted["qmp"] == []
    assert (snapshot(sets.path), vm.bitmaps("n0")) == before
    result = succeed("backup_set", {"plan": plan["plan"]}, diff=True)
    [found] = result_of(result, "web01")["disks"]
    assert (found["level"], found["reason"], found["parent"]) == ("incremental", "changes since set s1", "s1")
    assert any("web01" in line and "incremental" in line for line in result["text"])
    assert result["diff"]["after"] == "web01/s2: published\n"


def test_what_has_changed_since_the_plan_makes_it_safer_never_bolder(history: History, sets: Sets) -> None:
    vm = history.vm
    early = sets.plan(vm, id="s2")["plan"]
    history.back_up("s1")
    # By now it could be an increment, but that is not what somebody has agreed to.
    history.freeze("s2")
    result = succeed("backup_set", {"plan": early})
    assert result_of(result, "web01")["level"] == "full"
    assert result["warnings"] == []
    assert history.note("s2") == {"drive0": "full"}
    # An increment has become a full, and that is said.
    plan = sets.plan(vm, id="s3")["plan"]
    assert plan["vms"][0]["level"] == "incremental"
    vm.qmp.execute("block-dirty-bitmap-remove", node="n0", name=history.bitmaps()["n0"][0])
    history.freeze("s3")
    result = succeed("backup_set", {"plan": plan})
    [warning] = result_of(result, "web01")["warnings"]
    assert warning.startswith("disk drive0 is full instead of incremental: the record of the changes since set s2")
    assert any(warning in said for said in result["warnings"])
    assert history.note("s3") == {"drive0": "full"}
    history.check()


def test_an_increment_is_one_transaction_by_node_names(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name="web01"), sets, directory)
    history.back_up("s1")
    result = sets.back_up(history.vm, id="s2")
    assert [command["execute"] for command in result["qmp"]].count("transaction") == 2
    starts = {start["device"]: start for start in sent(result, "drive-backup")}
    assert {node: start["bitmap"] for node, start in starts.items()} == {
        node: names[0] for node, names in history.recorded("s1").items()
    }
    assert {(start["sync"], start["bitmap-mode"]) for start in starts.values()} == {("bitmap", "never")}
    added = {bitmap["node"]: [bitmap["name"]] for bitmap in sent(result, "block-dirty-bitmap-add")}
    assert added == history.recorded("s2") == history.bitmaps()
    removed = {bitmap["node"]: [bitmap["name"]] for bitmap in sent(result, "block-dirty-bitmap-remove")}
    assert removed == history.recorded("s1")
    # Nothing is ever cleared.
    assert "clear" not in str(result["qmp"])
