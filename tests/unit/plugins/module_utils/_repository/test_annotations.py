# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said of sets, beside them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import kept_warnings
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import SCHEMA
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    Pin,
    Protection,
    SetAnnotations,
    Verification,
    annotation_name,
    read_annotations,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Failure
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import (
    remove_annotations,
    write_annotation,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import failure_name
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import TIME, manifest, write

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

PROTECTION = Protection("s1", "2026-11-22T01:00:00Z")
PIN = Pin("s1", "vda", "/look/vda.qcow2", "hv1", "machine", "2026-11-22T01:00:00Z")
VERIFICATION = Verification("s1", "a1", "checksum", "2026-11-22T01:00:00Z", ("vda: changed",))


def test_marks_come_back_as_they_were_written_and_go(repository: Repository) -> None:
    assert read_annotations(repository, "nosuch") == read_annotations(repository, "web01") == SetAnnotations()
    for mark in (PROTECTION, PIN, VERIFICATION):
        write_annotation(repository, "web01", mark)
    annotations = read_annotations(repository, "web01")
    assert annotations == SetAnnotations((PROTECTION,), (PIN,), (VERIFICATION,))
    assert (annotations.protected("s1"), annotations.protected("s2")) == (True, False)
    assert (annotations.pins_of("s1"), annotations.pins_of("s2")) == ((PIN,), ())
    remove_annotations(repository, "web01", [PROTECTION, PIN, VERIFICATION, PROTECTION])
    assert os.listdir(repository.directory("web01")) == []


def test_a_verification_is_of_one_attempt(repository: Repository) -> None:
    write_annotation(repository, "web01", VERIFICATION)
    made = manifest("s1", attempt="a1")
    assert read_annotations(repository, "web01").verification(made) == VERIFICATION
    # The set was removed, and made again under the same id.
    assert read_annotations(repository, "web01").verification(replace(made, attempt="a2")) is None


def test_a_verification_replaces_the_one_before_and_an_overlay_has_one_pin(repository: Repository) -> None:
    others = [
        replace(PIN, path="/look/vdb.qcow2"),
        replace(PIN, machine_id="another"),
        replace(PIN, id="s2"),
    ]
    for verification in (VERIFICATION, replace(VERIFICATION, errors=())):
        write_annotation(repository, "web01", verification)
    for pin in (PIN, replace(PIN, since="2027-01-01T00:00:00Z"), *others):
        write_annotation(repository, "web01", pin)
    annotations = read_annotations(repository, "web01")
    assert [mark.ok for mark in annotations.verifications] == [True]
    assert {*annotations.pins} == {replace(PIN, since="2027-01-01T00:00:00Z"), *others}


def test_ids_that_look_like_marks_are_none(repository: Repository) -> None:
    for set_id in ("a.protected", "a.verified", "a.pin-00000000", "a.pin-b"):
        failure = Failure("run", "a1", set_id, "failed", "x", TIME, TIME)
        write(os.path.join(repository.directory("web01"), failure_name(set_id)), asdict(failure))
        write_annotation(repository, "web01", replace(PROTECTION, id=set_id))
    annotations = read_annotations(repository, "web01")
    assert sorted(mark.id for mark in annotations.protections) == [
        "a.pin-00000000",
        "a.pin-b",
        "a.protected",
        "a.verified",
    ]
    assert (annotations.pins, annotations.verifications) == ((), ())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "damaged or misplaced (it is not JSON"),
        ("{}", "damaged or misplaced (it has no schema number)"),
        ('{"schema": 1}', "damaged or misplaced (id: it is missing)"),
        (json.dumps(asdict(replace(PROTECTION, id="s2"))), "damaged or misplaced (it is of set s2"),
        (json.dumps({**asdict(PROTECTION), "schema": SCHEMA + 1}), f"its schema {SCHEMA + 1} is newer"),
    ],
)
def test_marks_that_cannot_be_used_are_told(repository: Repository, content: str, reason: str) -> None:
    name = annotation_name(PROTECTION)
    Path(repository.directory("web01"), name).write_text(content, encoding="utf-8")
    found = read_annotations(repository, "web01")
    assert replace(found, odd={}) == SetAnnotations()
    assert reason in found.odd[name]
    assert kept_warnings() == [f"VM web01: 1 entries cannot be used: {found.odd[name]}"]
