# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done otherwise than planned when a set is started, and what is said of that."""

from __future__ import annotations

from dataclasses import replace

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.start import changes, keep_planned_fulls
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.decide import decide
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import (
    MONDAY,
    REQUEST,
    TERMS,
    tracked,
    vm,
)


def test_what_was_planned_as_a_full_stays_one() -> None:
    planned = decide(REQUEST, Observation(vm()), VmRecords(), TERMS).plan
    now = Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "b-vdb"), tracked("new", "b")))
    records = VmRecords(sets=(MONDAY,))
    bolder = decide(REQUEST, now, records, TERMS)
    assert [link.level for link in bolder.links] == ["incremental", "incremental", "full"]
    safe = keep_planned_fulls(bolder, planned)
    assert [(link.level, link.bitmap) for link in safe.links] == [("full", "")] * 3
    assert [(disk.level, disk.parent) for disk in safe.plan.disks] == [("full", None)] * 3
    assert safe.plan.level == "full"
    assert safe.plan.disks[0].reason == "it is the VM's first set"
    assert changes(planned, safe.plan.disks) == ()
    # A plan that was to attach, or to finish another set first, has said nothing of this one's disks.
    for action in ("attach", "finish", "fail"):
        assert keep_planned_fulls(bolder, replace(planned, action=action)) == bolder
        assert changes(replace(planned, action=action), bolder.plan.disks) == ()


def test_what_goes_otherwise_than_planned_is_said() -> None:
    both = Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "b-vdb")))
    planned = decide(REQUEST, both, VmRecords(sets=(MONDAY,)), TERMS).plan
    now = decide(
        REQUEST, Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "gone"))), VmRecords(sets=(MONDAY,)), TERMS
    )
    [said] = changes(planned, keep_planned_fulls(now, planned).plan.disks)
    assert said.startswith("disk vdb is full instead of incremental: the record of the changes since set monday")
    lost = decide(REQUEST, Observation(vm(tracked("vda", "b-vda"))), VmRecords(sets=(MONDAY,)), TERMS)
    assert changes(planned, lost.plan.disks) == (
        "disk vdb is not in the set, because the VM has lost it since the plan",
    )
