# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start the copies of the disks of a VM that is off, in a storage daemon; what has not changed is not copied."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host.directory import WrongEntry
from .._host.open_files import refuse_used
from .._plan.disks import records_of
from .._qemu import image_files, storage_daemon
from .._qemu.disk_file import DiskFile
from .._qemu.monitor import Monitor
from .._qemu.vm_config import describe_files, describe_shut_off
from .._repository.description import read_description
from .._repository.documents import Phase
from .launch import launch as launch_jobs

if TYPE_CHECKING:
    from typing import Any

    from .._plan.disks import ChainLink
    from .._qemu.model import Disk, Vm
    from .._repository.documents import Intent
    from .prepare import AttemptDraft
    from .session import LockedVm


async def describe(locked: LockedVm, vm: Vm) -> dict[str, Any]:
    """Describe a VM that is off: as it was when it was seen last, where a set of it tells that. Warn of doubts."""
    last: dict[str, Any] = {}
    newest = locked.records.sets[-1] if locked.records.sets else None
    if newest and newest.vm.identity == vm.identity:
        # One without a description that can be read is none to go on from.
        with suppress(OSError, ValueError, WrongEntry):
            last = await locked.run.repository.run(read_description, newest)
    if vm.domain:
        description, doubts = await describe_shut_off(locked.task.request.address, vm, last)
        for doubt in doubts:
            locked.task.warn(doubt)
        return description
    return last or describe_files(vm)


async def launch(locked: LockedVm, vm: Vm, draft: AttemptDraft, intent: Intent, speed: int) -> Intent:
    """Start all jobs of an attempt that is prepared. C(speed) is bytes/s for each job, 0 for no limit."""
    run = locked.run
    files = tuple(DiskFile(disk.name, disk.file, disk.driver) for disk in vm.disks if disk.node)
    if not intent.jobs:
        intent = replace(intent, phase=Phase.COPIED)
        await run.repository.update(intent)
        return intent
    for file in files:
        # Not every program that writes to an image takes QEMU's lock.
        await image_files.ask(file, partial(refuse_used, "disks"), file.file)
    # From here on the new bitmaps mark what is written: before the copies begin, and so they mark no less than that.
    for disk, staged in zip(draft.disks, intent.disks):
        if staged.job and staged.image.bitmap:
            await image_files.add_bitmap(disk, staged.image.bitmap)
    paths = [run.repository.image_path(intent, disk.image.image) for disk in intent.disks if disk.job]
    targets = [fd for fd in map(run.images.fd, paths) if fd is not None]
    note = storage_daemon.DaemonNote(intent.attempt, intent.vm.name, files)
    address = await storage_daemon.start(locked.place, note, targets, run.settings.time_for(vm))
    async with Monitor(address, run.commands) as monitor:
        encrypted = {disk.node for disk in vm.disks if disk.encrypted}
        await storage_daemon.open_disks(monitor, files, encrypted)
        held = await storage_daemon.inspect(monitor, vm.name, vm.uuid, vm.monitor)
        process = monitor.process
        intent = replace(intent, qemu=monitor.version, process=(process.pid, process.start) if process else ())
        await run.repository.update(intent)
        links = tuple(_as_held(held, disk, link) for disk, link in zip(draft.disks, draft.links))
        return await launch_jobs(locked, monitor, replace(draft, links=links), intent, speed)


def _as_held(held: Vm, disk: Disk, link: ChainLink) -> ChainLink:
    """Return the link of a disk with the nodes of the storage daemon.

    Nobody can write to the disk any more, as it C(held) is now: what was seen before has to be as it was.
    """
    there = next(found for found in held.disks if found.node == disk.node)
    records = records_of(held.chain(there), link.bitmap) if link.bitmap else {}
    is_same = (
        there.virtual_size == disk.virtual_size
        and len(records) == len(link.records)
        and not any(record.unusable for record in records.values())
        and not (link.unchanged and any(record.count for record in records.values()))
    )
    if not is_same:
        raise BackupError(f"disk {disk.name} was changed while its copy was prepared: its VM was on for a moment")
    return replace(link, below=tuple(records)[1:], records=tuple(records.values()))
