# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What keeps sets besides the rules: said of them, read of them, built on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import machine_id
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import read_constraints
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    Pin,
    Protection,
    SetAnnotations,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import VmCatalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image, intent

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest


def manifest(set_id: str, below: str | None = None) -> Manifest:
    return builders.manifest(set_id, image("vda", below), sequence=int(set_id[1:]))


def catalog(*sets: Manifest, annotations: SetAnnotations | None = None, **more: Any) -> VmCatalog:
    return VmCatalog(
        "web01", VmRecords(sets, more.pop("intents", ())), annotations or SetAnnotations(), more.pop("broken", {})
    )


def pin(path: str, machine: str = "") -> Pin:
    return Pin("s1", "vda", path, "hv1", machine or machine_id(), "now")


def test_nothing_is_said() -> None:
    found = read_constraints(catalog(manifest("s1")), allow_remove_last=False)
    assert (found.guarded, found.broken, found.in_use, found.allow_remove_last) == ({}, {}, {}, False)
    assert read_constraints(catalog(), allow_remove_last=True).allow_remove_last


def test_protected() -> None:
    found = read_constraints(
        catalog(manifest("s1"), annotations=SetAnnotations((Protection("s1", "now"),))), allow_remove_last=False
    )
    assert (found.guarded, found.in_use) == ({"s1": "it is protected"}, {})


def test_pins_of_this_machine_and_of_another(tmp_path: Path) -> None:
    path = tmp_path / "look"
    for mark, reads in ((pin(str(path)), False), (pin(str(path), "another"), True)):
        found = read_constraints(
            catalog(manifest("s1"), annotations=SetAnnotations(pins=(mark,))), allow_remove_last=False
        )
        assert found.guarded == found.in_use == ({"s1": f"{path} on hv1 reads it"} if reads else {})
    path.touch()
    assert read_constraints(
        catalog(manifest("s1"), annotations=SetAnnotations(pins=(pin(str(path)),))), allow_remove_last=False
    ).in_use


def test_what_a_set_builds_on_that_is_being_made() -> None:
    sets = [manifest("s1"), manifest("s2", "s1"), manifest("s3", "s2")]
    found = read_constraints(
        catalog(*sets, intents=(intent("s9", image("vda", "s3"), image("vdb", "s1"), image("vdc")),)),
        allow_remove_last=True,
    )
    reason = "set s9, which is being made, builds on it"
    assert found.guarded == {"s3": reason, "s1": reason}
    # It is written to no more, and only read later.
    assert found.in_use == {}


def test_broken_by_its_files_or_by_its_verification() -> None:
    sets = [manifest("s1"), manifest("s2", "s1"), manifest("s3")]
    annotations = SetAnnotations(verifications=(Verification("s1", "attempt-s1", "image", "now", ("bad",)),))
    found = read_constraints(
        catalog(*sets, annotations=annotations, broken={("s3", "vda"): "gone"}), allow_remove_last=False
    )
    assert found.broken == {
        "s1": "bad",
        "s2": "set s1 below it has failed its verification: bad",
        "s3": "disk vda: gone",
    }
