# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Finish copies whose jobs have ended well: stable storage, the image's name, the receipt.

After a crash between any two steps the next call goes on from there.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import JobFailed, in_words
from .._common.formats import seconds_since, utc_now
from .._host import files, preallocate
from .._qemu import block_jobs
from .._qemu.model import IO_ERROR
from . import receipt
from .receipt import ReceiptPhase
from .status import CopyState, JobState, results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .session import Locked, Session
    from .status import Copy
    from .steps import Situation


async def complete(locked: Locked, now: Situation) -> tuple[list[dict[str, Any]], str]:
    """Finish the copies that have ended well; returns the results of all, and no attempt to wait for."""
    return results(await finish(locked, now.copies)), ""


async def finish(locked: Locked, copies: Sequence[Copy]) -> list[Copy]:
    """Make finished copies last. Others are returned as they are."""
    session, monitor = locked.session, locked.monitor
    unfinished = [copy for copy in copies if copy.unfinished]
    session.changed = session.changed or bool(unfinished)
    await block_jobs.remove_nodes(monitor, (copy.open_node for copy in unfinished if copy.open_node))
    try:
        # All of a group are safe before the first takes its name: no crash can then take one away from the others.
        safe = [_flush(session, copy) for copy in copies]
        done = [_take_name(copy) for copy in safe]
    except OSError as error:
        raise JobFailed(
            f"the copy ended, but its image could not be made safe: {in_words(error)}; repeat the call when the cause"
            " is gone",
            jobs=[copy.result(JobState.FAILED if copy in unfinished else None, in_words(error)) for copy in copies],
        ) from error
    await resume_guest(locked, [copy for copy in copies if copy.job])
    await block_jobs.dismiss_jobs(monitor, [copy.job_id for copy in copies if copy.job])
    return done


async def resume_guest(locked: Locked, copies: Sequence[Copy]) -> None:
    """Let a guest go on that stands still because of these copies. One that stood before them stays as it was."""
    if any(copy.at_fault for copy in copies) and all(copy.guest_before != IO_ERROR for copy in copies):
        await block_jobs.resume(locked.monitor)


def _flush(session: Session, copy: Copy) -> Copy:
    """Bring an ended copy onto stable storage, and its outcome with it: QEMU forgets that with the job."""
    if copy.found != CopyState.ENDED:
        return copy
    path = copy.drive.image_path
    held = session.images.get(path)
    try:
        status = preallocate.flush(path, held.fd if held else None)
    except OSError:
        # A second fsync may succeed where the first has failed, and mean nothing.
        with contextlib.suppress(OSError):
            receipt.set_phase(copy.record_path, copy.record, ReceiptPhase.CANCELLING)
        raise
    if copy.record is None:
        return replace(copy, found=CopyState.DONE)
    record = copy.record.copied(status, utc_now("milliseconds"), seconds_since(copy.record.started))
    receipt.update(copy.record_path, record)
    return replace(copy, found=CopyState.COPIED, record=record)


def _take_name(copy: Copy) -> Copy:
    """Give a finished image its name, and turn its record into the receipt."""
    drive, record = copy.drive, copy.record
    if copy.found != CopyState.COPIED or record is None:
        return copy
    growing = not drive.existing and os.path.lexists(drive.image_path)
    path = drive.image_path if growing else drive.target
    if not record.matches(os.stat(path), files.is_block_device(path)):
        raise OSError(f"{path} is not the image that was finished: somebody moved or changed it")
    if growing:
        files.take_name(drive.image_path, drive.target, (record.replaces[0], record.replaces[1]))
    receipt.finish(copy.record_path, drive.receipt_path)
    return replace(copy, found=CopyState.DONE)
