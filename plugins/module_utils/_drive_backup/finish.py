# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Finish copies that have ended well, and remove those that come to nothing: in QEMU first, then images and records."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import JobFailed, in_words
from .._common.formats import utc_now
from .._host import preallocate, target_files
from .._host.confinement import set_file_label
from .._qemu import block_jobs
from .._qemu.detached import close_detached
from .._qemu.jobs import query_jobs
from .._qemu.model import IO_ERROR
from . import preflight, receipt
from .receipt import ReceiptPhase
from .request import RequestedState
from .session import find_process, lock, observe
from .steps import CopyState, JobState, cancelled_results, cause_of, failed, results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .session import Locked, Session
    from .steps import Copy, Situation


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
        done = [_take_name(session, copy) for copy in safe]
    except OSError as error:
        raise JobFailed(
            f"the copy ended, but its image could not be written to stable storage: {in_words(error)}; remove the"
            " cause, then repeat the call",
            jobs=[copy.result(JobState.FAILED if copy in unfinished else None, in_words(error)) for copy in copies],
        ) from error
    ended = [copy for copy in copies if copy.job]
    await resume_guest(locked, ended)
    await _dismiss(locked, ended)
    return done


async def _dismiss(locked: Locked, copies: Sequence[Copy]) -> None:
    """Remove ended jobs from QEMU, and before that what a detached disk has left: a later call would not know of it."""
    refusal = await close_detached(locked.monitor, [copy.disk.node for copy in copies])
    if refusal:
        locked.session.warnings.append(
            f"somebody detached a disk during its copy, and QEMU still has its image open: {refusal}"
        )
    await block_jobs.dismiss_jobs(locked.monitor, [copy.job_id for copy in copies])


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
        if copy.drive.is_laid_out:
            _give_back(path)
        status = preallocate.flush(path, held.fd if held else None)
    except OSError:
        # A second fsync may succeed where the first has failed, and mean nothing.
        with contextlib.suppress(OSError):
            phase = ReceiptPhase.LOST if copy.irreplaceable else ReceiptPhase.CANCELLING
            receipt.set_phase(copy.record_path, copy.record, phase)
        raise
    if copy.record is None:
        return replace(copy, found=CopyState.DONE)
    record = copy.record.copied(status, utc_now("milliseconds"), copy.record.elapsed)
    receipt.update(copy.record_path, record)
    return replace(copy, found=CopyState.COPIED, record=record)


def _give_back(path: str) -> None:
    """Give back the space in an image that its data has turned out not to need."""
    # Not for increments: what is loaded is compiled first.
    from .._qemu.spare_clusters import give_back  # noqa: PLC0415

    fd = target_files.open_image(path, os.O_RDWR)
    try:
        give_back(fd)
    finally:
        os.close(fd)


def _take_name(session: Session, copy: Copy) -> Copy:
    """Give a finished image its name, and turn its record into the receipt."""
    drive, record = copy.drive, copy.record
    if copy.found != CopyState.COPIED or record is None:
        return copy
    growing = not drive.existing and os.path.lexists(drive.image_path)
    path = drive.image_path if growing else drive.target
    if not record.matches(os.stat(path), target_files.is_block_device(path)):
        raise OSError(f"{path} is not the image that was finished: somebody moved or changed it")
    _restore_label(session, copy, path)
    if growing:
        if record.replaces[0] and target_files.identity(drive.target) == tuple(record.replaces):
            # It was in nobody's use when the copy began, which can be long ago.
            preflight.refuse_opened(drive.target)
        target_files.take_name(drive.image_path, drive.target, (record.replaces[0], record.replaces[1]))
    receipt.finish(copy.record_path, drive.receipt_path)
    return replace(copy, found=CopyState.DONE)


async def clean(locked: Locked, copies: Sequence[Copy]) -> list[Copy]:
    """Remove every trace of these copies: job, image, record, in this order. The guest comes before all files.

    Returns those that were finished instead: they ended well just now, and cleared their bitmaps.
    """
    if not copies:
        return []
    monitor = locked.monitor
    locked.session.changed = True
    job_ids = [copy.job_id for copy in copies if copy.job or copy.running]
    await block_jobs.stop_jobs(monitor, job_ids)
    await resume_guest(locked, copies)
    await block_jobs.remove_nodes(monitor, (copy.open_node for copy in copies if copy.open_node))
    jobs = {job.id: job for job in await query_jobs(monitor)}
    ended = [
        replace(copy, found=CopyState.ENDED, job=jobs[copy.job_id], open_node="")
        for copy in copies
        if copy.running and copy.job_id in jobs
    ]
    kept = [copy for copy in ended if not copy.failure and copy.irreplaceable]
    lost = [copy for copy in copies if copy.job_id not in {one.job_id for one in kept}]
    # A job that fails has taken what it had copied by then out of such a bitmap.
    gaps = [copy for copy in lost if copy.found != CopyState.DEAD and copy.job_id in jobs and copy.clears_always]
    for copy in lost:
        # The mark only tells the next call what to think of a cancelled job: without it that one says a word more.
        with contextlib.suppress(OSError):
            phase = ReceiptPhase.LOST if copy in gaps else ReceiptPhase.CANCELLING
            receipt.set_phase(copy.record_path, copy.record, phase)
    await _dismiss(locked, [copy for copy in lost if copy.job_id in job_ids])
    for copy in lost:
        _remove_files(locked.session, copy, copy in gaps)
    return await finish(locked, kept)


async def clean_up(locked: Locked, now: Situation) -> None:
    """Clean up after a bad end. Raises JobFailed where this call has waited for it, or is the first to learn of it."""
    cause = bad_end(now)
    completed = [copy for copy in now.copies if copy.state == JobState.COMPLETED]
    whole = [copy for copy in completed if copy.irreplaceable or not now.request.grouped]
    await finish(locked, whole)
    rest = (copy for copy in now.copies if copy not in whole)
    await clean(locked, [copy for copy in rest if copy.begun or copy.found == CopyState.DEAD])
    first_to_know = now.request.state == RequestedState.COMPLETED and any(copy.failure for copy in now.copies)
    if now.followed or first_to_know:
        raise failed(now.vm, now.copies, cause)
    note_replaced(locked.session, now, cause)


async def cancel(locked: Locked, now: Situation) -> tuple[list[dict[str, Any]], str]:
    """Stop running copies. One that has ended well is whole, and is finished instead."""
    going = given_up(now)
    done = await finish(locked, [copy for copy in now.copies if copy not in going])
    done += await clean(locked, going)
    return cancelled_results(now.copies, done), ""


async def cancel_attempt(session: Session, attempt: str, reason: str) -> list[dict[str, Any]]:
    """Cancel and clean what belongs to an attempt; returns what has become of it."""
    async with lock(session, await find_process(session)) as locked:
        now = await observe(session, locked.monitor)
        # What has ended well of another attempt waits for a call as well, and this is one.
        whole = [copy for copy in now.copies if copy.state == JobState.COMPLETED]
        ours = [copy for copy in now.copies if copy in whole or copy.belongs_to(attempt)]
        done = await finish(locked, whole)
        done += await clean(locked, [copy for copy in ours if copy not in whole])
    return cancelled_results(ours, done, reason)


def bad_end(now: Situation) -> str:
    """Return why an attempt came to a bad end; raises BackupError where its changes are lost with it."""
    for copy in now.copies:
        preflight.refuse_lost_increment(copy, now.request.overwrite)
    return cause_of(now.copies)


def note_replaced(session: Session, now: Situation, cause: str) -> None:
    """Warn that an attempt is made anew, and say why."""
    session.warnings.append(f"VM {now.vm.name}: an earlier attempt failed, and this one replaces it: {cause}")


def given_up(now: Situation) -> list[Copy]:
    """Return what is to be cancelled; raises BackupError where its changes are lost with it."""
    going = [copy for copy in now.copies if copy.running or copy.bad]
    for copy in going:
        preflight.refuse_lost_increment(copy, now.request.overwrite)
    return going


def _restore_label(session: Session, copy: Copy, path: str) -> None:
    """Give an image that was labelled for QEMU its label back, once its job has ended: it is good without that, too."""
    if copy.record and copy.record.label:
        try:
            set_file_label(path, copy.record.label)
        except OSError as error:
            session.warnings.append(
                f"{path} keeps the label with which QEMU has written it: {in_words(error)}; `restorecon {path}`"
            )


def _remove_files(session: Session, copy: Copy, keeps_record: bool = False) -> None:
    """Remove a growing image and its record. One that C(keeps_record) is not to be forgotten."""
    drive, record = copy.drive, copy.record
    if drive.existing:
        _restore_label(session, copy, drive.target)
    else:
        target_files.remove(drive.image_path)
    if not copy.record_path or record is None or keeps_record:
        return
    if drive.existing and record.phase != ReceiptPhase.PREPARING:
        # The image was there before and stays. That it is not whole must be known: by this the next call may write it.
        preallocate.flush(drive.target)
        receipt.finish(copy.record_path, drive.receipt_path)
    else:
        receipt.discard(copy.record_path)
