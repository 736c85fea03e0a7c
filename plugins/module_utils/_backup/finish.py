# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Follow the jobs of an attempt, bring its images to stable storage, and publish the set."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorError, MonitorLost, RepositoryHangs, in_words
from .._common.formats import boottime, utc_now
from .._host import preallocate
from .._host.checksum import sha256
from .._plan.observe import short_of_space
from .._qemu import block_jobs
from .._qemu.jobs import StallClock, has_stopped
from .._qemu.monitor import Monitor
from .._repository.documents import Level, Manifest, Phase
from .._repository.staging import opened
from . import cleanup, results
from .session import AGAIN, Pending, WaitFor, jobs_of
from .steps import guest_stopped_by

if TYPE_CHECKING:
    from .._repository.documents import DiskImage, Intent, StagedDisk
    from .._repository.repository import Repository
    from .outcome import Outcome
    from .run import BackupRun
    from .session import LockedVm, VmSession, VmTask


RESUME_INTERVAL = 30.0
"""Seconds until a guest is resumed again that an I/O error has stopped once more."""


# To follow jobs, without locks


async def follow(session: VmSession, _reason: str) -> Pending:
    """Have the images written out, and wait for the jobs."""
    await _resume(session)
    return _wait_for_jobs(session)


async def _resume(session: VmSession) -> None:
    """Let a guest go on that an I/O error has stopped since its copies began, though no job tells of an error.

    On a thin volume, space that was reserved can be missing for a moment. Where the guest's own disks are at fault, its
    write fails again, and no harm is done.
    """
    run, task, intent, vm = session.run, session.task, session.intent, session.seen.vm
    now = time.monotonic()
    if vm is None or not has_stopped(vm.status, intent.guest) or now - task.resumed < RESUME_INTERVAL:
        return
    task.resumed = now
    try:
        async with Monitor(session.address, run.commands) as monitor:
            await block_jobs.resume(monitor)
    except MonitorError:
        # The next look tells what has become of it.
        return
    task.warn(
        f"an I/O error stopped the guest while set {intent.id} was made, and it was resumed: the file system of the"
        " repository, or of its own disks, was full or failed for a moment"
    )


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
            async with Monitor(session.address, run.commands) as monitor:
                for job in late:
                    await block_jobs.set_speed(monitor, job.id, share)
    except MonitorError:
        # The next look tells what has become of it.
        return
    run.bandwidth.confirm(task.name, share)


async def find_alarm(session: VmSession) -> str:
    """Return why a running attempt must end, for the guest's sake or for standing still; empty where it need not."""
    run, intent = session.run, session.intent
    short = "" if intent.reserved else await run.repository.run(short_of_space, run.plan.policy)
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


# To follow jobs, with the VM's locks


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


async def release(locked: LockedVm, _reason: str) -> Pending:
    """End a storage daemon whose jobs have all ended well, or are nobody's: before that, its VM cannot be started."""
    intent, vm = locked.decision.intent, locked.seen.vm
    locked.task.changed = True
    if intent and vm and vm.daemon == intent.attempt:
        await locked.run.repository.update(replace(intent, phase=Phase.COPIED))
    await cleanup.end_daemon(locked)
    return AGAIN


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


# To finish a set, without locks


async def flush(session: VmSession, _reason: str) -> Pending | None:
    """Bring finished images onto stable storage and take their checksums: without locks, for it may take long.

    None says that the next step is known without another look.
    """
    run, task, intent = session.run, session.task, session.intent
    if intent.frozen and intent.attempt not in session.seen.dead:
        # To read the images can take hours. The mark goes when the set is published.
        await cleanup.ask_to_thaw(task, intent)
    try:
        await _close_targets(session)
    except MonitorError as error:
        return Pending(WaitFor.MONITOR, str(error))
    try:
        task.flushed[intent.attempt] = await _finish_images(run, intent)
    except FileNotFoundError as error:
        there = await run.repository.intent(intent.vm.name, intent.id)
        if there is None or there.attempt != intent.attempt:
            # Another process has published or removed it meanwhile.
            return AGAIN
        task.flush_errors[intent.attempt] = f"an image is gone: {in_words(error)}"
    except RepositoryHangs:
        raise
    except (BackupError, OSError) as error:
        task.flush_errors[intent.attempt] = (
            f"the copy ended, but could not be brought to stable storage: {in_words(error)}"
        )
    return None


async def _close_targets(session: VmSession) -> None:
    """Let a guest go on that was stopped by our target, and have QEMU close images that it holds as nodes.

    QEMU may have kept some of such an image in memory until now.
    """
    intent, vm = session.intent, session.seen.vm
    tag = session.run.fdset_tag(intent.attempt)
    as_nodes = vm is not None and any(name.startswith(block_jobs.target_nodes(tag)) for name in vm.target_nodes)
    # On a thin volume, space that was reserved can be missing for a moment, and no job need tell of that. A guest that
    # stands still for another reason tries its write again, and stops again.
    is_stopped = vm is not None and has_stopped(vm.status, intent.guest)
    if vm is None or not (is_stopped or as_nodes):
        return
    async with Monitor(session.address, session.run.commands) as monitor:
        if is_stopped:
            # The target failed while nobody looked. The copy is good: the guest's write failed instead.
            await block_jobs.resume(monitor)
        await block_jobs.close_targets(monitor, vm, tag)


async def _finish_images(run: BackupRun, intent: Intent) -> tuple[DiskImage, ...]:
    """Bring the images onto stable storage, and describe them. Takes long; BackupError, OSError where it fails."""
    finishing = (
        run.repository.run_long(finish_image, intent, disk, run.images.fd(path))
        for path, disk in zip(run.image_paths(intent), intent.disks)
    )
    return tuple(await asyncio.gather(*finishing))


def finish_image(repository: Repository, intent: Intent, disk: StagedDisk, held: int | None = None) -> DiskImage:
    """Bring one image onto stable storage. C(held) is an fd of it from before its job, where there is one."""
    with opened(repository, intent) as staging:
        path, fd = staging.join(disk.image.image), staging.open(disk.image.image, os.O_RDWR)
    try:
        if os.fstat(fd).st_ino != disk.inode:
            raise BackupError(f"disk {disk.image.name}: {path} is not the file that the backup was started with")
        if disk.image.level == Level.FULL and disk.image.compression == "none":
            # Not for increments: what is loaded is compiled first.
            from .._qemu.spare_clusters import give_back  # noqa: PLC0415

            give_back(fd)
        status = preallocate.flush_open(path, fd, held)
        # Without such an fd, only the disk itself can tell that everything has arrived.
        digest = sha256(path, fd) if intent.checksum or held is None else None
    finally:
        os.close(fd)
    return replace(disk.image, bytes=status.st_size, sha256=digest if intent.checksum else None)


# To finish a set, with the VM's locks


async def publish(locked: LockedVm, _reason: str) -> Outcome | Pending:
    """Write the manifest of a set, give the set its name, and remove what its making has left."""
    run, task, intent, vm = locked.run, locked.task, locked.intent, locked.seen.vm
    await cleanup.thaw(locked, intent)
    if locked.monitor and vm and has_stopped(vm.status, intent.guest):
        # It has stopped at the very end of the copies, after the look before.
        await block_jobs.resume(locked.monitor)
    if intent.attempt not in locked.records.described:
        await run.repository.describe(intent, _manifest(run, intent, task.flushed[intent.attempt]))
    await _restore_labels(locked)
    manifest = await run.repository.publish(intent)
    run.close_images(intent)
    task.changed = True
    # From here on the set is good; what is left in QEMU is removed now or by any later run.
    records = await run.repository.records(intent.vm.name)
    try:
        await _tidy(replace(locked, records=records), manifest)
    except MonitorLost:
        # Libvirt was restarted, most often: the next look finds what is left, and removes it.
        return AGAIN
    except MonitorError as error:
        await _leave(locked, manifest, error)
    return results.published(run, task, manifest) if intent.id == run.plan.id else AGAIN


async def _restore_labels(locked: LockedVm) -> None:
    """Give images that were labelled for QEMU their labels back; the set is good without that, too."""
    if any(disk.label for disk in locked.intent.disks):
        try:
            await locked.run.repository.restore_labels(locked.intent)
        except OSError as error:
            locked.task.warn(
                f"an image of set {locked.intent.id} keeps the label with which QEMU has written it: {in_words(error)};"
                f" `restorecon -R {locked.run.repository.path}` when no backup runs there"
            )


async def tidy(locked: LockedVm, _reason: str) -> Outcome:
    """Remove what is left of the making of a published set."""
    try:
        await _tidy(locked, locked.manifest)
    except MonitorError as error:
        await _leave(locked, locked.manifest, error)
    return results.published(locked.run, locked.task, locked.manifest)


async def _tidy(locked: LockedVm, manifest: Manifest) -> None:
    await cleanup.remove_leftovers(locked, manifest.attempt)
    await locked.run.repository.tidy(manifest.vm.name, manifest.id)


async def _leave(locked: LockedVm, manifest: Manifest, error: MonitorError) -> None:
    """Leave in QEMU what cannot be removed now: the set is good, whatever becomes of QEMU."""
    locked.task.warn(
        f"what the making of set {manifest.id} has left in QEMU could not be removed: {error}; if that QEMU still"
        " runs, the next backup removes it"
    )
    await locked.run.repository.tidy(manifest.vm.name, manifest.id)


def _manifest(run: BackupRun, intent: Intent, images: tuple[DiskImage, ...]) -> Manifest:
    """Return what is said of a set. Its sequence number is given where it is written."""
    return Manifest(
        repository=run.repository.uuid,
        vm=intent.vm,
        id=intent.id,
        sequence=0,
        level=intent.level,
        run=intent.run,
        attempt=intent.attempt,
        started=intent.started,
        finished=utc_now(),
        duration=round(boottime() - intent.begun, 3),
        consistency=intent.consistency,
        consistency_reason=intent.consistency_reason,
        frozen_ms=intent.frozen_ms,
        qemu=intent.qemu,
        disks=images,
        hypervisor=intent.hypervisor,
        monitor=intent.monitor,
        libvirt_uri=intent.libvirt_uri,
    )
