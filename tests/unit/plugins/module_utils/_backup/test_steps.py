# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which step is next: one row for each rule, and all that repository and QEMU can say together."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import engine
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import VmTask
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.steps import (
    FIRST,
    NONE,
    OURS,
    RULES,
    AttemptStatus,
    Rule,
    Step,
    VmSituation,
    find_rule,
    next_step,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import Admission
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import (
    PUBLISHED_ALREADY,
    Action,
    Case,
    Observation,
    Policy,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Phase, VmName
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.harness import step_table
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import ELSEWHERE, disk, image, job
from ansible_collections.vmfleet.backup.tests.unit.plugins.runs import PLANNED, TAG, in_run, looked_at
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import (
    FAILED,
    GOLDEN,
    JOB0,
    JOB1,
    MONDAY,
    OFF,
    VDA,
    VDB,
    intent,
    manifest,
    vm,
)

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun
    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import VmSession
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

GUIDE = Path(__file__).parents[5] / step_table.GUIDE


def seen(case: Case, **more: Any) -> VmSituation:
    """Return a situation in which it is told why a VM is in this case."""
    return VmSituation(
        case, reason=f"why: {case}", set_id="today", max_vms=4, planned_reason="the plan said so", **more
    )


def ours(attempt: AttemptStatus, **more: Any) -> VmSituation:
    return seen(Case.BEING_MADE, attempt=attempt, error="what is wrong", **more)


ROWS: list[tuple[VmSituation, str, Step, str]] = [
    (
        seen(Case.PUBLISHED, held=True, kept=True, remains=True),
        "nobody needs it any more",
        Step.RELEASE,
        "why: published",
    ),
    (seen(Case.FOREIGN, remains=True), "took over or removed", Step.DISOWN, "why: foreign"),
    (seen(Case.OTHER_VM), "published, of another VM", Step.FAIL, "why: other VM"),
    (seen(Case.WITHOUT_DISK), "published, without a disk", Step.FAIL, "why: without disk"),
    (seen(Case.PUBLISHED, remains=True), "remains of its attempt exist", Step.TIDY, "why: published"),
    (seen(Case.PUBLISHED), "the set is published", Step.DONE, "why: published"),
    (seen(Case.FAILED), "this run has already failed", Step.FAIL, "why: failed"),
    (seen(Case.FOREIGN), "another hypervisor", Step.FAIL, "why: foreign"),
    (seen(Case.SUPERSEDED, refused=True), "remove another set first, but the plan", Step.FAIL, "the plan said so"),
    (seen(Case.TAKEN_OVER, slot=False), f"{FIRST}, but ``max", Step.QUEUE, "at most 4 VMs copy at a time"),
    (seen(Case.TAKEN_OVER), "takeover: true", Step.REMOVE, "why: taken over"),
    (seen(Case.SUPERSEDED), "supersede: true", Step.REMOVE, "why: superseded"),
    (ours(AttemptStatus.UNREACHABLE), "does not answer", Step.ASK_AGAIN, "what is wrong"),
    (ours(AttemptStatus.INTERRUPTED), "were not started", Step.WITHDRAW, "why: being made"),
    (ours(AttemptStatus.GIVEN_UP), "failure is recorded", Step.WITHDRAW, "why: being made"),
    (ours(AttemptStatus.BROKEN), "a job has failed", Step.GIVE_UP, "what is wrong"),
    (ours(AttemptStatus.COPIED, held=True, time_over=True), "a storage daemon", Step.RELEASE, "why: being made"),
    (ours(AttemptStatus.COPIED, flushed=True, time_over=True), "time of this call", Step.COME_BACK, "why: being made"),
    (ours(AttemptStatus.COPIED, flushed=True), "on stable storage", Step.PUBLISH, "why: being made"),
    (ours(AttemptStatus.COPIED), "have ended well", Step.FLUSH, "why: being made"),
    (ours(AttemptStatus.RUNNING, alarm="it is full", frozen=True), "has stopped the guest", Step.STOP, "it is full"),
    (ours(AttemptStatus.RUNNING, frozen=True), "still be frozen", Step.THAW, "why: being made"),
    (ours(AttemptStatus.RUNNING, time_over=True), f"{OURS}: a job runs", Step.FOLLOW, "why: being made"),
    (seen(Case.EXCLUDED), "own metadata", Step.SKIP, "why: excluded"),
    (seen(Case.WRONG_DISKS), "disks or the uuid of a list", Step.REFUSE, "why: wrong disks"),
    (seen(Case.OTHER_DIRECTORY), "without ``adopt``", Step.FAIL, "why: other directory"),
    (seen(Case.IN_THE_WAY), "is taken by something", Step.FAIL, "why: in the way"),
    (seen(Case.OFF), "the VM is off", Step.SKIP, "why: off"),
    (seen(Case.SILENT), f"{NONE}, and QEMU", Step.REFUSE, "why: silent"),
    (seen(Case.BUSY), "another block job", Step.REFUSE, "why: busy"),
    (seen(Case.MIGRATING), "migrates", Step.SKIP, "why: migrating"),
    (seen(Case.NO_DISKS), "no disk", Step.SKIP, "why: no disks"),
    (seen(Case.ENCRYPTED), "encrypted", Step.REFUSE, "why: encrypted"),
    (seen(Case.CONFINED), "a security module", Step.REFUSE, "why: confined"),
    (
        seen(Case.NOT_BEGUN, planned=Action.SKIP, planned_published=True),
        "it existed when the plan was made",
        Step.REFUSE,
        "its set has been removed since the plan; plan again",
    ),
    (seen(Case.NOT_BEGUN, planned=Action.SKIP), "has skipped", Step.SKIP, "the plan was to skip it: the plan said so"),
    (seen(Case.NOT_BEGUN, refused=True, slot=False), "has refused", Step.REFUSE, "the plan said so"),
    (
        seen(Case.NOT_BEGUN, may_begin=False, slot=False),
        "begin: false",
        Step.SKIP,
        "set today is not being made, and is not to be begun now",
    ),
    (seen(Case.NOT_BEGUN, other="it is db02", slot=False), "another VM answers", Step.REFUSE, "it is db02"),
    (seen(Case.NOT_BEGUN, slot=False), f"{NONE}, but ``max", Step.QUEUE, "at most 4 VMs copy at a time"),
    (seen(Case.NOT_BEGUN), NONE, Step.START, "why: not begun"),
]


@pytest.mark.parametrize(("rule", "row"), list(itertools.zip_longest(RULES, ROWS)), ids=[rule.name for rule in RULES])
def test_each_rule_has_a_row(rule: Rule, row: tuple[VmSituation, str, Step, str]) -> None:
    situation, name, step, told = row
    assert find_rule(situation) is rule
    assert name in rule.name
    assert next_step(situation) == (step, told)


def test_names_tell_the_rules_apart() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_what_is_said_may_hold_braces() -> None:
    assert next_step(seen(Case.NOT_BEGUN, refused=True))[1] == "the plan said so"
    assert next_step(replace(seen(Case.FAILED), reason="disk {0} of {web01}"))[1] == "disk {0} of {web01}"


def test_the_rules_come_in_the_order_in_which_a_case_is_found() -> None:
    made = dict.fromkeys((Case.OTHER_SET, Case.BEING_MADE), AttemptStatus.RUNNING)
    places = [RULES.index(find_rule(seen(case, attempt=made.get(case)))) for case in Case]
    assert places == sorted(places)


def test_each_step_is_done_with_the_locks_or_without() -> None:
    assert set(engine.LOOKS) | set(engine.CHANGES) == set(Step)
    assert not set(engine.LOOKS) & set(engine.CHANGES)


def test_the_guide_has_the_table() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert guide == step_table.renewed(guide), "make format writes the table"


RUNNING = (job(JOB0), job(JOB1))
ENDED = (job(JOB0, "concluded"), job(JOB1, "concluded"))
DEAD = frozenset({"a1"})
QEMU = {
    "off": OFF,
    "silent": Observation(error="no greeting"),
    "off, and its attempt dead": replace(OFF, dead=DEAD),
    "silent, and nobody can tell": Observation(error="no greeting", doubtful=DEAD),
    "idle": Observation(vm()),
    "idle, and restarted": Observation(vm(), dead=DEAD),
    "another VM": Observation(vm(identity="uuid-2")),
    "not to be given files": Observation(vm(), admission=Admission("confined")),
    "another VM, and its attempt dead": Observation(vm(identity="uuid-2"), dead=DEAD),
    "another QEMU": Observation(vm(), elsewhere=DEAD),
    "jobs run": Observation(vm(jobs=RUNNING)),
    "jobs run, and the guest has stopped": Observation(
        vm(status="io-error", jobs=(job(JOB0, error="EIO"), RUNNING[1]))
    ),
    "one has ended": Observation(vm(jobs=(ENDED[0], RUNNING[1]))),
    "all have ended": Observation(vm(jobs=ENDED)),
    "one has failed": Observation(vm(jobs=(job(JOB0, "concluded", error="full"), RUNNING[1]))),
    "one is gone": Observation(vm(jobs=RUNNING[:1])),
    "a disk is shorter": Observation(vm(VDA, replace(VDB, virtual_size=0), jobs=ENDED)),
    "another's job": Observation(vm(jobs=(job("job7"),))),
    "jobs of an unknown attempt": Observation(vm(fdsets={3: (f"vmfleet:{TAG}:a9:0",)})),
    "migrating": Observation(vm(status="inmigrate")),
    "off, and its disks are listed": Observation(vm(status="off"), off=True),
    "off, and its jobs run": Observation(vm(status="off", jobs=RUNNING, daemon="a1")),
    "off, and all its jobs have ended": Observation(vm(status="off", jobs=ENDED, daemon="a1")),
    "off, and copied for an unknown attempt": Observation(vm(status="off", jobs=ENDED, daemon="a9")),
    "no disk": Observation(vm(GOLDEN)),
    "an encrypted disk": Observation(vm(disk("vda", encrypted=True), VDB)),
}
REPOSITORY = {
    "nothing": VmRecords(),
    "the set": VmRecords(sets=(manifest(),)),
    "the set, of one disk": VmRecords(sets=(manifest(disks=(image("vda"),)),)),
    "an older set": VmRecords(sets=(MONDAY,)),
    "an older set of another VM": VmRecords(sets=(replace(MONDAY, vm=VmName("web01", "uuid-0", "")),)),
    "a failure": VmRecords(failures=(FAILED,)),
    "a failure of another run": VmRecords(failures=(replace(FAILED, run="another"),)),
    "an intent": VmRecords(intents=(intent(),)),
    "an intent whose jobs may run": VmRecords(intents=(intent(phase=Phase.PREPARING),)),
    "an intent that may have frozen the guest": VmRecords(intents=(intent(frozen=True, agent="/agent"),)),
    "an intent whose deadline is over": VmRecords(intents=(intent(deadline=0.0),)),
    "an intent that is described": VmRecords(intents=(intent(),), described=DEAD),
    "an intent that has failed": VmRecords(intents=(intent(),), failures=(FAILED,)),
    "an intent of what is copied": VmRecords(intents=(intent(phase=Phase.COPIED),)),
    "an intent whose parent is gone": VmRecords(
        intents=(builders.intent("today", image("vda", "monday"), attempt="a1"),)
    ),
    "an intent of another id": VmRecords(intents=(intent(id="monday"),)),
    "intents of both": VmRecords(intents=(intent(), intent(id="monday", attempt="a0"))),
    "an intent of another hypervisor": VmRecords(intents=(intent(hypervisor=ELSEWHERE),)),
    "something else": VmRecords(strays=frozenset({"today"})),
}
ASKED: dict[str, dict[str, Any]] = {
    "nothing special": {},
    "takeover and adopt": {"takeover": True, "adopt": True},
    "supersede": {"supersede": True},
    "skip and refuse": {"policy": Policy(reserve="0", offline="skip", encrypted_source="refuse")},
    "not to begin": {"begin": False},
    "not to begin, whatever is ordered": {"begin": False, "takeover": True, "supersede": True, "adopt": True},
}
PLANS = [
    PLANNED,
    replace(PLANNED, action="skip", reason=PUBLISHED_ALREADY),
    replace(PLANNED, action="skip", reason="it migrates"),
    replace(PLANNED, action="fail", reason="no greeting"),
    replace(PLANNED, include_disks=("vdx",)),
    replace(PLANNED, skip=True),
    replace(PLANNED, identity="uuid-0", process=(7, 7)),
    # An action that only a later release knows.
    replace(PLANNED, action="postpone"),
]


async def find_all(run: BackupRun) -> list[tuple[VmSession, VmSituation]]:
    """Return what is seen in every state of repository and QEMU, with each plan: as it is, without a slot, too late."""
    found = []
    for records, at, plan in itertools.product(REPOSITORY.values(), QEMU.values(), PLANS):
        session = looked_at(run, at, records, VmTask(plan))
        situation = await engine._situation(session)
        found += [
            (session, situation),
            (session, replace(situation, slot=False)),
            (session, replace(situation, time_over=True)),
        ]
    return found


def is_safe(session: VmSession, step: Step) -> bool:
    """Tell whether a step breaks no promise, whatever the table says."""
    run, at, intents = session.run, session.seen, session.records.intents
    first = session.decision.intent
    jobs = [at.vm.job(name) for name in first.jobs] if at.vm and first else []
    all_well = bool(jobs) and all(found and found.ended and not found.error for found in jobs)
    all_well = all_well or (first is not None and first.phase == Phase.COPIED)
    described = first is not None and first.attempt in session.records.described
    held = at.vm.daemon if at.vm else ""
    published = session.records.published("today")
    ours = [job.id.startswith(f"vmfleet.{TAG}.") for job in at.vm.jobs] if at.vm else []
    left = bool(at.vm and at.vm.fdsets) or any(ours)
    foreign = not all(ours)
    return {
        Step.DONE: published is not None and not left,
        Step.TIDY: published is not None and left,
        # What dead attempts have left is removed by it first.
        Step.START: at.vm is not None and not intents and not published and not foreign and not held,
        Step.RELEASE: bool(held) and (all_well or described or held not in {intent.attempt for intent in intents}),
        Step.PUBLISH: described,
        Step.FLUSH: all_well and not held,
        Step.FOLLOW: not all_well and any(jobs),
        Step.REMOVE: run.settings.begin and (run.settings.takeover or run.settings.supersede),
        Step.GIVE_UP: first is not None and run.is_ours(first),
        Step.WITHDRAW: first is not None and run.is_ours(first) and (not all_well or bool(session.records.failures)),
        Step.DISOWN: at.vm is not None and left,
    }.get(step, True)


@pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
def test_repository_and_qemu_have_one_step_together(repository: Repository, asked: dict[str, Any]) -> None:
    found = in_run(repository, find_all, **asked)
    assert len(found) == 3 * len(REPOSITORY) * len(QEMU) * len(PLANS)
    for session, situation in found:
        step = find_rule(situation).step
        assert is_safe(session, step), (step, session.seen, session.records)


def test_no_rule_is_in_vain(repository: Repository) -> None:
    """Every rule is the first that applies, in some state of repository and QEMU."""
    applied = Counter(
        find_rule(situation).name
        for asked in ASKED.values()
        for _session, situation in in_run(repository, find_all, **asked)
    )
    assert [rule.name for rule in RULES if not applied[rule.name]] == []
