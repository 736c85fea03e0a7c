# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set on disks with external snapshots, as libvirt takes them and as QEMU alone does: no write is missed."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness import snapshots
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")


class Layers:
    """A VM of one disk, `drive0`, with a set `s0`, and its external snapshots. Each write is somewhere of its own."""

    def __init__(self, history: History, directory: Path) -> None:
        self.history = history
        self.below: list[Disk] = []
        self._directory = directory
        self._writes = 0
        history.back_up("s0")

    @property
    def vm(self) -> Qemu:
        return self.history.vm

    @property
    def disk(self) -> Disk:
        return self.vm.disks[0]

    @property
    def nodes(self) -> list[str]:
        """The nodes of the layers, the active one first."""
        paths = [disk.path for disk in (self.disk, *reversed(self.below))]
        return [snapshots.node_of(self.vm, path) for path in paths if path]

    def write(self) -> None:
        """The guest writes."""
        self._writes += 1
        self.vm.write("drive0", self._writes, self._writes * 128 * 1024, 65536)

    def snapshot(self, like_libvirt: bool = True) -> None:
        """Somebody takes an external snapshot."""
        self.below.append(self.disk)
        node = f"s{len(self.below)}"
        overlay = self._directory / f"overlay-{self._writes}-{node}.qcow2"
        snapshots.take(self.vm, self.disk.node or "", overlay, node, like_libvirt)
        self._becomes(path=overlay, node=node)

    def commit(self, top: int, base: int, like_libvirt: bool = True) -> None:
        """Layers, counted from the active one, are committed; QEMU goes on with what is left."""
        nodes = self.nodes
        snapshots.commit(self.vm, nodes[0], nodes[top], nodes[base], nodes[top + 1 : base], like_libvirt)
        if top:
            del self.below[len(self.below) - base + 1 : len(self.below) - top + 1]
        else:
            self._becomes(path=self.below[-base].path, node=nodes[base])
            del self.below[-base:]

    def pull(self) -> None:
        """All layers are pulled into the active one."""
        snapshots.pull(self.vm, self.nodes[0], self.nodes[1:])
        self.below.clear()

    def restart(self) -> None:
        """The VM is switched off and on: the layers below are read-only then."""
        self.vm.quit()
        self._becomes(node="n0")
        self.vm.restart()

    def back_up(self, set_id: str, **options: t.Any) -> tuple[str, str]:
        """A set; level and reason. Nothing of the repository is left but what the next one builds on."""
        level = self.history.back_up(set_id, **options)
        assert not [name for node in self.nodes for name in self.vm.bitmaps(node) if name.endswith(".merged")]
        [recorded] = self.history.recorded(set_id).values()
        [own] = self.history.bitmaps().values()
        # For differential sets, that of the full set is kept too.
        assert len(own) == (2 if options.get("level") == "differential" else 1)
        assert set(recorded) <= set(own)
        return level, self.history.reason(set_id)

    def _becomes(self, **changes: t.Any) -> None:
        self.vm.disks = (dataclasses.replace(self.disk, **changes),)


@pytest.fixture
def layers(vms: Vms, sets: Sets, directory: Path) -> Layers:
    return Layers(History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory), directory)


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_writes_before_between_and_after_snapshots_are_in_the_increment(
    layers: Layers, depth: int, restart: bool
) -> None:
    for _dummy in range(depth):
        layers.write()
        layers.snapshot()
    if restart:
        layers.restart()
    layers.write()
    level, reason = layers.back_up("s1")
    assert (level, reason) == (
        "incremental",
        f"changes since set s0, recorded in {depth + 1} layers (external snapshots)",
    )
    # No more than what was written is copied, and the next one has a record of its own.
    assert max(path.stat().st_size for path in layers.history.sets.images("web01", "s1").values()) < MIB + 65536
    layers.write()
    assert layers.back_up("s2") == ("incremental", "changes since set s1")
    layers.history.check()


def test_a_differential_set_too(layers: Layers) -> None:
    layers.write()
    assert layers.back_up("s1", level="differential")[0] == "differential"
    layers.write()
    layers.snapshot()
    layers.write()
    # The record of the full is kept beside that of the newest set, and both were copied.
    assert layers.back_up("s2", level="differential")[0] == "differential"
    layers.history.check()


def test_sets_between_snapshots(layers: Layers) -> None:
    for number in range(1, 5):
        layers.write()
        layers.snapshot()
        layers.write()
        level, reason = layers.back_up(f"s{number}")
        assert (level, "recorded in 2 layers" in reason) == ("incremental", True), reason
    layers.history.check()


@pytest.mark.parametrize("like_libvirt", [True, False], ids=["libvirt", "qemu"])
@pytest.mark.parametrize(("top", "base"), [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
def test_committed_layers(layers: Layers, top: int, base: int, like_libvirt: bool) -> None:
    for _dummy in range(3):
        layers.write()
        layers.snapshot()
    layers.write()
    layers.commit(top, base, like_libvirt)
    layers.write()
    # What is committed is marked in the bitmap of the base by QEMU itself.
    assert layers.back_up("s1")[0] == "incremental"
    layers.history.check()


def test_a_set_before_the_commit_goes_on_after_it(layers: Layers) -> None:
    layers.write()
    layers.snapshot()
    layers.write()
    assert layers.back_up("s1")[0] == "incremental"
    layers.write()
    layers.commit(0, 1)
    layers.write()
    assert layers.back_up("s2") == ("incremental", "changes since set s1")
    layers.history.check()


def test_the_layer_of_the_set_was_committed_without_its_bitmap(layers: Layers) -> None:
    """Only the copy on the newest overlay is left, and it looks healthy."""
    layers.snapshot()
    layers.write()
    assert layers.back_up("s1")[0] == "incremental"
    layers.write()
    layers.snapshot()
    layers.commit(1, 2, like_libvirt=False)
    layers.write()
    level, reason = layers.back_up("s2")
    assert (level, "is gone in a layer below" in reason) == ("full", True), reason
    layers.history.check()


def test_pulled_layers(layers: Layers) -> None:
    for _dummy in range(2):
        layers.write()
        layers.snapshot()
    layers.write()
    layers.pull()
    layers.write()
    assert layers.back_up("s1") == ("incremental", "changes since set s0")
    layers.history.check()


def test_committed_by_qemu_img_while_the_vm_is_off(layers: Layers) -> None:
    layers.write()
    layers.snapshot()
    layers.write()
    layers.vm.quit()
    qemu_img("commit", "-q", layers.disk.path or "")
    layers.vm.disks = (layers.below.pop(),)
    layers.vm.restart()
    layers.write()
    assert layers.back_up("s1")[0] == "incremental"
    layers.history.check()


def test_a_snapshot_of_qemu_alone_has_no_record(layers: Layers) -> None:
    layers.write()
    layers.snapshot()
    layers.snapshot(like_libvirt=False)
    layers.write()
    level, reason = layers.back_up("s1")
    assert (level, "is in a layer below" in reason) == ("full", True), reason
    layers.history.check()


def test_a_layer_whose_bitmap_is_disabled(layers: Layers) -> None:
    layers.write()
    layers.snapshot()
    [name] = layers.vm.bitmaps(layers.nodes[1])
    layers.vm.qmp.execute("block-dirty-bitmap-disable", node=layers.nodes[1], name=name)
    level, reason = layers.back_up("s1")
    assert (level, "is disabled" in reason) == ("full", True), reason
    layers.history.check()


def test_killed_after_the_snapshot(layers: Layers) -> None:
    layers.write()
    layers.snapshot()
    layers.write()
    layers.vm.kill()
    layers.vm.disks = (dataclasses.replace(layers.disk, node="n0"),)
    layers.vm.restart()
    # The bitmap on the overlay was never stored.
    level, reason = layers.back_up("s1")
    assert (level, "is in a layer below" in reason) == ("full", True), reason
    layers.history.check()


def test_a_snapshot_while_a_set_is_copied(layers: Layers, sets: Sets) -> None:
    layers.write()
    layers.snapshot()
    for _dummy in range(24):
        layers.write()
    layers.history.freeze("s1")
    plan = sets.start(layers.vm, id="s1", speed=SLOW)
    layers.write()
    layers.snapshot()
    layers.write()
    release(layers.vm)
    succeed("backup_set", {"plan": plan})
    assert layers.history.note("s1") == {"drive0": "incremental"}
    # Nothing of the copy is left in the layer that it was made from, which only its end could have removed.
    assert not [name for node in layers.nodes for name in layers.vm.bitmaps(node) if name.endswith(".merged")]
    assert layers.back_up("s2")[0] == "incremental"
    layers.history.check()


@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_an_increment_that_comes_to_nothing_leaves_every_layer_its_record(layers: Layers, sets: Sets, how: str) -> None:
    layers.write()
    layers.snapshot()
    for _dummy in range(24):
        layers.write()
    before = [layers.vm.bitmaps(node) for node in layers.nodes]
    plan = sets.start(layers.vm, id="s1", speed=SLOW)
    if how == "cancelled":
        run_module("backup_set", {"repository": str(sets.path), "names": ["web01"], "state": "cancelled"})
    else:
        for job in layers.vm.block_jobs:
            layers.vm.qmp.execute("block-job-cancel", device=job["device"], force=True)
        wait_until(lambda: all(job["status"] == "concluded" for job in layers.vm.block_jobs), "the end of the job")
        fail("backup_set", {"plan": plan})
    assert [layers.vm.bitmaps(node) for node in layers.nodes] == before
    assert layers.back_up("s1")[0] == "incremental"
    layers.history.check()


def test_drive_backup_refuses_a_bitmap_that_has_a_part_only(layers: Layers, directory: Path) -> None:
    vm = layers.vm
    vm.qmp.execute("block-dirty-bitmap-add", node=layers.nodes[0], name="own", persistent=True)
    layers.write()
    layers.snapshot()
    layers.write()
    target = directory / "increment.qcow2"
    arguments = {"monitor": str(vm.monitor), "device": "drive0", "target": str(target), "bitmap": "own"}
    for how in ({"sync": "incremental"}, {"sync": "bitmap", "bitmap_mode": "never"}):
        assert "is also in a layer below" in fail("drive_backup", {**arguments, **how})["msg"]
    assert not target.exists()
