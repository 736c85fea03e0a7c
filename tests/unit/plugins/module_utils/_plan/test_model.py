# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A plan survives the way through Ansible, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.decide import decide
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import (
    Observation,
    Plan,
    Policy,
    Space,
    parse_plan,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.plugins.modules.backup_plan import returned
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import MONDAY, REQUEST, TERMS, VDB, tracked, vm


def test_a_plan_survives_the_way_through_ansible() -> None:
    space = Space(free=100, reserve=10, promised=0, reservable=True)
    decided = decide(REQUEST, Observation(vm()), VmRecords(), TERMS).plan
    plan = Plan("/srv/backup", False, "run", "today", Policy(), space, (decided,), ("a warning",))
    assert parse_plan(json.loads(json.dumps(returned(plan)))) == plan


def test_a_plan_of_increments_survives_the_way_through_ansible() -> None:
    space = Space(free=100, reserve=10, promised=5, reservable=False, needed=20)
    request = replace(
        REQUEST, include_disks=("vda",), exclude_disks=("vdb",), wanted="differential", quiesce="try", agent="/agent"
    )
    facts = Observation(vm(tracked("vda", "b-vda"), VDB))
    decided = decide(request, facts, VmRecords(sets=(MONDAY,)), TERMS).plan
    assert decided.level == "differential"
    refused = decide(request, Observation(vm(identity="uuid-2")), VmRecords(sets=(MONDAY,)), TERMS).plan
    policy = Policy(
        "zstd", 1 << 20, "20G", checksum=False, offline="skip", max_chain=7, tracking=False, encrypted_source="refuse"
    )
    plan = Plan("/srv/backup", True, "run", "today", policy, space, (decided, refused))
    found = parse_plan(json.loads(json.dumps(returned(plan))))
    assert found == plan
    assert [vm.request for vm in found.vms] == [request] * 2
    # What a later release adds to a plan is no obstacle.
    later = json.loads(json.dumps(returned(plan)))
    later["vms"][0]["colour"] = later["policy"]["colour"] = later["vms"][0]["disks"][0]["colour"] = "blue"
    assert parse_plan(later) == plan


@pytest.mark.parametrize("found", [{}, {"repository": "/x"}, {"vms": 3}])
def test_something_else_is_no_plan(found: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="plan"):
        parse_plan(found)


def test_a_plan_cannot_lead_out_of_the_repository() -> None:
    space = Space(free=100, reserve=10, promised=0, reservable=True)
    plan = json.loads(json.dumps(returned(Plan("/srv/backup", False, "run", "today", Policy(), space, ()))))
    with pytest.raises(Refused, match=r"id: .* is not an id of a set"):
        parse_plan({**plan, "id": "../../etc"})
