# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said of sets that were looked at, and what is not taken for a fault of theirs."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import PruneOptions as PruneOrder
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import prune
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import Rules
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    read_annotations,
    remove_annotations,
    write_annotation,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import Depth, read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    DiskImage,
    Manifest,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._verify import boot_options, image_check, model
from ansible_collections.vmfleet.backup.plugins.module_utils._verify import verify as verify_verify
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import Finding, VerifyOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.verify import bad_sets, describe, headline
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import manifest, put

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

VM = "web01"
THEN = "2026-11-23T00:00:00Z"
NOW = "2026-11-24T00:00:00Z"


def image(name: str, below: str | None = None, **more: Any) -> DiskImage:
    return builders.image(name, below, **{"bytes": 7, **more})


def publish(repository: Repository, number: int, *images: DiskImage) -> Manifest:
    """A set whose images are seven bytes of anything."""
    made = manifest(f"s{number}", disks=images, sequence=number, started=THEN, finished=THEN)
    directory = put(repository, made, b"content")
    (directory / "vm.json").write_text(json.dumps({"schema": 1}))
    return made


def verify(repository: Repository, depth: str = Depth.MANIFEST, set_id: str = "", check: bool = False) -> list[Finding]:
    findings, warnings = asyncio.run(
        verify_verify.verify_all(repository, [VM], set_id, VerifyOptions(depth, check_mode=check))
    )
    assert not warnings
    return findings


def test_good_set(repository: Repository) -> None:
    publish(repository, 1, image("a"), image("b"))
    publish(repository, 2, image("a", "s1"), image("b", "s1"))
    assert verify(repository) == [Finding(VM, "s2", disk, Depth.MANIFEST) for disk in "ab"]
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.id, mark.attempt, mark.depth, mark.errors) == ("s2", "attempt-s2", Depth.MANIFEST, ())


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


def start_from(repository: Repository, place: Path, set_id: str = "") -> list[Finding]:
    """Look as deep as it goes, with a QEMU that never starts anything."""
    wish = boot_options.BootOptions("/bin/false", str(place), 1, "x", agent=False)
    findings, warnings = asyncio.run(
        verify_verify.verify_all(repository, [VM], set_id, VerifyOptions(Depth.BOOT, wish))
    )
    assert not warnings
    return findings


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
    pruned = asyncio.run(prune(repository, VM, PruneOrder(Rules(last=2))))
    assert [fate.id for fate in pruned.fates if fate.keep] == ["s1", "s2", "s3", "s4", "s5", "s6"]


def test_a_set_with_faults_of_its_own_is_not_started(repository: Repository, tmp_path: Path) -> None:
    publish(repository, 1)
    [found] = start_from(repository, tmp_path)
    assert found.depth == Depth.MANIFEST
    assert found.error.endswith("has no disk; not started, since the set is not good")
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.depth, mark.errors) == (Depth.MANIFEST, (found.error,))


def test_of_two_faults_the_deeper_one_is_not_forgotten(repository: Repository) -> None:
    publish(repository, 1, image("a"), image("b", sha256="0" * 64))
    missing = Path(repository.set_path(VM, "s1")) / "a.qcow2"
    missing.rename(missing.with_name("elsewhere"))
    assert [one.depth for one in verify(repository, Depth.IMAGE)] == [Depth.MANIFEST, Depth.MANIFEST, Depth.CHECKSUM]
    missing.with_name("elsewhere").rename(missing)
    _findings, [warning] = asyncio.run(verify_verify.verify_all(repository, [VM], "", VerifyOptions(Depth.MANIFEST)))
    assert "what depth checksum found" in warning
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.ok, mark.depth) == (False, Depth.CHECKSUM)


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
    repository: Repository, before: str, errors: tuple[str, ...], depth: str, kept: bool
) -> None:
    manifest = publish(repository, 1, image("a"))
    write_annotation(repository, VM, Verification("s1", manifest.attempt, before, NOW, errors))
    _findings, warnings = asyncio.run(verify_verify.verify_all(repository, [VM], "", VerifyOptions(depth)))
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
    manifest = publish(repository, 1, image("a"))
    write_annotation(repository, VM, Verification("s1", manifest.attempt, before, NOW, ("bad",)))
    (Path(repository.set_path(VM, "s1")) / "a.qcow2").unlink()
    # Twice, as the same is not said again.
    for _again in range(2):
        verify(repository, Depth.MANIFEST)
        [mark] = read_annotations(repository, VM).verifications
        assert (mark.depth, len(mark.errors)) == (depth, errors)
        assert "a.qcow2 is missing" in mark.errors[0]


def test_nothing_is_noted_of_another_set_of_the_same_id(repository: Repository) -> None:
    manifest = publish(repository, 1, image("a"))
    work = verify_verify._Verifier(repository, VerifyOptions(Depth.MANIFEST))
    look = model.Look(read_catalog(repository, VM), replace(manifest, attempt="another"))
    asyncio.run(work._record(look))
    assert read_annotations(repository, VM).verifications == ()


def test_check_mode(repository: Repository) -> None:
    publish(repository, 1, image("a"))
    before = sorted(os.listdir(repository.directory(VM)))
    assert verify(repository, check=True) == [Finding(VM, "s1", "a", Depth.MANIFEST)]
    assert sorted(os.listdir(repository.directory(VM))) == before


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((), "has no disk"),
        ((image("a", image="../s1/a.qcow2"),), "does not name one file of the set for each disk"),
        ((image("a"), image("b", image="a.qcow2")), "does not name one file of the set for each disk"),
    ],
)
def test_odd_manifests(repository: Repository, images: tuple[DiskImage, ...], message: str) -> None:
    publish(repository, 1, *images)
    found = verify(repository)[0]
    assert found.disk == ""
    assert message in found.error


def test_what_is_not_the_sets_fault(repository: Repository) -> None:
    manifest = publish(repository, 1, image("a"))
    work = verify_verify._Verifier(repository, VerifyOptions(Depth.BOOT))
    look = model.Look(read_catalog(repository, VM), manifest)
    for guilty, depth, errors in ((True, Depth.BOOT, ("there is no room",)), (False, Depth.IMAGE, ())):
        look.fail("", Depth.BOOT, "there is no room", guilty=guilty)
        asyncio.run(work._record(look))
        [mark] = read_annotations(repository, VM).verifications
        assert (mark.depth, mark.errors) == (depth, errors)
        remove_annotations(repository, VM, [mark])


def test_a_description_that_makes_no_sense(repository: Repository, tmp_path: Path) -> None:
    """It is JSON, but its parts are not what they should be."""
    manifest = publish(repository, 1)
    (Path(repository.set_path(VM, "s1")) / "vm.json").write_text(json.dumps({"schema": 1, "cpus": 4}))
    work = verify_verify._Verifier(repository, VerifyOptions(Depth.BOOT))
    wish = boot_options.BootOptions("/bin/false", str(tmp_path), 1, "x", agent=False)
    ending = asyncio.run(work._start(model.Look(read_catalog(repository, VM), manifest), wish))
    assert "vm.json does not describe a VM" in ending.error
    assert ending.guilty


def test_vms_of_a_repository(repository: Repository) -> None:
    publish(repository, 1, image("a"))
    for path in ("gone/s1/disk.qcow2", "reports/today/page.html", "notes/todo"):
        Path(repository.path, path).parent.mkdir(parents=True)
        Path(repository.path, path).touch()
    assert verify_verify.known_vms(repository) == ["gone", VM]


def spoil(repository: Repository, path: str, text: str) -> None:
    """Put something that cannot be read where a document of a VM stands."""
    document = Path(repository.path, path)
    document.parent.mkdir(parents=True)
    if text:
        document.write_text(text)
    else:
        document.symlink_to(document)


@pytest.mark.parametrize("text", ['{"schema": 99}', ""], ids=["newer", "unreadable"])
@pytest.mark.parametrize("document", ["s1/manifest.json", ".s1.staging/intent.json", ".s1.staging/manifest.json"])
def test_one_vm_that_cannot_be_read_does_not_stop_the_others(repository: Repository, document: str, text: str) -> None:
    publish(repository, 1, image("a"))
    spoil(repository, f"db01/{document}", text)
    names = verify_verify.known_vms(repository)
    assert names == ["db01", VM]
    findings, warnings = asyncio.run(verify_verify.verify_all(repository, names, "", VerifyOptions(Depth.MANIFEST)))
    assert [(one.vm, bool(one.error)) for one in findings] == [("db01", True), (VM, False)]
    assert document in findings[0].error
    assert not warnings


def test_what_may_be_a_vm_is_not_passed_over(repository: Repository) -> None:
    """It leads to where nobody gets to, as a file server that does not answer."""
    publish(repository, 1, image("a"))
    for name in ("db01", "lost+found"):
        Path(repository.path, name).symlink_to(Path(repository.path, name))
    assert verify_verify.known_vms(repository) == ["db01", VM]


def test_long_complaints_are_cut() -> None:
    assert image_check.shorten("one\n\ntwo") == "one / two"
    assert image_check.shorten("\n".join("abcde")) == "a / b / c and 2 more lines"


def test_results() -> None:
    assert "console" not in Finding(VM, "s1", "a", Depth.BOOT).result()
    assert Finding(VM, "s1", "", Depth.BOOT, console=("x",)).result()["console"] == ["x"]
    assert Finding(VM, "", "", Depth.MANIFEST, "wrong").where == "VM web01: wrong"
    assert Finding(VM, "s1", "a", Depth.MANIFEST, "wrong").where == "VM web01, set s1: disk a: wrong"


class TestText:
    """What is told of all sets."""

    FOUND = (
        Finding("web01", "s2", "vda", Depth.CHECKSUM),
        Finding("web01", "s2", "vdb", Depth.CHECKSUM, note="vdb: it has no checksum"),
        Finding("web01", "s1", "vda", Depth.CHECKSUM, "the image has changed"),
        Finding("web01", "s1", "vdb", Depth.CHECKSUM),
        Finding("db01", "s2", "", Depth.BOOT, "no sign of life", console=("Booting", "panic")),
        Finding("mail01", "s2", "", Depth.MANIFEST),
    )

    def test_what_is_not_good_comes_first_with_the_last_lines_of_its_console(self) -> None:
        assert describe(self.FOUND) == [
            "NOT GOOD  web01/s1  vda: the image has changed",
            "NOT GOOD  db01/s2  no sign of life",
            "          | Booting",
            "          | panic",
            "good      mail01/s2  ",
            "good      web01/s2  vda, vdb",
            "          vdb: it has no checksum",
        ]

    def test_a_set_is_bad_if_one_of_its_disks_is(self) -> None:
        assert bad_sets(self.FOUND) == ["web01/s1", "db01/s2"]
        assert headline(self.FOUND) == "2 of 4 sets are good"

    def test_no_set(self) -> None:
        assert (bad_sets(()), headline(()), describe(())) == ([], "0 of 0 sets are good", [])
