# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Results, for machines and for people."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import (
    DiskOutcome,
    Outcome,
    describe,
    diff,
    failure,
    headline,
    results,
    summarize,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.results import disk_outcomes
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image

OUTCOMES = [
    Outcome("web01", "s1", "failed", error="target full", changed=True),
    Outcome("db01", "s1", "published", "full", 3 << 20, 1.25, "crash", path="/srv/db01/s1", changed=True),
    Outcome("mail01", "s1", "published", "incremental", 5 << 20, 2.0, "crash", path="/srv/mail01/s1"),
    Outcome("old", "s1", "skipped", reason="migrating (inmigrate)"),
]


def test_results_read_well_and_end_with_what_went_wrong() -> None:
    assert describe(OUTCOMES) == [
        "published  db01    full, crash consistent, 3.0 MiB in 1.2 s, /srv/db01/s1",
        "published  mail01  incremental, crash consistent, 5.0 MiB in 2.0 s, /srv/mail01/s1 (was there)",
        "skipped    old     migrating (inmigrate)",
        "failed     web01   target full",
    ]


def test_summary() -> None:
    summary = summarize(OUTCOMES)
    assert (summary["published"], summary["failed"], summary["skipped"], summary["running"]) == (2, 1, 1, 0)
    assert (summary["changed"], summary["bytes"]) == (2, 3 << 20)
    # Ansible warns of variables that are not of its own types, and the action plugin returns this as it is.
    assert {type(name) for name in summary} == {str}


def test_the_headline_counts_vms_and_the_kinds_of_their_sets() -> None:
    assert headline(OUTCOMES, "completed").splitlines() == [
        "2 of 4 VMs have their set, 1 failed, 1 skipped, 3.0 MiB written",
        "1 full, 1 incremental, 2 crash consistent",
    ]


def test_the_headline_of_sets_that_differ_in_all_ways() -> None:
    outcomes = [
        Outcome("a", "s1", "published", "full", 1, consistency="filesystem"),
        Outcome("b", "s1", "published", "differential", 1, consistency="crash"),
        Outcome("c", "s1", "published", "full", 1, consistency="crash"),
        Outcome("d", "s1", "cancelled", level="incremental", consistency="crash"),
    ]
    assert headline(outcomes, "started").splitlines() == [
        "3 of 4 VMs have their set, 1 failed, 0 skipped, nothing written",
        "1 differential, 2 full, 2 crash consistent, 1 filesystem consistent",
    ]


def test_the_headline_where_there_is_no_set_is_one_line() -> None:
    outcome = Outcome("web01", "s1", "failed", error="target full")
    assert headline([outcome], "completed") == "0 of 1 VMs have their set, 1 failed, 0 skipped, nothing written"


@pytest.mark.parametrize(
    ("wanted", "check_mode", "said"),
    [
        ("cancelled", False, "2 sets cancelled"),
        ("cancelled", True, "2 sets would be cancelled"),
        ("untracked", False, "2 VMs untracked"),
        ("untracked", True, "2 VMs would be untracked"),
    ],
)
def test_the_headline_of_what_was_stopped(wanted: str, check_mode: bool, said: str) -> None:
    outcomes = [Outcome("a", "", wanted), Outcome("b", "", "failed", error="no"), Outcome("c", "", wanted)]
    assert headline(outcomes, wanted, check_mode) == said


def test_the_headline_where_there_is_nothing_to_cancel() -> None:
    assert headline([], "cancelled") == headline([], "cancelled", check_mode=True) == "no set is being made"


def test_warnings_stand_below_their_vm() -> None:
    outcome = Outcome(
        "db01", "s1", "published", "full", 3 << 20, 1.25, "filesystem", frozen_ms=80, path="/p", warnings=("careful",)
    )
    assert describe([outcome]) == [
        "published  db01  full, filesystem consistent (frozen for 80 ms), 3.0 MiB in 1.2 s, /p (was there)",
        "                 careful",
    ]


def test_the_disks_of_a_set() -> None:
    full, later = image("vda", reason="why", bytes=7), image("vdb", "s0", reason="changes")
    assert disk_outcomes([full, later]) == (
        DiskOutcome("vda", "full", "why", None, 7),
        DiskOutcome("vdb", "incremental", "changes", "s0", 0),
    )
    assert results([Outcome("a", "b", "published", disks=disk_outcomes([full]))])[0]["disks"][0]["reason"] == "why"


def test_failures_are_told_with_their_reasons_and_what_to_do() -> None:
    assert failure(OUTCOMES, "s1", "completed") == (
        "1 of 4 VMs have no set s1: web01: target full. Run the backup again with id s1: it does not change sets that"
        " exist"
    )
    cancelled = Outcome("db01", "s1", "cancelled", error="on request")
    assert failure([cancelled], "s1", "started").startswith("1 of 1 VMs have no set s1: db01: on request.")
    assert failure([cancelled, OUTCOMES[0]], "s1", "cancelled") == (
        "1 of 2 VMs could not be cancelled: web01: target full"
    )
    assert not failure([cancelled], "s1", "cancelled")
    assert not failure(OUTCOMES[1:], "s1", "completed")


def test_a_difference_is_what_has_changed() -> None:
    assert diff(OUTCOMES[1:3]) == {
        "before": "db01/s1: not published\nmail01/s1: published\n",
        "after": "db01/s1: published\nmail01/s1: published\n",
    }


LONG = "x" * 200


def test_a_long_name_has_a_long_line_alone() -> None:
    outcomes = [Outcome(name, "s1", "skipped", reason="why", warnings=("odd",)) for name in ("web01", LONG)]
    short, warning, long, _other = describe(outcomes)
    assert short == f"skipped    {'web01':32}  why"
    assert warning == " " * 45 + "odd"
    assert long == f"skipped    {LONG}  why"


def test_names_of_like_length_stand_in_a_column() -> None:
    found = describe([Outcome(name, "s1", "skipped", reason="why") for name in ("a", "web01")])
    assert found == ["skipped    a      why", "skipped    web01  why"]


@pytest.mark.parametrize(("number", "once"), [(2, False), (3, True), (300, True)])
def test_what_many_are_warned_of_is_said_once(number: int, once: bool) -> None:
    outcomes = [
        Outcome(f"vm{count:03}", "s1", "published", warnings=("not frozen: no agent", f"of its own: {count}"))
        for count in range(number)
    ]
    lost = Outcome("lost", "s1", "failed", error="target full", warnings=("not frozen: no agent",))
    found = describe([lost, *outcomes])
    assert sum("not frozen: no agent" in line for line in found) == (1 if once else number + 1)
    assert sum("of its own" in line for line in found) == number
    if once:
        assert found[-2:] == [
            f"Warning: {number + 1} of {number + 1} VMs: not frozen: no agent",
            "failed     lost   target full",
        ]
