# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Free guests of copies into a repository that does not answer, or is gone. Nothing there can be touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host import probe
from .._qemu import block_jobs
from .._qemu.connection import parse_address
from .._qemu.jobs import query_jobs
from .._qemu.model import IO_ERROR
from .._qemu.monitor import Monitor
from . import results
from .outcome import VmState

if TYPE_CHECKING:
    from .._repository.documents import Intent
    from .outcome import Outcome
    from .run import BackupRun
    from .task import VmTask


PIECE = 1 << 20
"""Bytes that a job copies at a time; with a limited speed, it rests after each."""


async def fail(run: BackupRun, task: VmTask, error: str) -> Outcome:
    """Give up on a VM for now. Where the repository itself is gone, no later run can free the guest of its jobs."""
    if task.last_attempt and await _is_gone(run):
        return await abandon(run, task, error)
    return results.outcome(run, task, VmState.FAILED, error=error)


async def abandon(run: BackupRun, task: VmTask, reason: str) -> Outcome:
    """Free the guest of copies into a repository that does not answer."""
    intent = task.last_attempt
    if intent is None:
        return results.outcome(run, task, VmState.FAILED, error=reason)
    try:
        async with Monitor(parse_address(intent.monitor), run.commands) as monitor:
            fate = await _cancel(monitor, intent)
            if intent.guest != IO_ERROR:
                await block_jobs.resume(monitor)
        task.changed = True
    except BackupError as error:
        # Why the repository cannot be used is still the first thing to be told.
        fate = f"its jobs could not be cancelled: {error}"
    told = f"{reason}; {fate}. Run the backup again when it is back"
    return results.outcome(run, task, VmState.FAILED, error=told)


async def _is_gone(run: BackupRun) -> bool:
    """Tell whether the repository cannot be used any more: unmounted, exchanged, or its disk has failed."""
    try:
        await probe.probe(run.repository.path, writing=True)
        await run.repository.check_same()
    except (BackupError, OSError):
        return True
    return False


async def _cancel(monitor: Monitor, intent: Intent) -> str:
    """Cancel jobs whose target hangs; return what has become of them.

    One that waits for its target ends when that is back. One that rests would end now, and QEMU would close its
    image: that stops QEMU, and the guest with it, until the target is back. It is better left alone.
    """
    jobs = [job for job in await query_jobs(monitor) if job.id in intent.jobs and not job.ended]
    if not jobs:
        return "none of its jobs runs"
    slow = PIECE / probe.TIMEOUT
    resting = [job for job in jobs if job.paused or 0 < job.speed < slow]
    not_cancelled = await block_jobs.cancel_jobs(monitor, (job.id for job in jobs if job not in resting))
    if resting:
        return "its jobs are so slow, or paused, that they are left to the next run"
    return "its jobs were cancelled, but do not end before that" if not_cancelled else "its jobs were cancelled"
