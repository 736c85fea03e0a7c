# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a prune would change, and what is told of it."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import (
    Pruned,
    PruneOptions,
    check_protection,
    headline,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import RetentionDecision, Rules
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Protection, SetAnnotations
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import VmCatalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import manifest


def test_which_marks_would_change() -> None:
    there = VmCatalog(
        "web01", VmRecords((manifest("s1"), manifest("s2"))), SetAnnotations((Protection("s1", "now"),)), {}
    )
    for protect, unprotect, changes in (
        ((), (), False),
        (("s1",), (), False),
        (("s2",), (), True),
        ((), ("s1",), True),
        ((), ("s2",), False),
    ):
        assert check_protection(there, PruneOptions(Rules(), protect=protect, unprotect=unprotect)) == changes
    for options in (PruneOptions(Rules(), protect=("s9",)), PruneOptions(Rules(), unprotect=("s9",))):
        with pytest.raises(Refused, match=r"protect: VM web01 has no set s9"):
            check_protection(there, options)


def test_what_counts_as_a_change() -> None:
    stays, goes = RetentionDecision("s1", True, "last"), RetentionDecision("s1", False, "no rule")
    assert not Pruned("web01", (stays,), {}).changed
    assert Pruned("web01", (goes,), {}).changed
    assert Pruned("web01", (stays,), {}, protection_changed=True).changed
    assert Pruned("web01", (RetentionDecision("s1", True, "last", consolidate=True),), {}).changed


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
        ([KEPT, GONE], "1 set (1.0 MiB) removed, 2 kept", "1 set (1.0 MiB) would be removed, 2 kept"),
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
