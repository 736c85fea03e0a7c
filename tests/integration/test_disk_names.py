# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A disk that is called otherwise at times goes on with its chain: its device is the same."""

from __future__ import annotations

import typing as t
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.library import Library
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import run_for_a_moment
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

SIZE = 8 * MIB
DEVICE = "-d /machine/peripheral/vd{}/virtio-backend"
BY_BACKEND, BY_DEVICE = ("drive0", "drive1"), ("vd0", "vd1")


class Turns:
    """A VM whose two disks have the names of their backends one night, and of their devices the next."""

    def __init__(self, vms: Vms, library: Library, directory: Path) -> None:
        self.library = library
        self._directory = directory
        self.frozen: dict[str, list[Path]] = {}
        disks = [vms.disk(number, SIZE, device=f"virtio-blk-pci,id=vd{number}") for number in range(2)]
        self.vm: Qemu = vms.start(*disks, name="web01", machine="q35,accel=tcg", paused=True)

    def rename(self, *, by_backend: bool) -> None:
        """Start the VM anew, with backends that have names or with none."""
        self.vm.quit()
        self.vm.disks = tuple(
            replace(disk, id=f"drive{number}" if by_backend else None) for number, disk in enumerate(self.vm.disks)
        )
        self.vm.restart()

    def back_up(self, set_id: str, pattern: int, **options: t.Any) -> dict[str, t.Any]:
        """Write to the first disk, and make a set; returns what its manifest says."""
        self.vm.write(DEVICE.format(0), pattern, pattern * 65536, 65536)
        self.frozen[set_id] = [self._freeze(number, f"{set_id}-{number}.qcow2") for number in range(2)]
        self.library.back_up(self.vm, id=set_id, **options)
        run_for_a_moment(self.vm)
        return self.library.manifest("web01", set_id)

    def _freeze(self, number: int, name: str) -> Path:
        self.vm.io(DEVICE.format(number), "flush")
        copy = self._directory / name
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "qcow2", self.vm.disks[number].path or "", copy)
        return copy

    def check(self) -> None:
        """Every set that is there holds what the disks held at its moment."""
        for set_id in self.library.listed():
            images = self.library.images("web01", set_id).values()
            for copy, image in zip(self.frozen[set_id], images, strict=True):
                assert identical(copy, image), set_id


@pytest.fixture
def library(directory: Path) -> Library:
    return Library(directory / "repository")


@pytest.fixture
def turns(vms: Vms, library: Library, directory: Path) -> Turns:
    return Turns(vms, library, directory)


def test_the_chain_goes_on_under_each_name(turns: Turns, library: Library, directory: Path) -> None:
    manifests = [turns.back_up("s1", 1)]
    for number, by_backend in ((2, False), (3, True), (4, False), (5, False)):
        turns.rename(by_backend=by_backend)
        manifests.append(turns.back_up(f"s{number}", number))
    turns.check()
    names = [tuple(disk["name"] for disk in manifest["disks"]) for manifest in manifests]
    assert names == [BY_BACKEND, BY_DEVICE, BY_BACKEND, BY_DEVICE, BY_DEVICE]
    assert [manifest["level"] for manifest in manifests] == ["full"] + ["incremental"] * 4
    parents = [manifest["disks"][0]["parent"] for manifest in manifests[1:]]
    assert [(parent["id"], parent["disk"]) for parent in parents] == [
        ("s1", "drive0"),
        ("s2", "vd0"),
        ("s3", "drive0"),
        ("s4", ""),
    ]
    assert [path.name for path in library.images("web01", "s4").values()] == ["vd0.qcow2", "vd1.qcow2"]
    # Of each disk one bitmap: those of before are found under whatever name.
    for manifest, node in zip(manifests[-1]["disks"], ("n0", "n1"), strict=True):
        assert list(turns.vm.bitmaps(node)) == [manifest["bitmap"]]
    # All that reads sets follows the chains.
    for depth in ("checksum", "image"):
        said = succeed(
            "backup_verify", {"repository": str(library.path), "names": ["web01"], "id": "s4", "depth": depth}
        )
        assert [(one["disk"], one["ok"]) for one in said["results"]] == [("vd0", True), ("vd1", True)]
    assert [(one["chain"], one["broken"]) for one in library.info()["sets"]] == [(n, "") for n in (5, 4, 3, 2, 1)]
    for name in ("vd0", "drive0"):
        target = directory / f"{name}.restored"
        restored = library.restore(id="s4", disks=one_disk(target, name))["restored"][0]
        assert (restored["disk"], restored["chain"]) == ("vd0", ["s4", "s3", "s2", "s1"])
        assert identical(turns.frozen["s4"][0], target)
    # The same disk by its other name is restored there already.
    assert not library.restore(id="s4", disks=one_disk(directory / "vd0.restored", "drive0"))["changed"]
    said = library.fail_restore(id="s4", disks=one_disk(directory / "other", "n0"))
    assert said == "disks: set s4 has no disk 'n0'; it has: vd0, vd1"


def test_a_published_set_has_the_disk_by_its_other_name(turns: Turns, library: Library) -> None:
    turns.back_up("s1", 1)
    turns.rename(by_backend=False)
    plan = library.plan(turns.vm, id="s1")["plan"]
    assert plan["vms"][0]["action"] == "skip"
    result = succeed("backup_set", {"plan": plan})
    assert (result["changed"], result_of(result, "web01")["state"]) == (False, "published")


def test_differentials_build_on_the_full_of_the_other_name(turns: Turns, library: Library) -> None:
    turns.back_up("s1", 1)
    turns.rename(by_backend=False)
    turns.back_up("s2", 2, level="differential")
    turns.rename(by_backend=True)
    third = turns.back_up("s3", 3, level="differential")
    assert third["level"] == "differential"
    assert [(disk["parent"]["id"], disk["parent"]["disk"]) for disk in third["disks"]] == [("s1", ""), ("s1", "")]
    turns.rename(by_backend=False)
    fourth = turns.back_up("s4", 4, level="differential")
    assert [disk["parent"]["disk"] for disk in fourth["disks"]] == list(BY_BACKEND)
    turns.check()
    # The bitmaps of the full and of the newest set.
    full = library.manifest("web01", "s1")["disks"][0]
    assert set(turns.vm.bitmaps("n0")) == {full["bitmap"], fourth["disks"][0]["bitmap"]}


def test_a_chain_is_as_long_as_it_is_under_all_names(turns: Turns) -> None:
    turns.back_up("s1", 1)
    turns.rename(by_backend=False)
    turns.back_up("s2", 2)
    turns.rename(by_backend=True)
    third = turns.back_up("s3", 3, max_chain=2)
    assert {disk["reason"] for disk in third["disks"]} == {"its chain has 2 images (max_chain is 2)"}


def test_sets_under_other_names_can_go(turns: Turns, library: Library) -> None:
    for number in range(1, 5):
        turns.back_up(f"s{number}", number)
        turns.rename(by_backend=number % 2 == 0)
    # Without consolidation, the newest one keeps all that it builds on.
    assert not library.prune(keep_last=1)["removed"]
    library.prune(keep_last=2, consolidate=True)
    assert library.listed() == ["s4", "s3"]
    turns.check()
    said = succeed("backup_verify", {"repository": str(library.path), "names": ["web01"], "id": "s4", "depth": "image"})
    assert all(one["ok"] for one in said["results"])
    fifth = turns.back_up("s5", 5)
    assert fifth["level"] == "incremental"
    turns.check()


def test_a_parent_of_a_name_that_is_not_there(turns: Turns, library: Library) -> None:
    turns.back_up("s1", 1)
    turns.rename(by_backend=False)
    second = turns.back_up("s2", 2)
    second["disks"][0]["parent"]["disk"] = "drive7"
    library.rewrite("s2", disks=second["disks"])
    said = "set s1, which s2 builds on, is gone or has no disk drive7"
    assert said in library.fail_restore(id="s2", directory=str(library.path.parent))
    third = turns.back_up("s3", 3)
    assert [disk["level"] for disk in third["disks"]] == ["full", "incremental"]
    assert third["disks"][0]["reason"] == said
    assert identical(turns.frozen["s3"][0], library.images("web01", "s3")["vd0"])
