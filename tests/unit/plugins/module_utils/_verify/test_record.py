# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is written beside sets: no fault is hidden, and none is noted that is not theirs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import PruneOptions, prune
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import Rules
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    Depth,
    Verification,
    read_annotations,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import (
    remove_annotations,
    write_annotation,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import SetCheck, VerifyOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.record import record
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.run import VerifyRun
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.verify import verify_all
from ansible_collections.vmfleet.backup.tests.unit.plugins.verifying import VM, image, publish, start_from, verify

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


NOW = "2026-11-24T00:00:00Z"


def test_damage_is_noted_with_the_set_that_it_is_in(repository: Repository) -> None:
    wrong = "0" * 64
    publish(repository, 1, image("a"), image("b"))
    publish(repository, 2, image("a", "s1", sha256=wrong), image("b", "s1"))
    publish(repository, 3, image("a", "s2"), image("b", "s2"))
    [a, b] = verify(repository, Depth.CHECKSUM)
    assert a.depth == Depth.CHECKSUM
    assert "s2/a.qcow2 is not what was written" in a.error
    assert not b.error
    assert b.note.count("qcow2") == 3
    marks = {mark.id: mark for mark in read_annotations(repository, VM).verifications}
    assert set(marks) == {"s2", "s3"}
    assert not any(mark.ok for mark in marks.values())
    # A good look at the full one says nothing about the others.
    verify(repository, Depth.CHECKSUM, "s1")
    marks = {mark.id: mark for mark in read_annotations(repository, VM).verifications}
    assert [marks[set_id].ok for set_id in ("s1", "s2", "s3")] == [True, False, False]


def test_a_deep_look_does_not_hide_how_shallow_a_fault_is(repository: Repository, tmp_path: Path) -> None:
    """The sets between the damaged one and the one that was looked at are not to be relied on either."""
    publish(repository, 1, image("a"))
    publish(repository, 2, image("a", "s1"))
    publish(repository, 3, image("a", sha256="0" * 64))
    for number in (4, 5, 6):
        publish(repository, number, image("a", f"s{number - 1}"))
    found = start_from(repository, tmp_path)
    assert [(one.id, one.disk, one.depth) for one in found] == [("s6", "", Depth.BOOT), ("s6", "a", Depth.CHECKSUM)]
    marks = {mark.id: mark for mark in read_annotations(repository, VM).verifications}
    assert {set_id: (mark.depth, len(mark.errors)) for set_id, mark in marks.items()} == {
        "s3": (Depth.CHECKSUM, 1),
        "s6": (Depth.CHECKSUM, 1),
    }
    held = read_catalog(repository, VM)
    assert set(held.failed_sets) == {"s3", "s4", "s5", "s6"}
    pruned = asyncio.run(prune(repository, VM, PruneOptions(Rules(last=2))))
    assert [one.id for one in pruned.decisions if one.keep] == ["s1", "s2", "s3", "s4", "s5", "s6"]


def test_of_two_faults_the_deeper_one_is_not_forgotten(repository: Repository) -> None:
    publish(repository, 1, image("a"), image("b", sha256="0" * 64))
    missing = Path(repository.set_path(VM, "s1")) / "a.qcow2"
    missing.rename(missing.with_name("elsewhere"))
    assert [one.depth for one in verify(repository, Depth.IMAGE)] == [Depth.MANIFEST, Depth.MANIFEST, Depth.CHECKSUM]
    missing.with_name("elsewhere").rename(missing)
    _findings, [warning] = asyncio.run(verify_all(repository, [VM], "", VerifyOptions(Depth.MANIFEST)))
    assert "because its verification with depth checksum failed" in warning
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.ok, mark.depth) == (False, Depth.CHECKSUM)


def test_checksums_that_nobody_could_compare_are_not_noted(repository: Repository) -> None:
    made = publish(repository, 1, image("a"))
    # It is good again all the same: with this depth, nothing more can be looked at.
    write_annotation(repository, VM, Verification("s1", made.attempt, Depth.CHECKSUM, NOW, ("bad",)))
    verify(repository, Depth.CHECKSUM)
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.ok, mark.depth) == (True, Depth.MANIFEST)
    assert read_catalog(repository, VM).failed_sets == {}


@pytest.mark.parametrize(
    ("before", "errors", "depth", "kept"),
    [
        (Depth.CHECKSUM, ("bad",), Depth.MANIFEST, True),
        (Depth.MANIFEST, ("bad",), Depth.CHECKSUM, False),
        (Depth.CHECKSUM, ("bad",), Depth.CHECKSUM, False),
        (Depth.CHECKSUM, (), Depth.MANIFEST, False),
        # As a later release may call it.
        ("bits", ("bad",), Depth.CHECKSUM, True),
    ],
)
def test_what_a_deeper_look_has_found(
    repository: Repository, before: str, errors: tuple[str, ...], depth: Depth, kept: bool
) -> None:
    made = publish(repository, 1, image("a"))
    write_annotation(repository, VM, Verification("s1", made.attempt, before, NOW, errors))
    _findings, warnings = asyncio.run(verify_all(repository, [VM], "", VerifyOptions(depth)))
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.when == NOW) == kept
    assert bool(warnings) == kept


@pytest.mark.parametrize(
    ("before", "depth", "errors"),
    [
        (Depth.MANIFEST, Depth.MANIFEST, 1),
        (Depth.IMAGE, Depth.IMAGE, 2),
        ("bits", "bits", 2),
        (Depth.BOOT, Depth.MANIFEST, 1),
    ],
)
def test_another_fault_does_not_hide_a_deeper_one(repository: Repository, before: str, depth: str, errors: int) -> None:
    made = publish(repository, 1, image("a"))
    write_annotation(repository, VM, Verification("s1", made.attempt, before, NOW, ("bad",)))
    (Path(repository.set_path(VM, "s1")) / "a.qcow2").unlink()
    # Twice, as the same is not said again.
    for _again in range(2):
        verify(repository, Depth.MANIFEST)
        [mark] = read_annotations(repository, VM).verifications
        assert (mark.depth, len(mark.errors)) == (depth, errors)
        assert "a.qcow2 is missing" in mark.errors[0]


def test_nothing_is_noted_of_another_set_of_the_same_id(repository: Repository) -> None:
    made = publish(repository, 1, image("a"))
    run = VerifyRun(repository, VerifyOptions(Depth.MANIFEST))
    check = SetCheck(read_catalog(repository, VM), replace(made, attempt="another"))
    asyncio.run(record(run, check))
    assert read_annotations(repository, VM).verifications == ()


def test_what_is_not_the_sets_fault(repository: Repository) -> None:
    made = publish(repository, 1, image("a"))
    run = VerifyRun(repository, VerifyOptions(Depth.BOOT))
    check = SetCheck(read_catalog(repository, VM), made)
    for is_backup_fault, depth, errors in ((True, Depth.BOOT, ("there is no room",)), (False, Depth.IMAGE, ())):
        check.fail("", Depth.BOOT, "there is no room", is_backup_fault=is_backup_fault)
        asyncio.run(record(run, check))
        [mark] = read_annotations(repository, VM).verifications
        assert (mark.depth, mark.errors) == (depth, errors)
        remove_annotations(repository, VM, [mark])
