# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How an attempt stands, from what the repository and QEMU tell."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.steps import guest_stopped_by, judge
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent, Phase
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE, disk, image, job
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import (
    FAILED,
    JOB0,
    JOB1,
    OFF,
    VDA,
    VDB,
    intent,
    vm,
)

BOTH_DONE = (job(JOB0, "concluded"), job(JOB1, "concluded"))
VERDICTS = {
    "copying": (intent(), Observation(vm(jobs=(job(JOB0), job(JOB1)))), VmRecords(), "running"),
    "one is done": (intent(), Observation(vm(jobs=(job(JOB0, "concluded"), job(JOB1)))), VmRecords(), "running"),
    "copied": (intent(), Observation(vm(jobs=BOTH_DONE)), VmRecords(), "copied"),
    "started, not yet written down": (
        intent(phase=Phase.PREPARING),
        Observation(vm(jobs=(job(JOB0), job(JOB1)))),
        VmRecords(),
        "running",
    ),
    "started, and of another moment": (
        intent(phase=Phase.PREPARING),
        Observation(vm(VDA, disk("vdb", "n-overlay"), jobs=(job(JOB0), job(JOB1)))),
        VmRecords(),
        "interrupted",
    ),
    "started, of a layer that was named": (
        builders.intent("today", image("vda"), image("n", node="n"), attempt="a1", phase=Phase.PREPARING),
        Observation(vm(VDA, disk("vdb", "n-overlay"), jobs=(job(JOB0), job(JOB1)))),
        VmRecords(),
        "running",
    ),
    "started in a storage daemon": (
        intent(phase=Phase.PREPARING),
        Observation(vm(VDA, status="off", daemon="a1", jobs=(job(JOB0), job(JOB1)))),
        VmRecords(),
        "running",
    ),
    "a snapshot since": (
        intent(),
        Observation(vm(VDA, disk("vdb", "n-overlay"), jobs=(job(JOB0), job(JOB1)))),
        VmRecords(),
        "running",
    ),
    "never started": (intent(phase=Phase.PREPARING), Observation(vm()), VmRecords(), "interrupted"),
    "never started, QEMU gone": (
        intent(phase=Phase.PREPARING),
        replace(OFF, dead=frozenset({"a1"})),
        VmRecords(),
        "interrupted",
    ),
    "one failed": (
        intent(),
        Observation(vm(jobs=(job(JOB0, "concluded", error="No space left on device"), job(JOB1)))),
        VmRecords(),
        "broken",
    ),
    "not listed is no success": (intent(), Observation(vm()), VmRecords(), "broken"),
    "one dismissed": (intent(), Observation(vm(jobs=(job(JOB0, "concluded"),))), VmRecords(), "broken"),
    "aborting": (intent(), Observation(vm(jobs=(job(JOB0, "null"), job(JOB1)))), VmRecords(), "broken"),
    "QEMU gone": (intent(), replace(OFF, dead=frozenset({"a1"})), VmRecords(), "broken"),
    "silent": (intent(), Observation(error="no greeting"), VmRecords(), "unreachable"),
    "described, then QEMU gone": (
        intent(),
        replace(OFF, dead=frozenset({"a1"})),
        VmRecords(described=frozenset({"a1"})),
        "copied",
    ),
    "given up": (intent(), Observation(vm(jobs=BOTH_DONE)), VmRecords(failures=(FAILED,)), "given up"),
    "an older attempt failed": (
        intent(),
        Observation(vm(jobs=BOTH_DONE)),
        VmRecords(failures=(replace(FAILED, attempt="a0"),)),
        "copied",
    ),
    "shrunk while it was copied": (
        intent(),
        Observation(vm(VDA, replace(VDB, virtual_size=0), jobs=BOTH_DONE)),
        VmRecords(),
        "broken",
    ),
    "grown while it was copied": (
        intent(),
        Observation(vm(VDA, replace(VDB, virtual_size=2 * SIZE), jobs=BOTH_DONE)),
        VmRecords(),
        "copied",
    ),
    "unplugged since": (intent(), Observation(vm(VDA, jobs=BOTH_DONE)), VmRecords(), "copied"),
    "shrunk since it was described": (
        intent(),
        Observation(vm(VDA, replace(VDB, virtual_size=0), jobs=BOTH_DONE)),
        VmRecords(described=frozenset({"a1"})),
        "copied",
    ),
    "too late": (intent(deadline=150.0), Observation(vm(jobs=(job(JOB0), job(JOB1)))), VmRecords(), "broken"),
    "in time": (intent(deadline=250.0), Observation(vm(jobs=(job(JOB0), job(JOB1)))), VmRecords(), "running"),
    "late but done": (intent(deadline=150.0), Observation(vm(jobs=BOTH_DONE)), VmRecords(), "copied"),
}


@pytest.mark.parametrize(("attempt", "facts", "records", "state"), VERDICTS.values(), ids=list(VERDICTS))
def test_judge(attempt: Intent, facts: Observation, records: VmRecords, state: str) -> None:
    verdict = judge(attempt, facts, records, now=200.0)
    assert verdict.state == state
    assert bool(verdict.error) == (state in ("broken", "unreachable", "given up"))


@pytest.mark.parametrize(
    ("attempt", "facts", "ours"),
    [
        (intent(reserved=False), Observation(vm(status="io-error", jobs=(job(JOB0), job(JOB1)))), True),
        (intent(reserved=True), Observation(vm(status="io-error", jobs=(job(JOB0), job(JOB1)))), False),
        (intent(), Observation(vm(status="io-error", jobs=(job(JOB0, "concluded", error="EIO"),))), True),
        (intent(guest="io-error"), Observation(vm(status="io-error", jobs=(job(JOB0, error="EIO"),))), False),
        (intent(reserved=False), Observation(vm(status="paused", jobs=(job(JOB0), job(JOB1)))), False),
        (intent(reserved=False), OFF, False),
    ],
)
def test_a_guest_is_resumed_only_if_our_target_stopped_it(attempt: Intent, facts: Observation, ours: bool) -> None:
    assert guest_stopped_by(attempt, facts) is ours
