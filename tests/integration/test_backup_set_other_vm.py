# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Another VM answers at a monitor than when the plan was made."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")


def test_no_set_of_it_is_made_under_the_name_of_the_first(vms: Vms, sets: Sets) -> None:
    first = vms.start(vms.disk(0, size=MIB), name="web01", uuid="11111111-1111-4111-8111-111111111111")
    second = vms.start(vms.disk(1, size=MIB), name="db02", uuid="22222222-2222-4222-8222-222222222222")
    plan = sets.plan(first)["plan"]
    assert [vm["name"] for vm in plan["vms"]] == ["web01"]
    first.quit()
    place, other = (Path(str(vm.monitor).removeprefix("unix:")) for vm in (first, second))
    place.unlink(missing_ok=True)
    other.rename(place)
    result = run_module("backup_set", {"plan": plan})
    place.rename(other)
    assert result.get("failed"), sets.manifest("web01")["vm"]
