# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What version 0.1.0 wrote is read and finished, and version 0.1.0 reads and finishes what this one writes.

The files of that version, and its modules, are in tests/data/written_by_0.1.0. Its unfinished sets are of a machine
`hv1`, and no other machine may touch them. To finish them, a test gives them the name and the machine-id of this
machine. The boot id stays: on this machine they are of an earlier boot, which no QEMU has survived. For jobs that are
alive, the modules of version 0.1.0 run here.
"""

from __future__ import annotations

import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, snapshot
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, Library, restored_to
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.old_version import WRITTEN, OldVersion
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

SETS = {"db04": ["s1"], "db05": ["s2", "s1"], "web01": ["s2", "s1"]}
"""The sets of each VM, newest first."""


def document(path: Path) -> dict[str, t.Any]:
    found: dict[str, t.Any] = json.loads(path.read_text())
    return found


def fields(found: object, place: str = "") -> set[str]:
    """The names of all fields of a document, each with those that it is in."""
    if isinstance(found, list):
        return set().union(*(fields(each, place) for each in found))
    if not isinstance(found, dict):
        return set()
    return {f"{place}.{name}" for name in found}.union(
        *(fields(each, f"{place}.{name}") for name, each in found.items())
    )


class Written:
    """A copy of what version 0.1.0 wrote."""

    def __init__(self, directory: Path) -> None:
        shutil.unpack_archive(WRITTEN / "repository.tar.xz", directory, filter="tar")
        self.library = Library(directory / "repository")
        self._directory = directory

    def move_here(self) -> None:
        """Let the unfinished sets be of this machine."""
        for path in self.library.path.glob("*/.s1.staging/intent.json"):
            intent = document(path)
            intent["hypervisor"]["name"] = os.uname().nodename
            intent["hypervisor"]["machine_id"] = Path("/etc/machine-id").read_text().strip()
            path.write_text(json.dumps(intent))

    def intent(self, name: str) -> dict[str, t.Any]:
        """What is said of a set that is unfinished."""
        return document(self.library.path / name / ".s1.staging" / "intent.json")

    def copies(self, name: str, set_id: str) -> dict[str, Path]:
        """What the disks of a VM held when a set was made."""
        prefix = f"{name}-{set_id}-"
        found = (self._directory / "copies").glob(f"{prefix}*.qcow2")
        return {path.stem[len(prefix) :]: path for path in found}

    def start(self, vms: Vms, name: str) -> Qemu:
        """Start a VM again, with the disks that it had."""
        paths = sorted((self._directory / "images").glob(f"{name}-*.qcow2"))
        disks = [Disk(path, id=path.stem[len(name) + 1 :], node=f"node-{path.stem[len(name) + 1 :]}") for path in paths]
        return vms.start(*disks, name=name, uuid=self.uuid(name))

    def uuid(self, name: str) -> str:
        """The uuid of a VM."""
        return str(document(next((self.library.path / name).glob("*s1*/vm.json")))["uuid"])


@pytest.fixture
def written(directory: Path) -> Written:
    return Written(directory)


@pytest.fixture
def old(directory: Path) -> OldVersion:
    return OldVersion(directory / "0.1.0")


def test_sets_and_marks_are_read(written: Written) -> None:
    info = written.library.info()
    sets = {(one["vm"], one["id"]): one for one in info["sets"]}
    assert set(sets) == {(name, set_id) for name, ids in SETS.items() for set_id in ids}
    assert not any(one["broken"] for one in info["sets"])
    full, increment = sets["web01", "s1"], sets["web01", "s2"]
    assert (full["level"], full["protected"], full["verified"]) == ("full", True, {})
    assert (increment["level"], increment["parents"], increment["protected"]) == ("incremental", ["s1"], False)
    assert (increment["verified"]["depth"], increment["verified"]["ok"]) == ("image", True)
    assert increment["used_by"] == [f"/srv/vmfleet/overlays/{disk}.qcow2 on hv1" for disk in ("vda", "vdb")]
    assert {
        (left["vm"], Path(left["path"]).name, left["what"].partition(" since ")[0]) for left in info["leftovers"]
    } == {
        *((name, ".s1.staging", "set s1 is being made by hypervisor hv1") for name in ("db01", "db02", "db03")),
        ("db05", ".s2.consolidation.json", "set s2 becomes a full one; the next prune goes on"),
        ("web01", ".s3.failed.json", "set s3 failed: disk vdb: cancelled from outside"),
    }


def test_sets_are_verified(written: Written) -> None:
    verified = [("web01", "s1"), ("web01", "s2"), ("db04", "s1"), ("db05", "s1"), ("db05", "s2")]
    for name, set_id in verified:
        call = {"repository": str(written.library.path), "names": [name], "id": set_id, "depth": "image"}
        assert all(result["ok"] for result in succeed("backup_verify", call)["results"])
    marks = {(one["vm"], one["id"]): one["verified"]["depth"] for one in written.library.info()["sets"]}
    assert marks == dict.fromkeys(verified, "image")


@pytest.mark.parametrize(("name", "set_id"), [(name, set_id) for name, ids in SETS.items() for set_id in ids])
def test_sets_are_restored(written: Written, directory: Path, name: str, set_id: str) -> None:
    (directory / "restored").mkdir()
    written.library.restore(vm=name, id=set_id, directory=str(directory / "restored"))
    copies = written.copies(name, set_id)
    assert copies
    for disk, copy in copies.items():
        assert identical(copy, directory / "restored" / f"{disk}.qcow2")


def test_marks_keep_sets_from_being_removed(written: Written) -> None:
    before = snapshot(written.library.path)
    pruned = written.library.prune(check=True, names=["web01"], forget=True)
    assert not pruned["removed"]
    assert {kept["id"]: kept["reason"] for kept in pruned["kept"]} == {
        "s1": "it is protected; set s2 builds on it",
        "s2": "/srv/vmfleet/overlays/vdb.qcow2 on hv1 reads it",
    }
    assert snapshot(written.library.path) == before


def test_increment_that_became_full_is_finished(written: Written, directory: Path) -> None:
    pruned = written.library.prune(names=["db05"], keep_last=1)
    assert [removed["id"] for removed in pruned["removed"]] == ["s1"]
    assert written.library.levels("db05", "s2") == {"vda": "full"}
    (directory / "restored").mkdir()
    written.library.restore(vm="db05", directory=str(directory / "restored"))
    assert identical(written.copies("db05", "s2")["vda"], directory / "restored" / "vda.qcow2")


def test_chain_goes_on(written: Written, vms: Vms, directory: Path) -> None:
    vm = written.start(vms, "web01")
    vm.write("vda", 0xCD, MIB, 65536)
    copies = {disk.name: vm.freeze(disk, directory / f"{disk.name}-now.qcow2") for disk in vm.disks}
    written.library.back_up(vm, id="s4")
    assert written.library.levels("web01", "s4") == {"vda": "incremental", "vdb": "incremental"}
    for disk, image in written.library.images("web01", "s4").items():
        assert identical(copies[disk], image)


class TestUnfinished:
    """What version 0.1.0 had begun."""

    @pytest.mark.parametrize("name", ["db01", "db02", "db03"])
    def test_set_is_made_all_the_same(self, written: Written, vms: Vms, name: str) -> None:
        written.move_here()
        vm = written.start(vms, name)
        copies = {disk.name: vm.freeze(disk, disk.path.with_suffix(".now")) for disk in vm.disks if disk.path}
        result = result_of(written.library.back_up(vm, id="s1"), name)
        assert result["state"] == "published"
        written.library.assert_good(name, copies, "s1")

    def test_set_that_was_described_is_published_without_its_vm(self, written: Written) -> None:
        written.move_here()
        attempt = written.intent("db03")["attempt"]
        assert self._settle(written, "db03")["state"] == "published"
        assert written.library.manifest("db03", "s1")["attempt"] == attempt
        written.library.assert_good("db03", written.copies("db03", "s1"), "s1")

    def test_set_that_copied_nothing_is_removed_without_its_vm(self, written: Written) -> None:
        written.move_here()
        assert self._settle(written, "db01")["state"] == "failed"
        assert [path.name for path in (written.library.path / "db01").iterdir()] == [".lock"]

    def test_set_whose_jobs_are_lost_is_recorded_as_failed_without_its_vm(self, written: Written) -> None:
        written.move_here()
        attempt = written.intent("db02")["attempt"]
        assert self._settle(written, "db02")["state"] == "failed"
        assert {path.name for path in (written.library.path / "db02").iterdir()} == {".lock", ".s1.failed.json"}
        assert document(written.library.path / "db02" / ".s1.failed.json")["attempt"] == attempt

    def test_intent_of_a_published_set_goes(self, written: Written, vms: Vms) -> None:
        vm = written.start(vms, "db04")
        written.library.back_up(vm, id="s1")
        written.library.assert_good("db04", written.copies("db04", "s1"), "s1")

    @pytest.mark.parametrize("name", ["db01", "db02", "db03"])
    def test_other_machine_is_not_interfered_with(self, written: Written, vms: Vms, name: str) -> None:
        vm = written.start(vms, name)
        before = snapshot(written.library.path)
        result = result_of(written.library.attempt(vm, id="s1"), name)
        assert "being made by hypervisor hv1" in result["error"]
        assert snapshot(written.library.path) == before

    @pytest.mark.parametrize("name", ["db01", "db02", "db03"])
    def test_set_is_taken_over(self, written: Written, vms: Vms, name: str) -> None:
        vm = written.start(vms, name)
        call = {"plan": written.library.plan(vm, id="s1")["plan"], "takeover": True}
        assert result_of(succeed("backup_set", call), name)["state"] == "published"

    def _settle(self, written: Written, name: str) -> dict[str, t.Any]:
        return result_of(written.library.attempt(written.intent(name)["monitor"], id="s1"), name)


class TestBothVersions:
    """One begins or writes, and the other goes on or reads."""

    @pytest.fixture
    def library(self, directory: Path) -> Library:
        return Library(directory / "repository")

    def test_this_one_finishes_what_the_old_one_started(
        self, old: OldVersion, library: Library, vms: Vms, directory: Path
    ) -> None:
        vm = vms.start(name="web01")
        copy = vm.freeze(vm.disks[0], directory / "copy.qcow2")
        plan = old.run("backup_plan", **library.arguments(vm, speed=SLOW))["plan"]
        assert result_of(old.run("backup_set", plan=plan, state="started"), "web01")["state"] == "running"
        release(vm)
        assert result_of(succeed("backup_set", {"plan": plan}), "web01")["state"] == "published"
        library.assert_good("web01", {"drive0": copy})

    def test_the_old_one_finishes_what_this_one_started(
        self, old: OldVersion, library: Library, vms: Vms, directory: Path
    ) -> None:
        vm = vms.start(name="web01")
        copy = vm.freeze(vm.disks[0], directory / "copy.qcow2")
        plan = library.start(vm)
        release(vm)
        assert result_of(old.run("backup_set", plan=plan), "web01")["state"] == "published"
        library.assert_good("web01", {"drive0": copy})

    def test_the_old_one_reads_what_this_one_wrote(
        self, old: OldVersion, library: Library, vms: Vms, directory: Path
    ) -> None:
        chain = Chain(vms, directory, sets=2)
        repository = str(library.path)
        succeed("backup_verify", {"repository": repository, "names": [NAME], "id": "s1", "depth": "checksum"})
        library.prune(names=[NAME], protect=["s1"], keep_last=9)
        told = old.run("backup_info", repository=repository)["sets"]
        for ours, theirs in zip(library.info()["sets"], told, strict=True):
            assert {name: ours[name] for name in theirs} == theirs
        assert [(one["id"], one["level"]) for one in told] == [("s2", "incremental"), ("s1", "full")]
        verified = old.run("backup_verify", repository=repository, names=[NAME], id="s2", depth="image")
        assert all(result["ok"] for result in verified["results"])
        (directory / "restored").mkdir()
        old.run("backup_restore", repository=repository, vm=NAME, id="s2", directory=str(directory / "restored"))
        chain.assert_restored("s2", restored_to(directory / "restored"))

    def test_no_field_is_missing(self, written: Written, vms: Vms, directory: Path) -> None:
        """The old version has defaults for some, so that it does not complain."""
        (directory / "new").mkdir()
        chain = Chain(vms, directory / "new", sets=2)
        library = chain.library
        succeed("backup_verify", {"repository": str(library.path), "names": [NAME], "id": "s2", "depth": "image"})
        library.prune(names=[NAME], protect=["s1"], keep_last=9)
        library.restore(id="s2", directory=str(directory / "new"), method="overlay")
        plan = library.start(chain.vm, id="s3", level="full", speed="64K")
        intent = document(library.path / NAME / ".s3.staging" / "intent.json")
        assert fields(written.intent("db02")) <= fields(intent)
        chain.vm.qmp.execute("block-job-cancel", device=chain.vm.block_jobs[0]["device"], force=True)
        fail("backup_set", {"plan": plan})
        names = ("manifest.json", "vm.json", ".s1.protected.json", ".s2.verified.json", ".s2.pin-*", ".s3.failed.json")
        for name in ("vmfleet.json", *(f"{NAME}/**/{name}" for name in names)):
            ours, theirs = (
                set().union(*(fields(document(path)) for path in root.glob(name)))
                for root in (library.path, written.library.path)
            )
            assert theirs
            assert theirs <= ours, name


class TestRollingUpgrade:
    """The hypervisor hv2 is still on version 0.1.0, and this one is not. They share a repository."""

    TURNS = 3

    def test_each_makes_its_sets_by_turns(self, vms: Vms, directory: Path) -> None:
        """Each begins a set, which is unfinished while the other makes one from its beginning to its end."""
        library, old = Library(directory / "repository"), OldVersion(directory / "0.1.0", elsewhere=True)
        mine, theirs = vms.start(vms.disk(0), name="web01"), vms.start(vms.disk(1), name="db01")
        copies: dict[tuple[str, str], Path] = {}

        def change(name: str, set_id: str) -> None:
            vm = mine if name == "web01" else theirs
            vm.write(vm.disks[0].name, int(set_id[1:]) + 1, 0, 65536)
            copies[name, set_id] = vm.freeze(vm.disks[0], directory / f"{name}-{set_id}-now.qcow2")

        for number in range(1, self.TURNS + 1):
            set_id = f"t{number}"
            change("db01", set_id)
            plan = old.run("backup_plan", **library.arguments(theirs, id=set_id, speed=SLOW))["plan"]
            assert result_of(old.run("backup_set", plan=plan, state="started"), "db01")["state"] == "running"
            change("web01", set_id)
            assert result_of(library.back_up(mine, id=set_id), "web01")["state"] == "published"
            library.prune(names=["web01"], keep_last=9)
            release(theirs)
            assert result_of(old.run("backup_set", plan=plan), "db01")["state"] == "published"

            set_id = f"u{number}"
            change("web01", set_id)
            plan = library.start(mine, id=set_id)
            change("db01", set_id)
            plan_of_old = old.run("backup_plan", **library.arguments(theirs, id=set_id))["plan"]
            assert result_of(old.run("backup_set", plan=plan_of_old), "db01")["state"] == "published"
            old.run("backup_prune", repository=str(library.path), names=["db01"], keep_last=9)
            release(mine)
            assert result_of(succeed("backup_set", {"plan": plan}), "web01")["state"] == "published"

        ours, told = library.info()["sets"], old.run("backup_info", repository=str(library.path))["sets"]
        assert {(one["vm"], one["id"]) for one in ours} == {(one["vm"], one["id"]) for one in told} == set(copies)
        assert not any(one["broken"] for one in (*ours, *told))
        # After the first one, each is an increment: neither has taken the other's bitmaps away.
        assert {one["level"] for one in ours if one["id"] != "t1"} == {"incremental"}
        makers = {name: library.manifest(name, set_id)["hypervisor"]["name"] for name, set_id in copies}
        assert makers == {"web01": os.uname().nodename, "db01": "hv2"}
        for (name, set_id), copy in copies.items():
            (directory / f"{name}-{set_id}").mkdir()
            library.restore(vm=name, id=set_id, directory=str(directory / f"{name}-{set_id}"))
            [restored] = (directory / f"{name}-{set_id}").glob("*.qcow2")
            assert identical(copy, restored)

    def test_a_set_of_the_other_is_left_alone(self, vms: Vms, directory: Path) -> None:
        """What the other hypervisor is making of a VM of the same name stays its own."""
        library, old = Library(directory / "repository"), OldVersion(directory / "0.1.0", elsewhere=True)
        vm = vms.start(name="web01")
        plan = old.run("backup_plan", **library.arguments(vm, id="t1", speed=SLOW))["plan"]
        assert result_of(old.run("backup_set", plan=plan, state="started"), "web01")["state"] == "running"
        result = result_of(library.attempt(vm, id="t1"), "web01")
        assert "being made by hypervisor hv2" in result["error"]
        release(vm)
        assert result_of(old.run("backup_set", plan=plan), "web01")["state"] == "published"
