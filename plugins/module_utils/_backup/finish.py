# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bring the images of a set to stable storage, and publish it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorError, RepositoryHangs, in_words
from .._common.formats import boottime, utc_now
from .._host import preallocate
from .._host.checksum import sha256
from .._qemu import block_jobs
from .._qemu.connection import parse_address
from .._qemu.monitor import Monitor
from .._repository.documents import Manifest
from . import cleanup, results
from .attempt_state import guest_stopped_by
from .task import AGAIN, Pending, WaitFor

if TYPE_CHECKING:
    from .._repository.documents import DiskImage, Intent, StagedDisk
    from .outcome import Outcome
    from .run import BackupRun
    from .session import LockedVm, VmSession


# Without locks


async def flush(session: VmSession, _reason: str) -> Pending | None:
    """Bring finished images onto stable storage and take their checksums: without locks, for it may take long.

    None says that the next step is known without another look.
    """
    run, task, intent = session.run, session.task, session.intent
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
    is_stopped = guest_stopped_by(intent, session.seen)
    if vm is None or not (is_stopped or as_nodes):
        return
    async with Monitor(parse_address(session.task.request.monitor), session.run.commands) as monitor:
        if is_stopped:
            # The target failed while nobody looked. The copy is good: the guest's write failed instead.
            await block_jobs.resume(monitor)
        await block_jobs.close_targets(monitor, vm, tag)


async def _finish_images(run: BackupRun, intent: Intent) -> tuple[DiskImage, ...]:
    """Bring the images onto stable storage, and describe them. Takes long; BackupError, OSError where it fails."""
    finishing = (
        run.repository.calls.run_long(finish_image, path, disk, intent.checksum, run.images.fd(path))
        for path, disk in zip(run.image_paths(intent), intent.disks)
    )
    return tuple(await asyncio.gather(*finishing))


def finish_image(path: str, disk: StagedDisk, checksum: bool, held: int | None = None) -> DiskImage:
    """Bring one image onto stable storage. C(held) is an fd of it from before its job, where there is one."""
    if os.stat(path).st_ino != disk.inode:
        raise BackupError(f"disk {disk.image.name}: {path} is not the file that the backup was started with")
    status = preallocate.flush(path, held)
    # Without such an fd, only the disk itself can tell that everything has arrived.
    digest = sha256(path) if checksum or held is None else None
    return replace(disk.image, bytes=status.st_size, sha256=digest if checksum else None)


# With the VM's locks


async def publish(locked: LockedVm, _reason: str) -> Outcome | Pending:
    """Write the manifest of a set, give the set its name, and remove what its making has left."""
    run, task, intent = locked.run, locked.task, locked.intent
    await cleanup.thaw(locked, intent)
    if intent.attempt not in locked.records.described:
        await run.repository.describe(intent, _manifest(run, intent, task.flushed[intent.attempt]))
    manifest = await run.repository.publish(intent)
    run.close_images(intent)
    task.changed = True
    # From here on the set is good; what is left in QEMU is removed now or by any later run.
    records = await run.repository.records(intent.vm.name)
    await _tidy(replace(locked, records=records), manifest)
    return results.published(run, task, manifest) if intent.id == run.plan.id else AGAIN


async def tidy(locked: LockedVm, _reason: str) -> Outcome:
    """Remove what is left of the making of a published set."""
    await _tidy(locked, locked.manifest)
    return results.published(locked.run, locked.task, locked.manifest)


async def _tidy(locked: LockedVm, manifest: Manifest) -> None:
    await cleanup.remove_leftovers(locked, manifest.attempt)
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
    )
