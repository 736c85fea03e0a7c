# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Results, for machines and for people."""

from __future__ import annotations

from ansible_collections.vmfleet.backup.plugins.module_utils._documents import DiskImage, Parent
from ansible_collections.vmfleet.backup.plugins.module_utils._outcome import (
    DiskOutcome,
    Outcome,
    describe,
    of_disks,
    results,
    summarize,
)

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


def test_warnings_stand_below_their_vm() -> None:
    outcome = Outcome(
        "db01", "s1", "published", "full", 3 << 20, 1.25, "filesystem", frozen_ms=80, path="/p", warnings=("careful",)
    )
    assert describe([outcome]) == [
        "published  db01  full, filesystem consistent (frozen for 80 ms), 3.0 MiB in 1.2 s, /p (was there)",
        "                 careful",
    ]


def test_the_disks_of_a_set() -> None:
    image = DiskImage("vda", "n0", "", "/src", "qcow2", 1, "full", "why", None, "vda.qcow2", "qcow2", "none", bytes=7)
    later = DiskImage("vdb", "n0", "", "/src", "qcow2", 1, "incremental", "changes", Parent("s0", None), "", "", "")
    assert of_disks([image, later]) == (
        DiskOutcome("vda", "full", "why", None, 7),
        DiskOutcome("vdb", "incremental", "changes", "s0", 0),
    )
    assert results([Outcome("a", "b", "published", disks=of_disks([image]))])[0]["disks"][0]["reason"] == "why"
