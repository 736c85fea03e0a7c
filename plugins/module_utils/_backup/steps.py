# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge what has become of an attempt, and find the next step for a VM in an ordered table of rules.

A step is a function of what is seen, and of nothing else: it does not matter which process has done the last one. The
table in the guide "How it works" is made of the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from .._common.formats import Word
from .._plan.model import Action, Case, Quiesce
from .._qemu.jobs import has_stopped, is_backup_fault
from .._qemu.model import is_disk_on
from .._repository import chain
from .._repository.documents import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._plan.model import Observation
    from .._qemu.model import Job, Vm
    from .._repository.documents import Intent
    from .._repository.repository import VmRecords
    from .session import VmSession


class AttemptStatus(Word):
    """What has become of an attempt."""

    RUNNING = "running"
    COPIED = "copied"
    """All its jobs have ended well."""
    INTERRUPTED = "interrupted"
    """Its jobs were not started, or not as they have to be."""
    BROKEN = "broken"
    GIVEN_UP = "given up"
    """Its failure is written down already."""
    UNREACHABLE = "unreachable"
    """Nobody can tell, as QEMU does not answer."""


@dataclass(frozen=True)
class AttemptState:
    """What has become of an attempt. C(error) says why it is broken, or why nobody can tell."""

    state: AttemptStatus
    error: str = ""


def judge_for_task(session: VmSession, intent: Intent, now: float) -> AttemptState:
    """Judge what has become of an attempt, also by what this process knows of it."""
    task, records = session.task, session.records
    found = judge(intent, session.seen, records, now)
    lost = chain.lost_parent(intent, records.sets)
    if found.state == AttemptStatus.GIVEN_UP:
        return found
    if lost:
        return AttemptState(AttemptStatus.BROKEN, lost)
    if intent.attempt in task.flush_errors:
        # A second fsync may succeed where the first has failed, and mean nothing.
        return AttemptState(AttemptStatus.BROKEN, task.flush_errors[intent.attempt])
    if intent.attempt in task.flushed:
        # All its jobs have ended well and its images are flushed: whatever QEMU does now, the set is good.
        return AttemptState(AttemptStatus.COPIED)
    required = task.request.quiesce == Quiesce.REQUIRE and intent.id == session.run.plan.id
    if required and may_lack_freeze(intent, records) and found.state in (AttemptStatus.RUNNING, AttemptStatus.COPIED):
        return AttemptState(AttemptStatus.INTERRUPTED)
    return found


def may_lack_freeze(intent: Intent, records: VmRecords) -> bool:
    """Tell whether nobody knows that the guest was frozen when the jobs of an attempt started.

    The process that started them was killed at that very moment. Little is lost, as the set has hardly begun.
    """
    return intent.phase == Phase.PREPARING and bool(intent.agent) and intent.attempt not in records.described


def judge(intent: Intent, seen: Observation, records: VmRecords, now: float) -> AttemptState:
    """Judge what has become of an attempt, at C(now) seconds of the hypervisor's CLOCK_BOOTTIME."""
    failure = records.failure(intent.id)
    if failure and failure.attempt == intent.attempt:
        return AttemptState(AttemptStatus.GIVEN_UP, failure.error)
    if intent.attempt in records.described:
        return AttemptState(AttemptStatus.COPIED)
    if intent.attempt in seen.dead:
        if intent.phase == Phase.PREPARING:
            return AttemptState(AttemptStatus.INTERRUPTED)
        return AttemptState(AttemptStatus.BROKEN, "QEMU ended, or was restarted, while the set was made")
    if intent.phase == Phase.COPIED:
        return AttemptState(AttemptStatus.COPIED)
    if seen.vm is None:
        return AttemptState(AttemptStatus.UNREACHABLE, seen.error)
    return _judge_jobs(intent, seen.vm, now)


def _judge_jobs(intent: Intent, vm: Vm, now: float) -> AttemptState:
    jobs = {disk.image.name: vm.job(disk.job) for disk in intent.disks if disk.job}
    # Whoever started them was killed before it had looked whether the copies are of one moment. A layer is a node only.
    images = [disk.image for disk in intent.disks if disk.image.qdev or disk.image.name != disk.image.node]
    same = vm.is_off or all(is_disk_on(image.node, image.qdev, vm.disks) for image in images)
    if intent.phase == Phase.PREPARING and not (same and any(jobs.values())):
        return AttemptState(AttemptStatus.INTERRUPTED)
    errors = [f"disk {disk}: {_job_error(job)}" for disk, job in jobs.items() if _job_error(job)]
    if errors:
        return AttemptState(AttemptStatus.BROKEN, "; ".join(errors))
    if all(job and job.ended for job in jobs.values()):
        return _judge_sizes(intent, vm)
    if intent.deadline is not None and now >= intent.deadline:
        return AttemptState(
            AttemptStatus.BROKEN, f"not done within the timeout of {intent.deadline - intent.begun:g} s"
        )
    return AttemptState(AttemptStatus.RUNNING)


def _judge_sizes(intent: Intent, vm: Vm) -> AttemptState:
    """Judge an attempt whose jobs have ended well by the sizes of the disks.

    A disk that is cut short while it is copied leaves an image that lacks the end, and no error. QEMU refuses that for
    a disk with a job, but not through a filter (such as a throttle) above its node.
    """
    now = {disk.node: disk.virtual_size for disk in vm.disks}
    for disk in intent.disks:
        if now.get(disk.image.node, disk.image.virtual_size) < disk.image.virtual_size:
            return AttemptState(AttemptStatus.BROKEN, f"disk {disk.image.name} has been shrunk while it was copied")
    return AttemptState(AttemptStatus.COPIED)


def _job_error(job: Job | None) -> str:
    """Return why a job comes to nothing; empty while it runs, and where it has ended well."""
    return job.failure_in_words if job else "another program dismissed its job, so its result is unknown"


def guest_stopped_by(intent: Intent, seen: Observation) -> bool:
    """Tell whether a VM stands still because of our target: only then is it ours to let it go on."""
    if seen.vm is None or not has_stopped(seen.vm.status, intent.guest):
        return False
    return is_backup_fault((job for job in seen.vm.jobs if job.id in intent.jobs), intent.reserved)


class Step(Enum):
    """What is done next for a VM. The sentences are those of the guide."""

    # Without locks.
    DONE = "done"
    """The set is reported. A level or consistency other than asked for is no reason to make it again."""
    SKIP = "skip"
    """The VM is skipped."""
    FAIL = "fail"
    """The VM fails. Nothing is touched."""
    REFUSE = "refuse"
    """The VM fails. Its directory records the failure, if the directory belongs to it. Nothing else is touched."""
    QUEUE = "queue"
    """The VM waits for its turn."""
    ASK_AGAIN = "ask again"
    """The module asks QEMU again for a minute. Then the VM fails, and the next run continues."""
    FOLLOW = "follow"
    """The module waits for the jobs, and watches the guest, the space and the time."""
    COME_BACK = "come back"
    """The next call continues."""
    FLUSH = "flush"
    """The module flushes the images to stable storage, and reads them for their checksums."""
    # With the VM's locks.
    DISOWN = "disown"
    """The jobs are removed, and the VM fails for a reason below."""
    TIDY = "tidy"
    """The module removes the remains, and reports the set."""
    REMOVE = "remove"
    """The unfinished set is cancelled and removed."""
    WITHDRAW = "withdraw"
    """All traces of the attempt are removed."""
    GIVE_UP = "give up"
    """The module records the failure, cancels the other jobs, and removes all traces of the attempt."""
    PUBLISH = "publish"
    """The module writes the manifest, gives the set its name, and removes what the attempt left in QEMU."""
    STOP = "stop"
    """If this is still true, the attempt ends as if a job had failed, and the guest runs again."""
    THAW = "thaw"
    """The guest is thawed."""
    RELEASE = "release"
    """The module records good copies. The storage daemon ends, and the VM can be started again."""
    START = "start"
    """The module removes the remains of dead attempts, makes the images, and starts the jobs."""


@dataclass(frozen=True)
class VmSituation:
    """What is seen of a VM. C(reason) says it in words."""

    case: Case
    reason: str = ""
    remains: bool = False
    """Whether something is left in QEMU, or beside the set, that belongs to no set that is being made."""
    attempt: AttemptStatus | None = None
    """What has become of the attempt that is to be brought to its end, where there is one."""
    error: str = ""
    """What is wrong with it."""
    flushed: bool = False
    """Whether its images are on stable storage."""
    alarm: str = ""
    """Why it must end though it runs."""
    frozen: bool = False
    """Whether it may have left the guest's file systems frozen."""
    held: bool = False
    """Whether a storage daemon has the disks of the VM open for it, which is off."""
    kept: bool = False
    """Whether one has them open for a set that nobody makes any more."""
    time_over: bool = False
    """Whether this call has worked as long as it was to."""
    planned: Action = Action.START
    planned_reason: str = ""
    planned_published: bool = False
    refused: bool = False
    """Whether the plan has refused the VM, and the call does not overrule that."""
    other: str = ""
    """What is said where another VM answers than when the plan was made."""
    may_begin: bool = True
    slot: bool = True
    set_id: str = ""
    max_vms: int = 0

    @property
    def action(self) -> Action:
        return self.case.action


@dataclass(frozen=True)
class Rule:
    """One row of the table: what C(name) says is the C(condition), C(step) is done, and C(reason) is told of it."""

    name: str
    condition: Callable[[VmSituation], bool]
    step: Step
    reason: str = "{reason}"


def _is(case: Case, **also: object) -> Callable[[VmSituation], bool]:
    return lambda seen: seen.case == case and all(getattr(seen, name) == value for name, value in also.items())


def _attempt(state: AttemptStatus, **also: object) -> Callable[[VmSituation], bool]:
    return lambda seen: seen.attempt == state and all(getattr(seen, name) == value for name, value in also.items())


FIRST = "we have to finish or remove another set first"
OURS = "we are making the set (one of another id first)"
NONE = "there is no set"
WAITS = "at most {max_vms} VMs copy at a time"

RULES = (
    Rule(
        "a storage daemon still has the disks of the VM open, and nobody needs it any more",
        lambda seen: seen.kept,
        Step.RELEASE,
    ),
    # What others have to do with it.
    Rule(
        "another run took over or removed the set that the VM's jobs make",
        lambda seen: seen.action == Action.FAIL and seen.remains,
        Step.DISOWN,
    ),
    Rule("the set is published, of another VM of this name", _is(Case.OTHER_VM), Step.FAIL),
    Rule("the set is published, without a disk that is chosen now", _is(Case.WITHOUT_DISK), Step.FAIL),
    Rule("the set is published, and remains of its attempt exist", _is(Case.PUBLISHED, remains=True), Step.TIDY),
    Rule("the set is published", _is(Case.PUBLISHED), Step.DONE),
    Rule("this run has already failed with this set, or somebody has cancelled it", _is(Case.FAILED), Step.FAIL),
    Rule("another hypervisor, or another VM of this name, is making a set", _is(Case.FOREIGN), Step.FAIL),
    # What is unfinished. What we are making comes to its end even if the plan has refused the VM: nobody else ends it.
    Rule(
        "we have to remove another set first, but the plan has refused the VM",
        lambda seen: seen.case in (Case.TAKEN_OVER, Case.SUPERSEDED) and seen.refused,
        Step.FAIL,
        "{planned_reason}",
    ),
    Rule(
        f"{FIRST}, but ``max_vms`` others copy",
        lambda seen: seen.action == Action.FINISH and not seen.slot,
        Step.QUEUE,
        WAITS,
    ),
    Rule("others are making a set, with ``takeover: true``", _is(Case.TAKEN_OVER), Step.REMOVE),
    Rule("we are making a set of another id, with ``supersede: true``", _is(Case.SUPERSEDED), Step.REMOVE),
    Rule(f"{OURS}: QEMU does not answer", _attempt(AttemptStatus.UNREACHABLE), Step.ASK_AGAIN, "{error}"),
    Rule(f"{OURS}: its jobs were not started, or not as asked for", _attempt(AttemptStatus.INTERRUPTED), Step.WITHDRAW),
    Rule(f"{OURS}: its failure is recorded", _attempt(AttemptStatus.GIVEN_UP), Step.WITHDRAW),
    Rule(
        f"{OURS}: a job has failed, was cancelled, is gone, or is too late",
        _attempt(AttemptStatus.BROKEN),
        Step.GIVE_UP,
        "{error}",
    ),
    Rule(
        f"{OURS}: all jobs have ended well, and a storage daemon has the disks of the VM open",
        _attempt(AttemptStatus.COPIED, held=True),
        Step.RELEASE,
    ),
    Rule(
        f"{OURS}: all jobs have ended well, and the time of this call is over",
        _attempt(AttemptStatus.COPIED, time_over=True),
        Step.COME_BACK,
    ),
    Rule(
        f"{OURS}: all jobs have ended well, and the images are on stable storage",
        _attempt(AttemptStatus.COPIED, flushed=True),
        Step.PUBLISH,
    ),
    Rule(f"{OURS}: all jobs have ended well", _attempt(AttemptStatus.COPIED), Step.FLUSH),
    Rule(
        f"{OURS}: a job has stopped the guest, has too little space, or stands still",
        lambda seen: seen.attempt == AttemptStatus.RUNNING and bool(seen.alarm),
        Step.STOP,
        "{alarm}",
    ),
    Rule(
        f"{OURS}: a job runs, and the guest may still be frozen",
        _attempt(AttemptStatus.RUNNING, frozen=True),
        Step.THAW,
    ),
    Rule(f"{OURS}: a job runs", _attempt(AttemptStatus.RUNNING), Step.FOLLOW),
    # What is not begun.
    Rule(f"{NONE}, and the domain's own metadata exclude it from backups", _is(Case.EXCLUDED), Step.SKIP),
    Rule(f"{NONE}, and the VM does not have the disks or the uuid of a list", _is(Case.WRONG_DISKS), Step.REFUSE),
    Rule("the VM's other sets are of another VM of this name, without ``adopt``", _is(Case.OTHER_DIRECTORY), Step.FAIL),
    Rule("the place of the set is taken by something that is no set", _is(Case.IN_THE_WAY), Step.FAIL),
    Rule(f"{NONE}, and the VM is off, with ``offline: skip``", _is(Case.OFF), Step.SKIP),
    Rule(f"{NONE}, and QEMU does not answer", _is(Case.SILENT), Step.REFUSE),
    Rule(f"{NONE}, and the VM has another block job", _is(Case.BUSY), Step.REFUSE),
    Rule(f"{NONE}, and the VM migrates", _is(Case.MIGRATING), Step.SKIP),
    Rule(f"{NONE}, and the VM has no disk to back up", _is(Case.NO_DISKS), Step.SKIP),
    Rule(f"{NONE}, and a disk is encrypted, with ``encrypted_source: refuse``", _is(Case.ENCRYPTED), Step.REFUSE),
    Rule(f"{NONE}, and a security module would not give QEMU the images", _is(Case.CONFINED), Step.REFUSE),
    Rule(
        f"{NONE}, but it existed when the plan was made",
        _is(Case.NOT_BEGUN, planned_published=True),
        Step.REFUSE,
        "its set has been removed since the plan; plan again",
    ),
    Rule(
        f"{NONE}, and the plan has skipped the VM",
        _is(Case.NOT_BEGUN, planned=Action.SKIP),
        Step.SKIP,
        # What has changed since the plan makes a run safer, never bolder.
        "the plan was to skip it: {planned_reason}",
    ),
    Rule(
        f"{NONE}, and the plan has refused the VM", _is(Case.NOT_BEGUN, refused=True), Step.REFUSE, "{planned_reason}"
    ),
    Rule(
        f"{NONE}, with ``begin: false``",
        _is(Case.NOT_BEGUN, may_begin=False),
        Step.SKIP,
        "set {set_id} is not being made, and is not to be begun now",
    ),
    Rule(
        f"{NONE}, and another VM answers than when the plan was made",
        lambda seen: seen.case == Case.NOT_BEGUN and bool(seen.other),
        Step.REFUSE,
        "{other}",
    ),
    Rule(f"{NONE}, but ``max_vms`` others copy", _is(Case.NOT_BEGUN, slot=False), Step.QUEUE, WAITS),
    Rule(NONE, _is(Case.NOT_BEGUN), Step.START),
)


def find_rule(seen: VmSituation) -> Rule:
    """Return the first rule that applies."""
    return next(rule for rule in RULES if rule.condition(seen))


def next_step(seen: VmSituation) -> tuple[Step, str]:
    """Return what is done next for a VM, and what is to be told of it."""
    rule = find_rule(seen)
    return rule.step, rule.reason.format(**vars(seen))
