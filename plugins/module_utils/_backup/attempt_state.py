# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge what has become of an attempt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._common.formats import Word
from .._plan.disks import ChainLink, plan_disks
from .._plan.model import Action, Quiesce
from .._qemu.jobs import has_stopped, is_backup_fault
from .._repository import chain
from .._repository.documents import Level, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._plan.model import Decision, DiskPlan, Observation, VmPlan
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


def keep_planned_fulls(decision: Decision, planned: VmPlan) -> Decision:
    """Return the decision with a full image wherever the plan had one: a run may only get safer."""
    if planned.action != Action.START:
        return decision
    full = {disk.name: disk.reason for disk in planned.disks if disk.level == Level.FULL}
    links = tuple(
        ChainLink(Level.FULL, full[disk.name]) if disk.name in full else link
        for disk, link in zip(decision.choice.disks, decision.links)
    )
    disks = plan_disks(decision.choice.disks, links)
    level = chain.set_level(disk.level for disk in disks)
    return replace(decision, links=links, plan=replace(decision.plan, disks=disks, level=level))


def changes(planned: VmPlan, disks: Iterable[DiskPlan]) -> tuple[str, ...]:
    """Return what goes otherwise than planned."""
    before = {disk.name: disk for disk in planned.disks} if planned.action == Action.START else {}
    return tuple(
        f"disk {disk.name} is {disk.level} instead of {before[disk.name].level}: {disk.reason}"
        for disk in disks
        if disk.name in before and disk.level != before[disk.name].level
    )


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
    if seen.vm is None:
        return AttemptState(AttemptStatus.UNREACHABLE, seen.error)
    return _judge_jobs(intent, seen.vm, now)


def _judge_jobs(intent: Intent, vm: Vm, now: float) -> AttemptState:
    jobs = {disk.image.name: vm.job(disk.job) for disk in intent.disks}
    if intent.phase == Phase.PREPARING and not any(jobs.values()):
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
    return job.failure_in_words if job else "its job was dismissed by somebody else: nobody knows how it ended"


def guest_stopped_by(intent: Intent, seen: Observation) -> bool:
    """Tell whether a VM stands still because of our target: only then is it ours to let it go on."""
    if seen.vm is None or not has_stopped(seen.vm.status, intent.guest):
        return False
    return is_backup_fault((job for job in seen.vm.jobs if job.id in intent.jobs), intent.reserved)
