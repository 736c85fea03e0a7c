# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a repository holds of a VM, and which of it can be relied on."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import SCHEMA, parse_time
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import machine_id
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    Pin,
    Protection,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import (
    CONSOLIDATING_SUFFIX,
    leftovers,
    read_catalog,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Failure, Manifest, VmName
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import failure_name
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.vm_names import vm_names
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import TIME, UUID, image, intent, manifest, write

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def put(repository: Repository, set_id: str, parent: str | None = None, day: int = 1, vm: str = "web01") -> Manifest:
    """A set of one disk, as the next of a VM's."""
    made = manifest(
        set_id,
        image("vda", parent, bytes=3),
        vm=VmName(vm, UUID, UUID),
        sequence=len(repository.records(vm).sets) + 1,
        started=f"2026-11-{day:02}T01:00:00Z",
    )
    builders.put(repository, made)
    return made


def verified(repository: Repository, set_id: str, depth: str, day: int, *errors: str) -> None:
    when = f"2026-12-{day + 1:02}T01:00:00Z"
    write_annotation(repository, "web01", Verification(set_id, f"attempt-{set_id}", depth, when, errors))


class TestFind:
    """Sets by id, by time, or the newest."""

    def test_newest_is_the_one_that_was_made_last(self, repository: Repository) -> None:
        put(repository, "z", day=9)
        put(repository, "a", day=5)
        held = read_catalog(repository, "web01")
        assert held.find().id == "a"
        assert held.find("z").id == "z"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("2026-11-05T00:00:00Z", "s4"),
            ("2026-11-05T01:00:00Z", "s5"),
            ("2026-11-05T02:00:00+01:00", "s5"),
            ("2026-11-05 01:00:00+00:00", "s5"),
            ("2026-11-05T01:00:00", "s5"),
            ("2026-11-06", "s5"),
            ("2030-01-01", "s6"),
        ],
    )
    def test_before_a_time(self, repository: Repository, text: str, expected: str) -> None:
        for day in (4, 5, 6):
            put(repository, f"s{day}", day=day)
        assert read_catalog(repository, "web01").find(before=parse_time(text)).id == expected

    def test_what_is_not_there_is_refused_by_the_option_that_asked(self, repository: Repository) -> None:
        with pytest.raises(Refused, match=r"vm: VM web01 has no set; it has: none"):
            read_catalog(repository, "web01").find()
        put(repository, "s1", day=4)
        held = read_catalog(repository, "web01")
        with pytest.raises(Refused, match=r"id: VM web01 has no set s2; it has: s1"):
            held.find("s2")
        with pytest.raises(Refused, match=r"before: VM web01 has no set from before 2026-11-03T00:00:00\+00:00"):
            held.find(before=datetime(2026, 11, 3, tzinfo=UTC))


def test_a_broken_chain_is_named_by_its_link(repository: Repository) -> None:
    for set_id, parent in (("s1", None), ("s2", "s1"), ("s3", "s2")):
        put(repository, set_id, parent)
    held = read_catalog(repository, "web01")
    assert [manifest.id for manifest, _image in held.chain(held.find(), "vda")] == ["s3", "s2", "s1"]
    assert held.broken_sets == {}
    os.unlink(os.path.join(repository.set_path("web01", "s2"), "vda.qcow2"))
    held = read_catalog(repository, "web01")
    assert set(held.broken_sets) == {"s2", "s3"}
    with pytest.raises(BackupError, match=r"VM web01, set s3, disk vda: image .*/web01/s2/vda.qcow2 is missing"):
        held.chain(held.find(), "vda")


class TestFailedSets:
    """What has failed its verification takes with it what builds on it."""

    @pytest.fixture(autouse=True)
    def chain(self, repository: Repository) -> None:
        for set_id, parent in (("s1", None), ("s2", "s1"), ("s3", "s2"), ("s4", None)):
            put(repository, set_id, parent)

    def test_nothing_was_looked_at(self, repository: Repository) -> None:
        assert read_catalog(repository, "web01").failed_sets == {}

    def test_sets_above_a_bad_one_are_bad(self, repository: Repository) -> None:
        verified(repository, "s2", "checksum", 1, "vda: changed", "more")
        assert read_catalog(repository, "web01").failed_sets == {
            "s2": "vda: changed",
            "s3": "set s2 below it has failed its verification: vda: changed",
        }

    @pytest.mark.parametrize(
        ("depth", "day", "good"),
        [("checksum", 2, True), ("image", 1, True), ("checksum", 0, False), ("manifest", 2, False), ("odd", 2, False)],
    )
    def test_a_later_look_as_deep_outweighs_what_is_below(
        self, repository: Repository, depth: str, day: int, good: bool
    ) -> None:
        verified(repository, "s2", "checksum", 1, "vda: changed")
        verified(repository, "s3", depth, day)
        put(repository, "s5", "s3")
        assert set(read_catalog(repository, "web01").failed_sets) == ({"s2"} if good else {"s2", "s3", "s5"})

    def test_a_guest_that_did_not_start_says_nothing_of_the_next(self, repository: Repository) -> None:
        verified(repository, "s2", "boot", 1, "no sign of life")
        assert set(read_catalog(repository, "web01").failed_sets) == {"s2"}
        verified(repository, "s1", "image", 1, "vda: errors")
        assert set(read_catalog(repository, "web01").failed_sets) == {"s1", "s2", "s3"}


class TestLeftovers:
    """All that is there besides sets is named."""

    def told(self, repository: Repository, vm: str = "web01") -> dict[str, str]:
        found = leftovers(repository, read_catalog(repository, vm))
        assert {entry["vm"] for entry in found} <= {vm}
        return {os.path.basename(entry["path"]): entry["what"] for entry in found}

    def test_nothing(self, repository: Repository) -> None:
        put(repository, "s1")
        directory = repository.directory("web01")
        for lock in (".lock", ".prune.lock"):
            with open(os.path.join(directory, lock), "w", encoding="ascii"):
                pass
        write_annotation(repository, "web01", Protection("s1", TIME))
        write_annotation(repository, "web01", Pin("s1", "vda", "/gone", "hv2", "another", TIME))
        assert self.told(repository) == {}

    def test_what_killed_processes_leave(self, repository: Repository) -> None:
        put(repository, "s1")
        directory = repository.directory("web01")
        for entry in (
            ".s2.staging",
            ".s0.removed",
            "s9",
            ".s1.vda.qcow2" + CONSOLIDATING_SUFFIX,
            ".s1.protected.json.new",
        ):
            os.mkdir(os.path.join(directory, entry))
        failure = Failure("r", "a", "s3", "failed", "full", TIME, TIME)
        write(os.path.join(repository.directory("web01"), failure_name("s3")), asdict(failure))
        assert self.told(repository) == {
            ".s0.removed": "left by a process that was killed",
            ".s1.protected.json.new": "left by a process that was killed",
            ".s1.vda.qcow2.consolidating": "an increment that becomes a full image, or was to; the next prune goes on",
            ".s2.staging": "left by a process that was killed",
            ".s3.failed.json": "set s3 failed: full",
            "s9": "no set: no valid manifest",
        }

    def test_what_is_said_of_nothing(self, repository: Repository) -> None:
        put(repository, "s1")
        write_annotation(repository, "web01", Protection("s0", TIME))
        write_annotation(repository, "web01", Pin("s1", "vda", "/gone/vda.qcow2", "hv1", machine_id(), TIME))
        assert sorted(self.told(repository).values()) == [
            "/gone/vda.qcow2, which has read set s1, is gone",
            "said of set s0, which is gone",
        ]


class TestNames:
    """The VMs of a repository."""

    def test_names_are_those_in_the_manifests(self, repository: Repository) -> None:
        put(repository, "s1", vm="web 01/ä")
        put(repository, "s1", vm="web02")
        assert vm_names(repository) == ["web 01/ä", "web02"]

    def test_a_vm_of_which_no_set_has_come_to_be(self, repository: Repository) -> None:
        os.mkdir(repository.directory("web03"))
        assert vm_names(repository) == []
        failure = Failure("r", "a", "s3", "failed", "full", TIME, TIME)
        write(os.path.join(repository.directory("web03"), failure_name("s3")), asdict(failure))
        assert vm_names(repository) == ["web03"]

    def test_a_vm_whose_first_set_is_being_made(self, repository: Repository) -> None:
        name = "web 01/ä"
        os.mkdir(repository.directory(name))
        staging.begin(repository, intent(vm=VmName(name, UUID, UUID)))
        assert vm_names(repository) == [name]

    @pytest.mark.parametrize("document", ["s1/manifest.json", ".s1.staging/intent.json"])
    def test_a_vm_that_cannot_be_read_is_named_by_its_directory(self, repository: Repository, document: str) -> None:
        put(repository, "s1")
        for vm in ("web02", "web03"):
            path = os.path.join(repository.directory(vm), document)
            os.makedirs(os.path.dirname(path))
            if vm == "web02":
                os.symlink(path, path)
            else:
                write(path, {"schema": SCHEMA + 1})
        assert vm_names(repository) == ["web01", "web02", "web03"]

    def test_what_is_no_vm(self, repository: Repository) -> None:
        put(repository, "s1", vm="lost+found")
        os.rename(repository.directory("lost+found"), os.path.join(repository.path, "lost+found"))
        os.mkdir(os.path.join(repository.path, "exports"))
        assert vm_names(repository) == []
