# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy disks of one VM to targets at one point in time: bring them to that state from any other.

All memory is in QEMU (the jobs) and beside the targets (records and receipts), so that a step can be taken by any
process, at any time, after any crash: look, decide, act, under the VM's lock; then wait without it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .._common.errors import JobFailed, MonitorError, MonitorGone, MonitorLost
from .._qemu import block_jobs
from .._qemu.jobs import StallClock, has_stopped
from . import preflight, receipt
from .finish import bad_end, cancel, cancel_attempt, clean_up, complete, given_up, note_replaced
from .request import OnTimeout, RequestedState
from .session import find_process, lock, lost, observe
from .start import prepare, start
from .steps import FDSET_PREFIX, DriveStep, JobState, attempt_of, cancelled_results, failed, next_step, paused, results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .._host.process import Process
    from .session import Locked, Session
    from .steps import Copy, Situation


SHORTEST_POLL = 0.02
LONGEST_POLL = 2.0
"""Seconds between two looks at a job: a twentieth of the time waited so far, within these bounds."""


async def join(locked: Locked, now: Situation) -> tuple[list[dict[str, Any]], str]:
    """Take up jobs that run already; returns the results, and the attempt to wait for."""
    for copy in now.copies:
        if copy.needs_speed:
            locked.session.changed = True
            await block_jobs.set_speed(locked.monitor, copy.job_id, copy.drive.speed)
    if now.request.state == RequestedState.STARTED:
        return results(now.copies), ""
    locked.session.changed = True
    return results(now.copies), attempt_of(now.copies)


async def wait(
    session: Session, process: Process | None, began: float, attempt: str, known: list[dict[str, Any]]
) -> None:
    """Wait until a step can be taken. Raises where the wait ends for another reason, with what is known by then.

    C(began) is when the call began, on the monotonic clock, and C(known) are the results as they were last seen.
    """
    request = session.request
    now = joined = asked = time.monotonic()
    clock = StallClock(now)
    while True:
        await asyncio.sleep(min(LONGEST_POLL, max(SHORTEST_POLL, (now - joined) / 20)))
        copies, trouble = await look(session, process, attempt)
        if not trouble and not any(copy.running for copy in copies):
            return
        for writeback in session.images.values():
            writeback.nudge()
        now = time.monotonic()
        if trouble:
            clock.restart(now)
        else:
            asked, known = now, results(copies)
            clock.observe(sum(copy.job.offset for copy in copies if copy.job), now)
        stalled = clock.stalled(request.stall_timeout, now)
        if request.timeout and now - began >= request.timeout:
            reason = f"timeout: not done within {request.timeout:g} s"
            await _time_out(session, attempt, known, f"{reason} ({trouble})" if trouble else reason)
            return
        if stalled:
            await _time_out(session, attempt, known, f"stall_timeout: {stalled}")
            return
        if request.stall_timeout and now - asked >= request.stall_timeout:
            raise JobFailed(
                f"stall_timeout: the VM could not be asked for {request.stall_timeout:g} s ({trouble}); the job was"
                " left as it is",
                jobs=known,
            )


async def look(session: Session, process: Process | None, attempt: str) -> tuple[Sequence[Copy], str]:
    """Return how the jobs do, or why that could not be seen: the monitor may be in use for a while."""
    try:
        async with session.monitor() as monitor:
            now = await observe(session, monitor)
    except MonitorGone as error:
        if process is None or not process.alive:
            raise lost(session.request, attempt, str(error)) from error
        return (), str(error)
    except MonitorError as error:
        return (), str(error)
    running = [copy for copy in now.copies if copy.running]
    if running and all(has_stopped(now.vm.status, copy.guest_before) for copy in running):
        await _save_guest(session, attempt)
    if any(copy.state == JobState.PAUSED for copy in running):
        raise paused(now.vm, now.copies)
    return now.copies, ""


async def _time_out(session: Session, attempt: str, known: list[dict[str, Any]], reason: str) -> None:
    """End the wait: cancel and clean up, or leave the job, as on_timeout says. Returns if it just ended well."""
    if session.request.on_timeout == OnTimeout.LEAVE:
        raise JobFailed(f"{reason}; the job continues, because on_timeout says so", jobs=known)
    try:
        jobs = await cancel_attempt(session, attempt, reason)
    except MonitorError as error:
        raise JobFailed(
            f"{reason}; the job could not be cancelled, and was left as it is: {error}", jobs=known
        ) from error
    if not jobs or any(job["state"] != JobState.COMPLETED for job in jobs):
        raise JobFailed(f"{reason}; the job is cancelled, and what it left is removed", jobs=jobs)


async def _save_guest(session: Session, attempt: str) -> None:
    """Cancel the backup of a VM that was stopped by an I/O error, and resume the guest where that was our fault."""
    async with session.monitor() as monitor:
        now = await observe(session, monitor)
    at_fault = [copy.drive.target for copy in now.copies if copy.at_fault]
    reason = "the guest was stopped by an I/O error while the backup ran"
    jobs = await cancel_attempt(session, attempt, reason)
    if at_fault:
        raise JobFailed(
            f"VM {now.vm.name}: {reason}: No space left on device, or an error, at {', '.join(at_fault)}. The backup"
            " is cancelled, and the guest runs again",
            jobs=jobs,
        )
    raise JobFailed(
        f"VM {now.vm.name}: {reason}. Its jobs have ended before that was seen, so the VM stays stopped: check the"
        " targets and the VM's own disks, then resume it with `cont`",
        jobs=jobs,
    )


ACTIONS = {DriveStep.CANCEL: cancel, DriveStep.JOIN: join, DriveStep.START: start, DriveStep.FINISH: complete}
"""What is done with the lock held; each returns the results, and the attempt to wait for or nothing."""


async def back_up(session: Session) -> list[dict[str, Any]]:
    """Take steps until the asked state is reached; returns the results of the jobs."""
    if session.request.check_mode:
        async with session.monitor() as monitor:
            return await _predict(session, await observe(session, monitor))
    began = time.monotonic()
    process = await find_process(session)
    followed = ""
    while True:
        try:
            async with lock(session, process) as locked:
                jobs, followed = await _take_step(locked, followed)
        except MonitorGone as error:
            if followed:
                raise lost(session.request, followed, str(error)) from error
            raise
        except MonitorLost:
            # What has begun goes on without libvirt, and every step can be taken again.
            if not followed:
                raise
        if not followed:
            return jobs
        await wait(session, process, began, followed, jobs)


async def _take_step(locked: Locked, followed: str) -> tuple[list[dict[str, Any]], str]:
    """Look and act once; returns the results, and the attempt to wait for or nothing."""
    now = await _tidy(locked, followed)
    step = next_step(now)
    while step == DriveStep.CLEAN_UP:
        await clean_up(locked, now)
        now = await observe(locked.session, locked.monitor, followed)
        step = next_step(now)
    _refuse(now, step)
    return await ACTIONS[step](locked, now)


async def _tidy(locked: Locked, followed: str) -> Situation:
    """Close what dead processes have left open in QEMU, which keeps their images locked, and look."""
    session, monitor = locked.session, locked.monitor
    now = await observe(session, monitor, followed)
    await block_jobs.remove_fdsets(monitor, now.vm, FDSET_PREFIX)
    if not now.vm.active_jobs() and await block_jobs.close_targets(monitor, now.vm, FDSET_PREFIX):
        now = await observe(session, monitor, followed)
    for copy in now.copies:
        if copy.record_path:
            receipt.sweep(copy.record_path)
    return now


def _refuse(now: Situation, step: DriveStep) -> None:
    """Raise the error of a step that only refuses or fails."""
    if step == DriveStep.REFUSE_BUSY:
        preflight.refuse_strangers(now.vm, now.copies)
    elif step == DriveStep.REFUSE_MIXED:
        preflight.refuse_mixed(now.vm, now.copies)
    elif step == DriveStep.FAIL:
        reason = "its job is gone, and no image was finished: it was cancelled elsewhere, or QEMU was restarted"
        raise failed(now.vm, now.copies, reason)


async def _predict(session: Session, now: Situation) -> list[dict[str, Any]]:
    """Return what a call would do, for check mode. Raises what it would be refused for."""
    step = next_step(now)
    _refuse(now, step)
    unfinished = any(copy.unfinished for copy in now.copies)
    if step == DriveStep.CANCEL:
        going = given_up(now)
        session.changed = unfinished or bool(going)
        return cancelled_results(now.copies, [copy for copy in now.copies if copy not in going])
    if step == DriveStep.CLEAN_UP:
        note_replaced(session, now, bad_end(now))
        session.changed = True
        return [copy.result(JobState.PLANNED) for copy in now.copies]
    if step == DriveStep.START:
        starting = [copy for copy, _target in await prepare(session, now)]
        session.changed = True
        return [copy.result(JobState.PLANNED if copy in starting else None) for copy in now.copies]
    if step == DriveStep.JOIN:
        is_waited_for = now.request.state != RequestedState.STARTED
        session.changed = is_waited_for or any(copy.needs_speed for copy in now.copies)
    else:
        session.changed = unfinished
    return results(now.copies)
