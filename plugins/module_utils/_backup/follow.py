# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Follow the jobs of an attempt, with an eye on the guest, the space and the time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import MonitorError
from .._common.formats import boottime
from .._plan import space
from .._qemu import block_jobs
from .._qemu.connection import parse_address
from .._qemu.jobs import StallClock
from .._qemu.monitor import Monitor
from . import cleanup
from .attempt_state import guest_stopped_by
from .session import jobs_of
from .task import AGAIN, Pending, WaitFor

if TYPE_CHECKING:
    from .._repository.documents import Intent
    from .run import BackupRun
    from .session import LockedVm, VmSession
    from .task import VmTask


# Without locks


async def follow(session: VmSession, _reason: str) -> Pending:
    """Have the images written out, and wait for the jobs."""
    return _wait_for_jobs(session)


async def share_bandwidth(session: VmSession) -> None:
    """Give each of a VM's running jobs its share of the bandwidth."""
    run, task = session.run, session.task
    if not run.settings.bandwidth:
        return
    jobs = [job for job in jobs_of(session.intent, session.seen.vm) if not job.copied]
    share = run.bandwidth.count(task.name, len(jobs))
    late = [job for job in jobs if job.speed != share]
    try:
        if late:
            async with Monitor(parse_address(task.request.monitor), run.commands) as monitor:
                for job in late:
                    await block_jobs.set_speed(monitor, job.id, share)
    except MonitorError:
        # The next look tells what has become of it.
        return
    run.bandwidth.confirm(task.name, share)


async def find_alarm(session: VmSession) -> str:
    """Return why a running attempt must end, for the guest's sake or for standing still; empty where it need not."""
    run, intent = session.run, session.intent
    short = "" if intent.reserved else await run.repository.run(space.short_of_space, run.plan.policy)
    if guest_stopped_by(intent, session.seen):
        return "the guest was stopped by an I/O error because the backup's target is, or was, full or failing"
    if short and await _is_youngest(run, intent):
        return f"{short}, and the set's space could not be reserved"
    return _stalled(session)


async def note_progress(run: BackupRun, task: VmTask) -> None:
    """Write down since when a set stands still: the call that goes on cannot know."""
    if not task.last_seen or task.last_seen[1].attempt != task.watched or task.moved:
        return
    stands = task.clock.copied, task.clock.since
    async with run.repository.lock(task.name):
        there = await run.repository.intent(task.name, task.last_seen[1].id)
        if there and there.attempt == task.watched and there.progress != stands:
            await run.repository.update(replace(there, progress=stands))


# With the VM's locks


async def stop(locked: LockedVm, _alarm: str) -> Pending:
    """Give up a running attempt, if it still has to end."""
    await cleanup.thaw(locked, locked.intent)
    # One at a time: what one set leaves behind may be enough for the others.
    async with locked.run.emergency:
        alarm = await find_alarm(locked)
        if alarm:
            await cleanup.fail_attempt(locked, locked.intent, alarm)
            return AGAIN
    return _wait_for_jobs(locked)


async def thaw(locked: LockedVm, _reason: str) -> Pending:
    """Thaw a guest whose jobs run already."""
    await cleanup.thaw(locked, locked.intent)
    return _wait_for_jobs(locked)


def _wait_for_jobs(session: VmSession) -> Pending:
    if session.seen.vm:
        session.task.last_seen = session.seen.vm, session.intent
    for path in session.run.image_paths(session.intent):
        session.run.images.start_writeback(path)
    return Pending(WaitFor.JOBS)


async def _is_youngest(run: BackupRun, intent: Intent) -> bool:
    """Tell whether no set of this run that could not reserve its space is younger: that one has less to lose."""
    names = {planned.name for planned in run.plan.vms}
    mine = (other for other in await run.repository.intents() if other.vm.name in names and not other.reserved)
    return all(other.begun <= intent.begun for other in mine)


def _stalled(session: VmSession) -> str:
    """Return for how long the jobs of an attempt have stood still, where that is too long."""
    task, intent = session.task, session.intent
    jobs = jobs_of(intent, session.seen.vm)
    copied = sum(job.offset for job in jobs)
    now = boottime()
    if task.watched != intent.attempt or task.clock.copied != copied or any(job.paused for job in jobs):
        # Where it stood when an earlier call came back, and since when.
        seen, since = intent.progress or (-1, now)
        task.moved = bool(task.watched)
        task.watched = intent.attempt
        task.clock = StallClock(since if seen == copied and not task.moved else now, copied)
    return task.clock.stalled(session.run.settings.stall_timeout, now)
