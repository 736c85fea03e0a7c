# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_prune: what is to go goes, and what stays is what it was."""

from __future__ import annotations

import fcntl
import json
import shutil
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.library import LOCKS, NAME, Chain, Library, gate
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.pruning import assert_whole, fates, judge, two_chains
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

    Start = t.Callable[..., ModuleProcess]

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with two_chains() as chain:
        yield chain


class TestRemoval:
    """What goes, what stays, and that nothing else changes."""

    def test_case_51_whole_chains(self, chain: Chain, library: Library) -> None:
        before = library.content(but=("s1", "s2", "s3"))
        said = library.prune(keep_last=2)
        assert said["changed"]
        assert fates(said, "removed") == dict.fromkeys(("s1", "s2", "s3"), "no rule keeps it")
        assert fates(said) == {"s4": "last; set s5 builds on it", "s5": "last"}
        assert said["bytes"] == sum(one["bytes"] for one in said["removed"]) > 4 * MIB
        assert said["text"][0] == "keep         web01/s5  last"
        assert said["text"][4] == "remove       web01/s1  no rule keeps it"
        assert said["diff"]["after"] == "web01/s4\nweb01/s5\n"
        assert_whole(chain, library, "s5", "s4")
        after = library.content()
        after.pop(str(library.path / NAME / ".prune.lock"))
        assert after == before
        again = library.prune(keep_last=2)
        assert (again["changed"], again["removed"]) == (False, [])

    def test_case_51_never_what_a_kept_set_builds_on(self, chain: Chain, library: Library) -> None:
        said = library.prune(keep_last=3)
        assert not said["changed"]
        assert fates(said) == {
            "s1": "set s2 builds on it",
            "s2": "set s3 builds on it",
            "s3": "last",
            "s4": "last; set s5 builds on it",
            "s5": "last",
        }
        assert_whole(chain, library, "s5", "s4", "s3", "s2", "s1")

    def test_check_mode_lists_everything_and_changes_nothing(self, library: Library) -> None:
        before = library.content()
        options: dict[str, t.Any] = {
            "keep_last": 1,
            "consolidate": True,
            "names": [NAME],
            "protect": ["s2"],
            "unprotect": ["s1"],
        }
        said = library.prune(check=True, **options)
        assert library.content() == before
        assert said["changed"]
        real = library.prune(**options)
        assert {key: real[key] for key in ("removed", "kept", "bytes", "text", "diff")} == {
            key: said[key] for key in ("removed", "kept", "bytes", "text", "diff")
        }
        assert set(fates(said)) | set(fates(said, "removed")) == {"s1", "s2", "s3", "s4", "s5"}

    def test_time_is_counted_from_the_newest_set(self, library: Library) -> None:
        for day in range(1, 6):
            library.rewrite(f"s{day}", started=f"2001-01-{10 * day - 9:02}T00:00:00Z".replace("-41", "-31"))
        said = library.prune(keep_within="20d")
        assert fates(said)["s4"] == "within 20 days before set s5; set s5 builds on it"
        assert library.listed() == ["s5", "s4", "s3", "s2", "s1"]
        library.prune(keep_within="1w")
        assert library.listed() == ["s5", "s4"]

    def test_protected_sets_stay_until_they_are_not(self, library: Library) -> None:
        said = library.prune(names=[NAME], protect=["s2"])
        assert (said["changed"], said["removed"]) == (True, [])
        assert not library.prune(names=[NAME], protect=["s2"])["changed"]
        said = library.prune(keep_last=1)
        assert fates(said)["s2"] == "it is protected"
        assert library.listed() == ["s5", "s4", "s2", "s1"]
        assert [one["protected"] for one in library.info()["sets"]] == [False, False, True, False]
        assert library.prune(names=[NAME], unprotect=["s2"])["changed"]
        assert library.listed() == ["s5", "s4", "s2", "s1"]
        library.prune(keep_last=1)
        assert library.listed() == ["s5", "s4"]
        assert library.info()["leftovers"] == []

    def test_a_set_whose_manifest_cannot_be_read_stays_protected(self, library: Library) -> None:
        library.prune(names=[NAME], protect=["s3"])
        manifest = library.path / NAME / "s3" / "manifest.json"
        text = manifest.read_text()
        manifest.write_text(text[:100])
        said = library.fail_prune(keep_last=4)
        assert f"a file that may protect a set cannot be read: {manifest} is damaged" in said["msg"]
        assert (said["changed"], said["removed"]) == (False, [])
        assert library.listed() == ["s5", "s4", "s2", "s1"]
        manifest.write_text(text)
        library.prune(keep_last=1)
        assert library.listed() == ["s5", "s4", "s3", "s2", "s1"]

    def test_failures_from_before_the_newest_set_are_forgotten(self, library: Library) -> None:
        newest = library.manifest(NAME, "s5")["started"]
        failure = {"schema": 1, "run": "r", "attempt": "a", "state": "failed", "error": "full"}
        for set_id, ended in (("old", "2020-01-02T00:00:00Z"), ("new", newest)):
            content = json.dumps({**failure, "id": set_id, "started": ended, "ended": ended})
            (library.path / NAME / f".{set_id}.failed.json").write_text(content)
        library.prune(keep_last=9)
        assert [path.name for path in (library.path / NAME).glob(".*.failed.json")] == [".new.failed.json"]

    def test_what_killed_processes_have_left_goes(self, chain: Chain, library: Library) -> None:
        directory = library.path / NAME
        (directory / "s3").rename(directory / ".s3.removed")
        (directory / ".s9.staging").mkdir()
        (directory / ".s2.drive0.qcow2.consolidating").write_text("x")
        (directory / ".s3.protected.json.new").write_text("{")
        library.prune(keep_last=2)
        assert_whole(chain, library, "s5", "s4")

    def test_what_cannot_be_removed_is_told_and_in_nobodys_way(self, living: Chain) -> None:
        library = living.library
        stray = library.path / NAME / "s2" / "mine"
        stray.mkdir()
        (stray / "notes").write_text("precious")
        living.go_on(4, level="full")
        said = library.fail_prune(keep_last=1)
        left = library.path / NAME / ".s2.removed"
        assert (
            f"set s2 was removed, but {left}/mine cannot be removed (Is a directory); remove that by hand"
            in said["msg"]
        )
        assert set(fates(said, "removed")) == {"s1", "s2", "s3"}
        assert library.listed() == ["s4"]
        # From now on it is litter, for the next prune as for the next backup.
        assert not library.prune(keep_last=1)["changed"]
        assert [one["path"] for one in library.info()["leftovers"]] == [str(left)]
        assert living.go_on(5, level="full") == "full"
        # Another set of that name goes as well.
        living.back_up("s2", level="full")
        living.go_on(6, level="full")
        library.prune(keep_last=1)
        assert library.listed() == ["s6"]
        assert (left / "mine" / "notes").read_text() == "precious"
        shutil.rmtree(left)
        library.assert_tidy(NAME)

    @pytest.mark.parametrize(
        ("option", "options"),
        [
            ("keep_last", {}),
            ("keep_within", {"keep_within": "0d"}),
            ("keep_weekly", {"keep_last": 1, "keep_weekly": -1}),
            ("keep_within", {"keep_within": "14"}),
            ("keep_within", {"keep_within": "two weeks"}),
            ("names", {"keep_last": 1, "names": [NAME, "nosuch"]}),
            ("forget", {"forget": True}),
            ("unprotect", {"names": [NAME], "protect": ["s1"], "unprotect": ["s1"]}),
        ],
    )
    def test_refused_by_name(self, library: Library, option: str, options: dict[str, t.Any]) -> None:
        before = library.content()
        assert library.fail_prune(**options)["msg"].startswith(f"{option}: ")
        assert library.content() == before

    def test_sets_that_are_not_there_cannot_be_protected(self, library: Library) -> None:
        said = library.fail_prune(names=[NAME], protect=["s9"], keep_last=1)["msg"]
        assert said == "protect: VM web01 has no set s9; it has: s1, s2, s3, s4, s5"
        assert library.listed() == ["s5", "s4", "s3", "s2", "s1"]

    def test_a_set_that_goes_meanwhile_is_not_protected(self, library: Library, start_module: Start) -> None:
        path = library.path / NAME / ".lock"
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = start_module(
                "backup_prune", {"repository": str(library.path), "names": [NAME], "protect": ["s3"]}
            )
            # What it has inherited is closed before its event loop begins.
            wait_until(lambda: {path, Path("anon_inode:[eventpoll]")} <= process.open_files, "the second process")
            # As a prune does that has the lock.
            (library.path / NAME / "s3").rename(library.path / NAME / ".s3.removed")
        assert "protect: VM web01 has no set s3" in process.result()["msg"]
        assert list((library.path / NAME).glob(".*.protected.json")) == []

    def test_one_vm_that_cannot_be_pruned_never_stops_the_others(self, library: Library) -> None:
        shutil.copytree(library.path / NAME, library.path / "web02")
        for number in range(1, 6):
            path = library.path / "web02" / f"s{number}" / "manifest.json"
            found = json.loads(path.read_text())
            path.write_text(json.dumps({**found, "vm": {**found["vm"], "name": "web02"}}))
        library.rewrite("s1", schema=99)
        # The newest manifest tells the VM's name.
        said = library.fail_prune(keep_last=2)
        assert said["msg"].startswith("1 VM could not be pruned as asked: web01: ")
        assert "schema 99 is newer" in said["msg"]
        assert {(one["vm"], one["id"]) for one in said["removed"]} == {("web02", f"s{number}") for number in (1, 2, 3)}
        assert library.listed("web02") == ["s5", "s4"]

    def test_a_repository_that_cannot_be_written_to(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("tmpfs", 64 * MIB)
        library = chain.library.copy(mount.path / "repository")
        mount.make_read_only()
        assert "is mounted read-only" in library.fail_prune(keep_last=1)["msg"]


class TestBroken:
    """Sets that cannot be relied on do not count, and are left alone."""

    def test_what_is_not_there_as_a_whole(self, library: Library) -> None:
        image = library.images(NAME, "s5")["drive1"]
        image.unlink()
        before = library.content(but=("s1", "s2", "s3"))
        said = library.prune(keep_last=1, consolidate=True)
        assert fates(said) == {
            "s4": "last; set s5 builds on it",
            "s5": f"it is broken, and left alone: disk drive1: image {image} is missing",
        }
        assert library.listed() == ["s5", "s4"]
        after = library.content()
        after.pop(str(library.path / NAME / ".prune.lock"))
        assert after == before

    def test_a_broken_set_keeps_what_it_builds_on(self, library: Library) -> None:
        library.images(NAME, "s2")["drive0"].unlink()
        said = library.prune(keep_last=1)
        assert not said["changed"]
        assert "left alone: disk drive0: image" in fates(said)["s3"]

    def test_what_has_failed_its_verification(self, library: Library) -> None:
        judge(library, "s5", "drive0: image has changed")
        said = library.prune(keep_last=1)
        assert fates(said) == {
            "s4": "last; set s5 builds on it",
            "s5": "it is broken, and left alone: drive0: image has changed",
        }

    def test_what_builds_on_a_set_that_has_failed(self, library: Library) -> None:
        judge(library, "s4", "drive0: image has changed")
        said = library.prune(keep_last=1)
        # The last good chain is another one, however new those sets are.
        assert not said["changed"]
        assert fates(said)["s3"] == "last"
        assert fates(said)["s5"] == (
            "it is broken, and left alone: set s4 below it has failed its verification: drive0: image has changed"
        )
        assert {vm["name"]: vm["ok"] for vm in library.info()["vms"]} == {NAME: False}
        # Somebody has repaired it, and looked again.
        judge(library, "s4")
        library.prune(keep_last=1)
        assert library.listed() == ["s5", "s4"]
        judge(library, "s4", "no sign of life", depth="boot")
        assert library.info()["vms"][0]["ok"]


class TestForget:
    """A VM that is no more."""

    def test_all_of_it_goes_and_stays_away(self, library: Library) -> None:
        library.images(NAME, "s5")["drive0"].unlink()
        judge(library, "s4", "bad")
        options: dict[str, t.Any] = {"names": [NAME], "forget": True}
        assert set(fates(library.prune(check=True, **options), "removed")) == {"s1", "s2", "s3", "s4", "s5"}
        assert set(fates(library.prune(**options), "removed")) == {"s1", "s2", "s3", "s4", "s5"}
        assert {path.name for path in (library.path / NAME).iterdir()} == set(LOCKS)
        again = library.prune(**options)
        assert (again["changed"], again["removed"], again["kept"]) == (False, [], [])
        assert again["text"] == ["keep         web01: it has no sets"]
        # One that never was there is a name that is misspelt.
        said = library.fail_prune(names=["never-there"], forget=True)["msg"]
        assert said == f"names: never-there has no set in {library.path}; VMs there: none"

    def test_its_failures_go_with_it(self, library: Library) -> None:
        record = library.path / NAME / ".s9.failed.json"
        times = {"started": "2026-11-22T00:00:00Z", "ended": "9999-01-01T00:00:00Z"}
        told = {
            "id": "s9",
            "run": "f" * 16,
            "attempt": "f" * 12,
            "state": "failed",
            "error": "no",
            "schema": 1,
            **times,
        }
        record.write_text(json.dumps(told))
        library.prune(keep_last=1)
        assert record.exists()
        library.prune(names=[NAME], forget=True, keep_last=1)
        assert record.exists()
        library.prune(names=[NAME], forget=True)
        assert {path.name for path in (library.path / NAME).iterdir()} == set(LOCKS)

    def test_what_is_protected_stays(self, library: Library) -> None:
        library.prune(names=[NAME], protect=["s2"])
        library.prune(names=[NAME], forget=True)
        assert library.listed() == ["s2", "s1"]

    def test_by_rules(self, library: Library) -> None:
        library.prune(names=[NAME], forget=True, keep_last=1)
        assert library.listed() == ["s5", "s4"]

    def test_a_vm_that_is_gone_keeps_its_sets(self, library: Library) -> None:
        library.prune(keep_hourly=1)
        assert library.listed() == ["s5", "s4"]


class TestWithBackups:
    """Backups and prunes of one VM."""

    def test_a_set_that_is_made_guards_what_it_builds_on(self, living: Chain) -> None:
        library = living.library
        for disk in ("drive0", "drive1"):
            living.vm.write(disk, 0xC1, 0, 4 * MIB)
        living.freeze("s4")
        plan = library.start(living.vm, id="s4", speed="64K")
        said = library.prune(names=[NAME], forget=True)
        assert not said["changed"]
        assert fates(said) == {
            "s1": "set s2 builds on it",
            "s2": "set s3 builds on it",
            "s3": "set s4, which is being made, builds on it",
        }
        # It may become a full one: what it reads as stays the same.
        said = library.prune(names=[NAME], forget=True, consolidate=True)
        assert set(fates(said)) == {"s3"}
        release(living.vm)
        succeed("backup_set", {"plan": plan})
        assert_whole(living, library, "s4", "s3")
        assert living.go_on(5) == "incremental"
        assert_whole(living, library, "s5", "s4", "s3")

    def test_a_chain_goes_on_after_a_prune(self, living: Chain) -> None:
        library = living.library
        assert living.go_on(4, level="full") == "full"
        library.prune(keep_last=1)
        assert living.go_on(5) == "incremental"
        assert_whole(living, library, "s5", "s4")

    def test_a_chain_goes_on_after_it_was_consolidated(self, living: Chain) -> None:
        library = living.library
        library.prune(keep_last=1, consolidate=True)
        assert_whole(living, library, "s3")
        assert living.go_on(4) == "incremental"
        assert living.reason("s4") == "changes since set s3"
        assert_whole(living, library, "s4", "s3")
        library.prune(keep_last=1, consolidate=True)
        living.vm.quit()
        living.vm.restart()
        assert living.go_on(5) == "incremental"
        assert_whole(living, library, "s5", "s4")

    def test_differential_siblings(self, vms: Vms, directory: Path) -> None:
        chain = Chain(vms, directory, level="differential")
        library = chain.library
        assert [library.manifest(NAME, f"s{number}")["disks"][0]["parent"]["id"] for number in (2, 3)] == ["s1", "s1"]
        assert not library.prune(keep_last=2, consolidate=True)["changed"]
        library.prune(keep_last=1, consolidate=True)
        assert_whole(chain, library, "s3")
        assert chain.go_on(4, level="differential") == "differential"
        assert chain.reason("s4") == "changes since set s3"
        assert_whole(chain, library, "s4", "s3")

    def test_a_set_is_made_while_another_becomes_full(
        self, living: Chain, directory: Path, start_module: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = living.library
        living.freeze("s4")
        begun, go = gate(directory, monkeypatch)
        arguments = {"repository": str(library.path), "keep_last": 1, "consolidate": True}
        process = start_module("backup_prune", arguments)
        wait_until(begun.exists, "the copy")
        library.back_up(living.vm, id="s4")
        go.touch()
        assert set(fates(process.result(), "removed")) == {"s1", "s2"}
        assert_whole(living, library, "s4", "s3")
