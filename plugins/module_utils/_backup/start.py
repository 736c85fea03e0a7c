# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Begin the set of a VM: remove what dead attempts have left, prepare an attempt, and have its jobs started."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorError, MonitorGone, MonitorLost, RepositoryHangs, after, in_words
from .._common.formats import utc_now
from .._plan.disks import ChainLink, plan_disks
from .._plan.model import Action
from .._plan.observe import observe
from .._qemu.tpm import losses
from .._repository import chain
from .._repository.documents import Failure, Level, Phase
from . import cleanup
from .launch import DisksMoved, launch
from .outcome import VmState
from .prepare import draft_attempt, prepare_attempt, renew_description
from .session import AGAIN, Pending, WaitFor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._plan.model import Decision, DiskPlan, VmPlan
    from .._qemu.model import Vm
    from .._qemu.monitor import Monitor
    from .._repository.documents import Intent
    from .prepare import AttemptDraft
    from .session import LockedVm


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
    now = {disk.name: disk for disk in disks}
    return (
        *(
            f"disk {disk.name} is {disk.level} instead of {before[disk.name].level}: {disk.reason}"
            for disk in now.values()
            if disk.name in before and disk.level != before[disk.name].level
        ),
        *(f"disk {name} is not in the set, because the VM has lost it since the plan" for name in before.keys() - now),
    )


async def start(locked: LockedVm, _reason: str) -> Pending:
    """Remove what dead attempts have left, prepare an attempt, and start its jobs."""
    task, vm = locked.task, locked.seen.vm
    if vm is None or not (locked.monitor or vm.is_off):
        return AGAIN
    decision = keep_planned_fulls(locked.decision, task.planned)
    for change in changes(task.planned, decision.plan.disks):
        task.warn(change)
    task.changed = True
    await cleanup.clear(locked)
    try:
        draft = await _draft(locked, vm, decision)
    except MonitorLost:
        # Libvirt was restarted, most often: the VM is asked again, as after any other question.
        raise
    except BackupError as error:
        return await _refuse(locked, error)
    return await _begin(locked, vm, draft)


async def _begin(locked: LockedVm, vm: Vm, draft: AttemptDraft) -> Pending:
    """Prepare an attempt, and start its jobs; where that fails, see to what there is of it."""
    run, task, monitor = locked.run, locked.task, locked.monitor
    try:
        task.last_attempt = draft.intent
        intent = await prepare_attempt(locked, draft)
        speed = await run.bandwidth.reserve_share(task.name, len(intent.jobs))
        if monitor:
            intent = await launch(locked, monitor, draft, intent, speed)
        else:
            # Not for VMs that are on: what is loaded is compiled first.
            from . import start_offline  # noqa: PLC0415

            intent = await start_offline.launch(locked, vm, draft, intent, speed)
        await renew_description(run, intent, draft)
    except MonitorError as error:
        if task.reconnected or not isinstance(error, (MonitorGone, MonitorLost)):
            raise
        # Whether QEMU lives, and has started the jobs, is for the next look to find out.
        task.reconnected = True
        return Pending(WaitFor.MONITOR, str(error))
    except RepositoryHangs:
        raise
    except DisksMoved as error:
        return await _begin_again(locked, monitor, draft.intent, str(error))
    except (BackupError, OSError) as error:
        return await _undo(locked, monitor, draft.intent, in_words(error))
    task.last_seen = vm, intent
    return AGAIN if intent.phase == Phase.COPIED else Pending(WaitFor.JOBS)


async def _draft(locked: LockedVm, vm: Vm, decision: Decision) -> AttemptDraft:
    """Draft an attempt, and warn of what its set will not have."""
    draft = await draft_attempt(locked.run, locked.monitor, locked.task.request, vm, decision)
    if locked.monitor is None:
        from . import start_offline  # noqa: PLC0415 (as above)

        draft = replace(draft, description=await start_offline.describe(locked, vm))
    for loss in losses(draft.description):
        locked.task.warn(loss)
    return draft


async def _refuse(locked: LockedVm, error: BackupError) -> Pending:
    """Write down that this run need not try again, though nothing was begun."""
    task, plan = locked.task, locked.run.plan
    if isinstance(error, MonitorGone) and not task.reconnected:
        # Whether the VM is off now is for the next look to tell, but once only.
        task.reconnected = True
        return AGAIN
    now = utc_now()
    failure = Failure(plan.run, "", plan.id, VmState.FAILED, str(error), now, now)
    with after(error):
        await locked.run.repository.record_failure(task.name, failure)
    return AGAIN


async def _begin_again(locked: LockedVm, monitor: Monitor | None, drafted: Intent, error: str) -> Pending:
    """Remove every trace of an attempt whose copies are not of one moment: the next look begins another, but once."""
    run, task = locked.run, locked.task
    if task.begun_again:
        return await _undo(locked, monitor, drafted, error)
    task.begun_again = True
    with after(error):
        seen = await observe(task.request, run.context, monitor)
        records = await run.repository.records(task.name)
        await cleanup.withdraw(replace(locked, seen=seen, records=records), error)
    task.warn(f"{error}, and were begun again")
    return AGAIN


async def _undo(locked: LockedVm, monitor: Monitor | None, drafted: Intent, error: str) -> Pending:
    """Put an end to an attempt that came to nothing while it was begun.

    How far it got, the repository and QEMU tell.
    """
    with after(error):
        if monitor is None:
            await cleanup.end_daemon(locked)
        now = replace(locked, seen=await observe(locked.task.request, locked.run.context, monitor))
        there = await locked.run.repository.intent(drafted.vm.name, drafted.id)
        intent = there if there and there.attempt == drafted.attempt else drafted
        await cleanup.thaw(now, intent)
    if monitor is None and now.seen.vm and not now.seen.vm.is_off:
        # The next look finds an attempt without jobs, which is withdrawn, and begins another.
        locked.task.warn(
            f"somebody started the VM while its copies were prepared, so it is backed up as a running VM ({error})"
        )
        return AGAIN
    await cleanup.fail_attempt(now, intent, error)
    return AGAIN
