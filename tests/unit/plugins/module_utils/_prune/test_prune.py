# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What keeps sets besides the rules: said of them, read of them, built on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host.machine import machine_id
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import (
    Pruned,
    PruneOptions,
    _check_marks,
    headline,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import RetentionDecision, Rules, condition
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import SetAnnotations
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import VmCatalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    Manifest,
    Pin,
    Protection,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.plugins.modules.backup_prune import rules, seconds
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image, intent

if TYPE_CHECKING:
    from pathlib import Path


def manifest(set_id: str, below: str | None = None) -> Manifest:
    return builders.manifest(set_id, image("vda", below), sequence=int(set_id[1:]))


def held(*sets: Manifest, marks: SetAnnotations | None = None, **more: Any) -> VmCatalog:
    return VmCatalog(
        "web01", VmRecords(sets, more.pop("intents", ())), marks or SetAnnotations(), more.pop("broken", {})
    )


def pin(path: str, machine: str = "") -> Pin:
    return Pin("s1", "vda", path, "hv1", machine or machine_id(), "now")


def test_nothing_is_said() -> None:
    found = condition(held(manifest("s1")), may_go=False)
    assert (found.guarded, found.broken, found.in_use, found.may_go) == ({}, {}, {}, False)
    assert condition(held(), may_go=True).may_go


def test_protected() -> None:
    found = condition(held(manifest("s1"), marks=SetAnnotations((Protection("s1", "now"),))), may_go=False)
    assert (found.guarded, found.in_use) == ({"s1": "it is protected"}, {})


def test_pins_of_this_machine_and_of_another(tmp_path: Path) -> None:
    path = tmp_path / "look"
    for mark, reads in ((pin(str(path)), False), (pin(str(path), "another"), True)):
        found = condition(held(manifest("s1"), marks=SetAnnotations(pins=(mark,))), may_go=False)
        assert found.guarded == found.in_use == ({"s1": f"{path} on hv1 reads it"} if reads else {})
    path.touch()
    assert condition(held(manifest("s1"), marks=SetAnnotations(pins=(pin(str(path)),))), may_go=False).in_use


def test_what_a_set_builds_on_that_is_being_made() -> None:
    sets = [manifest("s1"), manifest("s2", "s1"), manifest("s3", "s2")]
    found = condition(
        held(*sets, intents=(intent("s9", image("vda", "s3"), image("vdb", "s1"), image("vdc")),)), may_go=True
    )
    reason = "set s9, which is being made, builds on it"
    assert found.guarded == {"s3": reason, "s1": reason}
    # It is written to no more, and only read later.
    assert found.in_use == {}


def test_broken_by_its_files_or_by_its_verification() -> None:
    sets = [manifest("s1"), manifest("s2", "s1"), manifest("s3")]
    marks = SetAnnotations(verifications=(Verification("s1", "attempt-s1", "image", "now", ("bad",)),))
    found = condition(held(*sets, marks=marks, broken={("s3", "vda"): "gone"}), may_go=False)
    assert found.broken == {
        "s1": "bad",
        "s2": "set s1 below it has failed its verification: bad",
        "s3": "disk vda: gone",
    }


def test_which_marks_would_change() -> None:
    there = held(manifest("s1"), manifest("s2"), marks=SetAnnotations((Protection("s1", "now"),)))
    for protect, unprotect, changes in (
        ((), (), False),
        (("s1",), (), False),
        (("s2",), (), True),
        ((), ("s1",), True),
        ((), ("s2",), False),
    ):
        assert _check_marks(there, PruneOptions(Rules(), protect=protect, unprotect=unprotect)) == changes
    for order in (PruneOptions(Rules(), protect=("s9",)), PruneOptions(Rules(), unprotect=("s9",))):
        with pytest.raises(Refused, match=r"protect: VM web01 has no set s9"):
            _check_marks(there, order)


def test_what_counts_as_a_change() -> None:
    stays, goes = RetentionDecision("s1", True, "last"), RetentionDecision("s1", False, "no rule")
    assert not Pruned("web01", (stays,), {}).changed
    assert Pruned("web01", (goes,), {}).changed
    assert Pruned("web01", (stays,), {}, marked=True).changed
    assert Pruned("web01", (RetentionDecision("s1", True, "last", consolidate=True),), {}).changed


class TestOptions:
    """The module's options."""

    def given(self, **options: Any) -> dict[str, Any]:
        counts = {f"keep_{name}": 0 for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")}
        others: dict[str, Any] = {"keep_within": None, "names": None, "forget": False, "protect": [], "unprotect": []}
        return {**counts, **others, **options}

    def test_rules(self) -> None:
        assert rules(self.given(keep_last=3, keep_weekly=2, keep_within="36h")) == Rules(
            last=3, weekly=2, within=129600
        )

    def test_marks_alone_keep_everything(self) -> None:
        assert rules(self.given(protect=["s1"])).last > 1 << 30
        # Not so where the VM is to be forgotten.
        assert rules(self.given(protect=["s1"], forget=True, names=["web01"])).empty

    @pytest.mark.parametrize(("text", "days"), [("24h", 1), ("14d", 14), ("2w", 14), ("1y", 365)])
    def test_spans(self, text: str, days: int) -> None:
        assert seconds(text) == 86400 * days

    @pytest.mark.parametrize("text", ["", "14", "d", "-1d", "1.5d", "14 d", "14D", "14m", "14d "])
    def test_no_spans(self, text: str) -> None:
        with pytest.raises(Refused, match=r"^keep_within: "):
            seconds(text)


MIB = 1 << 20
KEPT, GONE, MADE_FULL = (
    Pruned("a", (RetentionDecision("s1", keep=True, reason="last"),), {"s1": MIB}),
    Pruned(
        "b",
        (RetentionDecision("s1", keep=False, reason="no rule"), RetentionDecision("s2", keep=True, reason="last")),
        {"s1": MIB, "s2": 1},
    ),
    Pruned(
        "c",
        (RetentionDecision("s1", keep=False, reason=""), RetentionDecision("s2", True, "", consolidate=True)),
        {"s1": MIB, "s2": 1},
    ),
)


@pytest.mark.parametrize(
    ("pruned", "done", "checked"),
    [
        ([], "nothing to remove, 0 kept", "nothing to remove, 0 kept"),
        ([KEPT], "nothing to remove, 1 kept", "nothing to remove, 1 kept"),
        ([KEPT, GONE], "1 sets (1.0 MiB) removed, 2 kept", "1 sets (1.0 MiB) would be removed, 2 kept"),
        (
            [GONE, MADE_FULL],
            "2 sets (2.0 MiB) removed, 1 made full, 2 kept",
            "2 sets (2.0 MiB) would be removed, 1 would be made full, 2 kept",
        ),
    ],
)
def test_the_headline(pruned: list[Pruned], done: str, checked: str) -> None:
    assert headline(pruned, check_mode=False) == done
    assert headline(pruned, check_mode=True) == checked
