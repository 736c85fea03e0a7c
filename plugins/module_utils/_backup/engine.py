# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bring the VMs of a plan to their sets, step by step.

Every step is a function of the plan, the repository and QEMU: all memory is on disk or in QEMU, so that another process
can go on from wherever this one is killed. A look takes no locks and changes nothing. What it finds to be done is found
once more with the locks held, and then done. Nobody waits for a job with a lock or a monitor in hand.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorLost, RepositoryHangs, in_words, internal
from .._common.formats import boottime
from .._host.process import Process
from .._plan.model import PUBLISHED_ALREADY, Action, Case
from . import cancel, cleanup, finish, refusal, results, start
from .outcome import Outcome, VmState
from .session import AGAIN, LockedVm, Pending, VmSession, VmTask, WaitFor, hold, observe
from .steps import AttemptStatus, Step, VmSituation, judge_for_task, next_step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .._plan.model import Observation, VmPlan
    from .._qemu.address import Address
    from .._qemu.model import Vm
    from .._repository.documents import Intent
    from .run import BackupRun

    Look = Callable[[VmSession, str], Awaitable[Outcome | Pending | None]]
    Change = Callable[[LockedVm, str], Awaitable[Outcome | Pending]]


PROCESS = 2
"""The numbers of a process in a plan: its pid and its start time."""
UNREACHABLE_PATIENCE = 60.0
"""Seconds that a monitor may be silent, or in somebody else's hands, while its jobs run."""


# The steps


async def _report_done(session: VmSession, _reason: str) -> Outcome:
    return results.published(session.run, session.task, session.manifest)


async def _report_skip(session: VmSession, reason: str) -> Outcome:
    return results.skipped(session, reason)


async def _report_failure(session: VmSession, error: str) -> Outcome:
    return results.failed(session, error)


async def _queue(session: VmSession, reason: str) -> Pending:
    task, sets = session.task, session.records.sets
    task.newest = sets[-1].started if sets else ""
    task.start_on = None if session.decision.intent else session.seen.process
    return Pending(WaitFor.SLOT, reason)


async def _ask_again(_session: VmSession, error: str) -> Pending:
    return Pending(WaitFor.MONITOR, error)


async def _come_back(_session: VmSession, _reason: str) -> Pending:
    return Pending(WaitFor.JOBS)


REPORTS: dict[Step, Look] = {
    Step.DONE: _report_done,
    Step.SKIP: _report_skip,
    Step.FAIL: _report_failure,
    Step.REFUSE: refusal.refuse,
}
"""What is the end for a VM, in check mode too."""
LOOKS: dict[Step, Look] = {
    **REPORTS,
    Step.QUEUE: _queue,
    Step.ASK_AGAIN: _ask_again,
    Step.FOLLOW: finish.follow,
    Step.COME_BACK: _come_back,
    Step.FLUSH: finish.flush,
}
"""What is done without locks. None says that the next step is known without another look."""
CHANGES: dict[Step, Change] = {
    Step.DISOWN: cleanup.disown,
    Step.TIDY: finish.tidy,
    Step.REMOVE: cleanup.remove,
    Step.WITHDRAW: cleanup.withdraw,
    Step.GIVE_UP: cleanup.give_up,
    Step.PUBLISH: finish.publish,
    Step.STOP: finish.stop,
    Step.THAW: finish.thaw,
    Step.RELEASE: finish.release,
    Step.START: start.start,
}
"""What is done with the VM's locks."""
SHARING = frozenset({Step.FOLLOW, Step.FLUSH, Step.THAW})
"""Before these, a VM's jobs get their share of the bandwidth: without locks, as that is a conversation of its own."""


# All VMs


async def reconcile(run: BackupRun) -> list[Outcome]:
    """Return every VM's outcome, in the plan's order. One VM's failure never stops the others."""
    names = {planned.name for planned in run.plan.vms}
    # However slowly the repository answers, each VM is to come a step further in its time.
    with run.slice.busy():
        begun = [intent for intent in await run.repository.intents() if intent.vm.name in names]
        for intent in begun:
            run.slots.join(intent.vm.name)
            run.bandwidth.count(intent.vm.name, len(intent.disks))
        # A VM whose set has begun to grow since the plan has nothing to start: its jobs are to be looked at.
        not_begun = names - {intent.vm.name for intent in begun}
        tasks = [
            VmTask(planned, place=place, first_step=planned.name in not_begun)
            for place, planned in enumerate(run.plan.vms)
        ]
        run.board.begin(run.plan.id, [task.name for task in tasks])
        steps = asyncio.gather(*(_reconcile_vm(run, task) for task in tasks))
    return list(await steps)


async def _reconcile_vm(run: BackupRun, task: VmTask) -> Outcome:
    try:
        outcome = await _bring_to_state(run, task)
    except RepositoryHangs as error:
        outcome = await cleanup.abandon(run, task, str(error))
    except (BackupError, OSError) as error:
        outcome = await cleanup.fail_vm(run, task, in_words(error))
    except Exception as error:  # noqa: BLE001
        # A defect of ours that shows with one VM is not to take the others along.
        task.warn(traceback.format_exc())
        outcome = await cleanup.fail_vm(run, task, internal(error))
    if outcome.state != VmState.RUNNING:
        run.slots.leave(task.name)
        run.bandwidth.count(task.name, 0)
        if task.last_attempt:
            # Another process may have ended it, and what it has unlinked keeps its space until then.
            run.close_images(task.last_attempt)
    run.board.note(task.place, outcome)
    return outcome


async def _bring_to_state(run: BackupRun, task: VmTask) -> Outcome:
    planned = task.planned
    if run.settings.state == VmState.CANCELLED:
        return await cancel.cancel(run, task)
    if run.settings.state == VmState.UNTRACKED:
        return await cancel.untrack(run, task)
    if planned.action == Action.FAIL and not (planned.unless or planned.identity):
        return await refusal.refuse_unseen(run, task)
    # A repository that is only planned has nothing in it that could hang.
    watch = run.repository.calls.watch if run.repository.uuid else None
    while True:
        with run.slice.busy():
            hanging = await watch.ask() if watch else ""
            if watch and watch.unasked:
                task.warn(watch.unasked)
            found = await (cleanup.abandon(run, task, hanging) if hanging else _take_step_with_libvirt(run, task))
        run.slots.arrive(task.name)
        outcome = found if isinstance(found, Outcome) else await _wait(run, task, found)
        if outcome:
            return outcome


# One step


async def _take_step_with_libvirt(run: BackupRun, task: VmTask) -> Outcome | Pending:
    """Take the next step. It is taken again where libvirt was restarted in its middle: nothing has happened to QEMU."""
    try:
        return await _take_step(run, task)
    except MonitorLost as error:
        return Pending(WaitFor.MONITOR, str(error))


async def _take_step(run: BackupRun, task: VmTask) -> Outcome | Pending:
    """Observe a VM, and do what is to be done next."""
    process = _process_to_start_on(run, task)
    if process:
        done = await _change(run, task, task.request.address, process)
        # What the plan has seen may be over: then it is looked at like any other.
        return AGAIN if isinstance(done, Pending) and done.wait_for == WaitFor.MONITOR else done
    session = await observe(run, task)
    _note_attempt(session)
    while True:
        step, reason = next_step(await _situation(session))
        if run.settings.check_mode and step not in REPORTS:
            return results.predicted(session)
        if step in SHARING:
            await finish.share_bandwidth(session)
        if step in CHANGES:
            absent = session.seen if session.seen.alone else None
            flushed = _flushed(session) if step == Step.PUBLISH else None
            return await _change(run, task, session.address, session.seen.process, absent, flushed)
        found = await LOOKS[step](session, reason)
        if found is not None:
            return found


def _process_to_start_on(run: BackupRun, task: VmTask) -> Process | None:
    """Return the QEMU of a VM that is to start its set now, as was planned or seen.

    It is looked at with the locks held only: where another one answers, nothing is done. None where something else is
    to be done, or where the QEMU is not known.
    """
    process, task.start_on = task.start_on, None
    may_start = run.settings.begin and not run.settings.check_mode
    planned = task.first_step and task.planned.action == Action.START and may_start
    task.first_step = False
    if planned and run.slots.has(task.name) and len(task.planned.process) == PROCESS:
        return Process(*task.planned.process)
    return process


async def _change(
    run: BackupRun,
    task: VmTask,
    address: Address,
    process: Process | None,
    absent: Observation | None = None,
    flushed: tuple[Vm, Intent] | None = None,
) -> Outcome | Pending:
    """Take the locks, look once more, and do the one thing that is to be done.

    For a set that is C(flushed), that is to publish it. Whatever else is found then is looked at once more, in full.
    """
    async with hold(run, task, address, process, absent, flushed) as held:
        if isinstance(held, Pending):
            return held
        _note_attempt(held)
        step, reason = next_step(await _situation(held))
        # What needs no locks is done without them, after another look.
        is_sure = step == Step.PUBLISH if flushed else step in CHANGES
        return await CHANGES[step](held, reason) if is_sure else AGAIN


def _flushed(session: VmSession) -> tuple[Vm, Intent] | None:
    """Return what is known of a VM whose set is to be published; None where it is to be looked at in full."""
    vm = session.seen.vm
    # Targets that are nodes have been closed since.
    return (vm, session.intent) if vm and not vm.is_off and not vm.target_nodes else None


def _note_attempt(session: VmSession) -> None:
    """Remember whose jobs are to be cancelled where the repository cannot be used any more."""
    run, task, decision = session.run, session.task, session.decision
    action = decision.case.action
    if run.settings.check_mode or action == Action.FAIL:
        return
    waits = action == Action.FINISH and not run.slots.has(task.name)
    if decision.intent and run.is_ours(decision.intent) and not waits:
        if task.last_attempt and task.last_attempt.attempt != decision.intent.attempt:
            # The images of this one may have the same paths.
            run.close_images(task.last_attempt)
        task.last_attempt = decision.intent
        task.followed = decision.intent.attempt if decision.case == Case.BEING_MADE else task.followed


async def _situation(session: VmSession) -> VmSituation:
    """Put together all that the next step depends on."""
    run, task, decision = session.run, session.task, session.decision
    status, error, alarm = await _state_of_attempt(session)
    intent, planned = decision.intent, task.planned
    return VmSituation(
        case=decision.case,
        reason=decision.plan.reason,
        remains=await _has_remains(session),
        attempt=status,
        error=error,
        flushed=intent is not None and intent.attempt in session.records.described.union(task.flushed),
        alarm=alarm,
        frozen=intent is not None and intent.frozen,
        held=session.seen.vm is not None and bool(session.seen.vm.daemon),
        kept=_is_kept(session),
        time_over=run.slice.over.is_set(),
        planned=Action.read(planned.action),
        planned_reason=planned.reason,
        planned_published=planned.action == Action.SKIP and planned.reason == PUBLISHED_ALREADY,
        refused=_is_refused(run, planned),
        other=_other_vm(session),
        may_begin=run.settings.begin,
        slot=run.slots.has(task.name),
        set_id=run.plan.id,
        max_vms=run.settings.max_vms,
    )


async def _state_of_attempt(session: VmSession) -> tuple[AttemptStatus | None, str, str]:
    """Return what has become of the attempt at hand, what is wrong with it, and why it must end though it runs."""
    if session.decision.case not in (Case.OTHER_SET, Case.BEING_MADE):
        return None, "", ""
    found = judge_for_task(session, session.intent, boottime())
    watched = found.state == AttemptStatus.RUNNING and not session.run.settings.check_mode
    return found.state, found.error, await finish.find_alarm(session) if watched else ""


async def _has_remains(session: VmSession) -> bool:
    """Tell whether something is left of attempts at sets, where the next step depends on that."""
    run, case = session.run, session.decision.case
    if case == Case.PUBLISHED:
        return bool(
            await cleanup.leftover_attempts(session)
            or await cleanup.leftover_bitmaps(session)
            or await run.repository.untidy(session.task.name, run.plan.id)
        )
    return case.action == Action.FAIL and not run.settings.check_mode and bool(await cleanup.leftover_attempts(session))


def _is_kept(session: VmSession) -> bool:
    """Tell whether a storage daemon has the disks of a VM open for a set that nobody makes any more."""
    records = session.records
    held = session.seen.vm.daemon if session.seen.vm else ""
    return bool(held) and not records.barred and held not in {intent.attempt for intent in records.intents}


def _is_refused(run: BackupRun, planned: VmPlan) -> bool:
    """Tell whether the plan has refused a VM, and there is no order that the plan did not know of."""
    orders = {"takeover": run.settings.takeover, "adopt": run.settings.adopt}
    return planned.action == Action.FAIL and not orders.get(planned.unless, False)


def _other_vm(session: VmSession) -> str:
    """Return what is said where another QEMU answers than the plan has seen, which is not the VM that was planned."""
    planned, vm = session.task.planned, session.seen.vm
    if not vm or vm.is_off or not planned.process or vm.identity == planned.identity:
        return ""
    return (
        f"another VM ({vm.identity}) answers at {planned.monitor} than when the plan was made ({planned.identity});"
        " plan again"
    )


# Between two steps


async def _wait(run: BackupRun, task: VmTask, pending: Pending) -> Outcome | None:
    """Wait for what the next step needs. Return an outcome where this call waits no longer."""
    starting = run.settings.state == "started"
    if pending.wait_for != WaitFor.MONITOR:
        task.silent_since = 0.0
    if pending.wait_for == WaitFor.SLOT:
        if not await run.slots.take(task.name, task.order):
            queued = results.outcome(run, task, VmState.QUEUED, reason=pending.reason)
            run.board.note(task.place, queued)
            if starting or not await run.slots.take(task.name, task.order, run.slice.over):
                return queued
    elif pending.wait_for == WaitFor.JOBS:
        if run.slice.over.is_set():
            await finish.note_progress(run, task)
        running = results.running(run, task)
        run.board.note(task.place, running)
        if starting or run.slice.over.is_set():
            return running
        await run.bandwidth.pause(task.next_pause())
    elif pending.wait_for == WaitFor.MONITOR:
        task.silent_since = task.silent_since or time.monotonic()
        if starting or time.monotonic() - task.silent_since > UNREACHABLE_PATIENCE:
            error = f"{pending.reason}; the set is unfinished: run the backup again to continue it"
            return results.outcome(run, task, VmState.FAILED, error=error)
        run.board.note(task.place, results.outcome(run, task, VmState.RUNNING, reason=pending.reason))
        # The next call would not know for how long it has been silent.
        with run.slice.busy():
            await asyncio.sleep(task.next_pause())
    return None
