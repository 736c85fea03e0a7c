# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy disks of one VM to targets at one point in time: bring them to that state from any other.

All memory is in QEMU (the jobs) and beside the targets (records and receipts), so that a step can be taken by any
process, at any time, after any crash: look, decide, act, under the VM's lock; then wait without it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .._common.errors import MonitorGone
from .._qemu import block_jobs
from . import preflight, receipt
from .cleanup import bad_end, cancel, clean_up, given_up, note_replaced
from .examine import lost
from .finish import complete
from .request import RequestedState
from .session import find_process, lock, observe
from .start import prepare, start
from .status import FDSET_PREFIX, JobState, cancelled_results, failed, results
from .steps import DriveStep, next_step
from .wait import join, wait

if TYPE_CHECKING:
    from typing import Any

    from .session import Locked, Session
    from .steps import Situation


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
