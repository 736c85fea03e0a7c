# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start the jobs of what is not there: records, images, reserved space, and then all jobs at one point in time."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, CommandError, MonitorGone, after, in_words
from .._common.formats import utc_now
from .._host import target_files
from .._host.confinement import set_file_label
from .._host.lock import host_lock_path
from .._host.preallocate import Writeback, keeps_holes
from .._host.process import boot_id, machine_id, spaces
from .._qemu import block_jobs, target_image
from .._qemu.jobs import query_jobs
from .._qemu.losses import lost_in_copy
from .._qemu.model import EncryptedSource, moved_nodes
from .._qemu.query import query_disks
from . import preflight, receipt
from .finish import clean, finish
from .owners import read_owners, write_owners
from .receipt import ReceiptPhase
from .request import BitmapMode, RequestedState, Sync
from .session import lost
from .steps import CopyState, attempt_of, digest

if TYPE_CHECKING:
    from typing import Any

    from .._qemu.model import Vm
    from .receipt import Record
    from .session import Locked, Session
    from .steps import Copy, Situation


async def prepare(session: Session, now: Situation) -> list[tuple[Copy, target_image.Target]]:
    """Return what is to be started, with its targets. All that can be refused is refused here, before a file exists."""
    vm, request = now.vm, now.request
    starting = [copy for copy in now.copies if request.grouped or copy.missing]
    preflight.refuse_busy(vm, starting)
    if request.encrypted_source == EncryptedSource.REFUSE:
        preflight.refuse_encrypted(vm, starting)
    session.warnings += [f"VM {vm.name}: {loss}" for loss in lost_in_copy((copy.disk for copy in starting), vm.disks)]
    for copy in starting:
        if not copy.record_path:
            session.warnings.append(
                f"{copy.drive.target} is a block device without a receipt: every call writes it anew; give receipt a"
                " path to change that"
            )
    return [
        (copy, await preflight.prepare_target(vm, copy, request.overwrite, request.selinux_label)) for copy in starting
    ]


async def start(locked: Locked, now: Situation) -> tuple[list[dict[str, Any]], str]:
    """Start what is not there; returns the results, and the attempt to wait for."""
    now = replace(now, copies=tuple(await finish(locked, now.copies)))
    prepared = [(copy, await _lay_out(now.vm, copy, target)) for copy, target in await prepare(locked.session, now)]
    locked.session.changed = True
    begun = await _begin(locked, now.vm, prepared)
    by_node = {copy.disk.node: copy for copy in begun}
    jobs = [by_node.get(copy.disk.node, copy).result() for copy in now.copies]
    return jobs, attempt_of(begun) if now.request.state == RequestedState.COMPLETED else ""


async def _lay_out(vm: Vm, copy: Copy, target: target_image.Target) -> target_image.Target:
    """Return a target whose image is laid out for the data of its disk, where that can be."""
    directory, name = os.path.split(target.path)
    if not copy.drive.is_laid_out or not keeps_holes(directory, f".{name[:8]}."):
        return target
    # Not for increments: what is loaded is compiled first.
    from .._qemu.data_map import lay_out  # noqa: PLC0415

    layout = await lay_out(vm.chain(copy.disk))
    return replace(target, layout=layout, expected=max(target.expected, layout.length)) if layout else target


async def _begin(locked: Locked, vm: Vm, prepared: list[tuple[Copy, target_image.Target]]) -> list[Copy]:
    """Make images and start their jobs: all of them, or none."""
    attempt = secrets.token_hex(6)
    begun: list[Copy] = []
    try:
        for copy, target in prepared:
            record = _new_record(copy, vm, attempt, target)
            _claim(copy, record)
            # Until its job is started, a job of this name is somebody else's.
            begun.append(replace(copy, found=CopyState.DEAD, job=None, record=record))
            try:
                inode, generation = await _make(locked, copy, target)
            except FileExistsError:
                # That is not ours to remove.
                receipt.discard(begun.pop().record_path)
                raise
            record = replace(
                record,
                inode=inode,
                generation=generation,
                reserved=_reserve(locked.session, target),
                phase=ReceiptPhase.COPYING,
            )
            begun[-1] = replace(begun[-1], record=record)
        # The look at where disks have data takes its time.
        vm = replace(vm, jobs=await query_jobs(locked.monitor))
        preflight.refuse_busy(vm, begun)
        _note_owners(locked, vm, begun)
        begun = [replace(copy, found=CopyState.RUNNING) for copy in begun]
        await _launch(locked, vm, begun, [target for _copy, target in prepared])
    except MonitorGone as error:
        raise lost(locked.session.request, attempt, str(error)) from error
    except (BackupError, OSError) as error:
        with after(error):
            await clean(locked, begun)
        if isinstance(error, OSError):
            raise BackupError(f"target: {in_words(error)}") from error
        raise
    return begun


def _claim(copy: Copy, record: Record) -> None:
    """Take the target's name before anything stands there."""
    if copy.record_path:
        try:
            receipt.create(copy.record_path, record)
        except FileExistsError:
            raise BackupError(
                f"target: {copy.drive.target}: another process began to make it this moment ({copy.record_path})"
            ) from None


async def _make(locked: Locked, copy: Copy, target: target_image.Target) -> tuple[int, int]:
    """Create the image; returns its identity. One that exists loses its receipt, which is true no more."""
    drive = copy.drive
    if drive.existing:
        if drive.receipt_path:
            receipt.discard(drive.receipt_path)
        if target.block_device:
            return 0, 0
        fd = target_files.open_image(target.path, os.O_RDWR)
    else:
        backing = (copy.disk.backing_file, copy.disk.backing_format)
        is_overlay = drive.sync == Sync.TOP and backing[0]
        fd = await target_image.create(target, backing if is_overlay else None, (locked.fd,))
    # The kernel tells of a failed write-back only those who had the file open by then.
    locked.session.images[target.path] = Writeback(fd)
    if target.label:
        set_file_label(target.path, target.label, fd)
    return target_files.identity(os.path.realpath(target.path))


def _reserve(session: Session, target: target_image.Target) -> bool:
    """Reserve the space of an image; returns whether its file system can do that."""
    if target_image.reserve(target):
        return True
    free = target_files.free_bytes(target.path)
    if free < target.expected:
        raise BackupError(
            f"target: {target.path}: No space left on device: the backup needs up to {target.expected} bytes there,"
            f" and {free} are free"
        )
    session.warnings.append(
        f"{target.path}: its file system cannot reserve space. If it becomes full during the copy, the backup is"
        " cancelled to protect the guest, but only while a call with state completed waits"
    )
    return False


def _note_owners(locked: Locked, vm: Vm, begun: list[Copy]) -> None:
    """Remember whose the jobs are whose ids do not tell it."""
    chosen = {copy.drive.job_id: digest(copy.drive, copy.disk) for copy in begun if copy.drive.job_id}
    if chosen:
        known = read_owners(host_lock_path(vm.process, locked.session.request.address))
        listed = {job.id for job in vm.jobs}
        write_owners(locked.fd, {**{name: known[name] for name in known if name in listed}, **chosen})


async def _launch(locked: Locked, vm: Vm, begun: list[Copy], targets: list[target_image.Target]) -> None:
    """Start the jobs of images that are ready."""
    request = locked.session.request
    await block_jobs.dismiss_jobs(locked.monitor, [copy.job_id for copy in begun if vm.job(copy.job_id)])
    starts = [
        block_jobs.BackupStart(copy.job_id, copy.disk.node, target, copy.opaque, copy.drive.arguments())
        for copy, target in zip(begun, targets)
    ]
    for copy in begun:
        # Before the start: a job that nobody knows of can end, and clear its bitmap.
        receipt.set_phase(copy.record_path, copy.record, ReceiptPhase.COPYING)
    try:
        await block_jobs.start_backups(locked.monitor, starts, request.completion_mode)
    except CommandError as error:
        disks = ", ".join(copy.who for copy in begun)
        raise BackupError(
            f"{request.address}: QEMU did not start the backup of {disks}: {error.description}"
        ) from error
    await _check_moment(locked, vm, begun)


async def _check_moment(locked: Locked, vm: Vm, begun: list[Copy]) -> None:
    """Raise BackupError where a disk was taken from under the guest after the look: by an external snapshot, say.

    What the guest has written since then is not in the copy of this disk, and may be in that of another.
    """
    copied = ((copy.disk.node, copy.disk.qdev) for copy in begun)
    nodes = moved_nodes(copied, vm.disks, await query_disks(locked.monitor))
    moved = [copy for copy in begun if copy.disk.node in nodes]
    if not moved:
        return
    disks = ", ".join(copy.who for copy in moved)
    told = (
        f"device: {disks} got another image on top, or was detached, at the moment when the backup was started (virsh"
        " snapshot-create, virsh detach-disk). So the backup lacks what the guest has written since"
    )
    if any(copy.drive.bitmap_mode == BitmapMode.ALWAYS for copy in begun):
        # Whatever becomes of such a copy, its bitmap is cleared: it is better than nothing.
        locked.session.warnings.append(told)
        return
    raise BackupError(f"{told}. Repeat the call")


def _new_record(copy: Copy, vm: Vm, attempt: str, target: target_image.Target) -> Record:
    """Return the first record of a copy."""
    return receipt.Record(
        phase=ReceiptPhase.PREPARING,
        attempt=attempt,
        job=copy.job_id,
        vm=vm.name,
        identity=vm.identity,
        hypervisor=machine_id(),
        process=(vm.process.pid, vm.process.start) if vm.process else (),
        device=copy.disk.qemu_name,
        node=copy.disk.node,
        sync=copy.drive.sync,
        bitmap=copy.drive.bitmap,
        bitmap_mode=copy.drive.bitmap_mode,
        target=copy.drive.target,
        format=target.format,
        virtual_size=copy.disk.virtual_size,
        started=utc_now("milliseconds"),
        guest=vm.status,
        reserved=False,
        replaces=target_files.identity(copy.drive.target),
        boot=boot_id(),
        monitor=vm.monitor,
        spaces=spaces(),
        label=target.former_label,
    )
