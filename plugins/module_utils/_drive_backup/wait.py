# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take up running jobs, and wait for their end without the VM's lock."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .._common.errors import JobFailed, MonitorError, MonitorGone
from .._qemu import block_jobs
from .._qemu.jobs import StallClock, has_stopped
from .cleanup import cancel_attempt
from .examine import lost
from .request import OnTimeout, RequestedState
from .session import observe
from .status import JobState, attempt_of, paused, results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .._host.process import Process
    from .session import Locked, Session
    from .status import Copy
    from .steps import Situation


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
        raise JobFailed(f"{reason}; the job is left running, as on_timeout says", jobs=known)
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
            f"VM {now.vm.name}: {reason}: No space left on device, or an error, at {', '.join(at_fault)}. The backup is"
            " cancelled, and the guest goes on",
            jobs=jobs,
        )
    raise JobFailed(
        f"VM {now.vm.name}: {reason}. The backup is cancelled; its targets show no fault, and so the VM was left as it"
        " is: look at its own disks, then `cont`",
        jobs=jobs,
    )
