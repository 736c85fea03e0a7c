# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what one call asks for and has done so far, and the lock of its VM; look at each disk on its way to a target."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, JobFailed, MonitorGone, Refused
from .._host.lock import host_lock_path, locked
from .._host.process import boot_id, machine_id
from .._host.target_files import is_block_device
from .._qemu.block_jobs import target_nodes
from .._qemu.monitor import Monitor
from .._qemu.query import inspect_vm
from .owners import read_owners
from .receipt import ReceiptPhase, read, record_path
from .request import plain_path
from .steps import JOB_PREFIX, Copy, CopyState, Situation, digest, lost_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from .._host.preallocate import Writeback
    from .._host.process import Process
    from .._qemu.model import Disk, Job, Vm
    from .receipt import Record
    from .request import Drive, DriveBackupRequest


def examine(drive: Drive, vm: Vm, owners: dict[str, str]) -> Copy:
    """Look at one drive, and return its copy. Raises BackupError where the target is somebody else's business.

    C(owners) tells whose the jobs are that have an id of the user's choice.
    """
    copy = _examine(drive, vm, owners)
    node = target_nodes(copy.opaque)
    return replace(copy, open_node=node) if node in vm.target_nodes else copy


def _examine(drive: Drive, vm: Vm, owners: dict[str, str]) -> Copy:
    record = read(record_path(drive.receipt_path)) if drive.receipt_path else None
    disk = (_detached(drive, vm, record) if record else None) or vm.disk(drive.device)
    if record is None:
        return _examine_unrecorded(drive, vm, disk, owners)
    _refuse_foreign(drive, vm, record, owners)
    _refuse_ownerless(drive, vm, record, owners)
    copy = Copy(drive, disk, record.job, CopyState.DEAD, record, _own_job(drive, vm, disk, record.job, owners))
    if record.identity != vm.identity:
        return replace(copy, job=None, reason=f"it was for VM {record.vm}, which has ended")
    if record.phase == ReceiptPhase.CANCELLING:
        return replace(copy, reason="an earlier call cancelled it")
    if record.phase == ReceiptPhase.LOST:
        return replace(copy, reason="an earlier call could not finish it")
    if record.whole:
        return _examine_whole(copy, record)
    if record.origin.is_other_process(vm):
        return replace(copy, job=None, reason=f"its QEMU (process {record.process[0]}) has ended")
    if copy.job is None:
        return replace(copy, reason=f"QEMU does not list its job {record.job}")
    _refuse_other_request(copy, record)
    if not copy.job.ended:
        return replace(copy, found=CopyState.RUNNING)
    if not copy.job.error and not record.wrote(drive.image_path):
        return replace(copy, reason=f"{drive.image_path} is gone, or another file stands there")
    return replace(copy, found=CopyState.ENDED)


def _detached(drive: Drive, vm: Vm, record: Record) -> Disk | None:
    """Return a disk that was detached while it is copied: QEMU has it for as long as its job is listed."""
    if not vm.job(record.job) or record.origin.is_other_process(vm) or vm.find_disk(drive.device):
        return None
    left = next((disk for disk in vm.other_nodes if disk.node == record.node), None)
    return replace(left, name=drive.device, qdev=record.device) if left else None


def _examine_whole(copy: Copy, record: Record) -> Copy:
    """Look whether a finished image lies under one of its two names, as it was when it was finished."""
    _refuse_other_request(copy, record)
    for path in (copy.drive.image_path, copy.drive.target):
        if os.path.exists(path) and record.matches(os.stat(path), is_block_device(path)):
            return replace(copy, found=CopyState.COPIED)
    return replace(copy, reason="its finished image was removed or changed before it had its name")


def _refuse_other_request(copy: Copy, record: Record) -> None:
    """Refuse to go on with what is not what is asked for: it is left to the call that has begun it."""
    drive = copy.drive
    asked = (plain_path(drive.target), copy.disk.qemu_name, drive.sync, drive.bitmap, drive.bitmap_mode)
    begun = (plain_path(record.target), record.device, record.sync, record.bitmap, record.bitmap_mode)
    if asked != begun or drive.format not in ("", record.format):
        raise BackupError(
            f"target: {record.target}: job {record.job} is already making it from disk {record.device} (sync"
            f" {record.sync}, format {record.format}, since {record.started}), with other options than this call;"
            " repeat the call that began it, or use another target"
        )


def _refuse_foreign(drive: Drive, vm: Vm, record: Record, owners: dict[str, str]) -> None:
    if record.hypervisor != machine_id() and record.boot != boot_id():
        raise BackupError(
            f"target: {drive.target} is being made on another hypervisor (machine-id {record.hypervisor}, VM"
            f" {record.vm}, since {record.started}); if that one is gone for"
            f" good, remove {record_path(drive.receipt_path)}"
        )
    listed = vm.job(record.job)
    # Its name is the same in every attempt, and so a process id tells more where it means something.
    is_asked = listed is not None and record.identity == vm.identity and not record.origin.knows_process
    ended = record.origin.has_ended(vm, False, is_asked)
    # An id of the user's choice does not tell whose the job is, and what would is in the place where it was begun.
    # Where this very QEMU is seen, with what was noted beside its lock, that does: mounts alone are other ones.
    is_noted = record.origin.knows_process and record.job in owners
    is_told = record.job.startswith(JOB_PREFIX) or record.origin.is_from_here or is_noted
    unknown = listed is not None and not is_told
    if (ended is None or unknown) and not record.whole:
        raise BackupError(
            f"target: {drive.target}: a call in another container, or outside of this one, began it for VM {record.vm}"
            f" at {record.started}. This process cannot see whether job {record.job} still writes it. Repeat the call"
            f" where it began. If nobody makes this target any more, remove {record_path(drive.receipt_path)}"
        )
    alive = bool(record.process) and not ended
    if (alive and record.origin.is_other_process(vm)) or (record.identity != vm.identity and (alive or record.whole)):
        raise BackupError(
            f"target: {drive.target} is being made for another VM ({record.vm}, since {record.started}); use another"
            " target"
        )


def _refuse_ownerless(drive: Drive, vm: Vm, record: Record, owners: dict[str, str]) -> None:
    """Refuse a job with an id of the user's choice where the note whose it is has been lost.

    Version 0.1.0 has these notes in another directory. To call such a copy dead takes the image from a job that writes
    it.
    """
    listed = vm.job(record.job)
    noted = record.job.startswith(JOB_PREFIX) or record.job in owners
    if listed is None or noted or record.phase != ReceiptPhase.COPYING:
        return
    if record.identity != vm.identity or record.origin.is_other_process(vm):
        return
    raise BackupError(
        f"target: {drive.target}: job {record.job} of VM {vm.name} is making it since {record.started}, but no note of"
        " this version says who began the job: the directory of locks was removed, or another version of this"
        " collection began the job. Repeat the call with the version that began it. Or wait until the job ends, or"
        " cancel it, then dismiss it (block_job): the next call makes the image again"
    )


def _own_job(drive: Drive, vm: Vm, disk: Disk, job_id: str, owners: dict[str, str]) -> Job | None:
    """Return the job of this id, if it is this copy's. An id of ours tells that itself."""
    if job_id.startswith(JOB_PREFIX) or owners.get(job_id) == digest(drive, disk):
        return vm.job(job_id)
    return None


def _examine_unrecorded(drive: Drive, vm: Vm, disk: Disk, owners: dict[str, str]) -> Copy:
    job_id = drive.job_id or JOB_PREFIX + digest(drive, disk)
    job = _own_job(drive, vm, disk, job_id, owners)
    copy = Copy(drive, disk, job_id, CopyState.ABSENT, None, job)
    if not drive.receipt_path:
        # A block device without a receipt: the job in QEMU is all the memory there is.
        return replace(
            copy, found=CopyState.OCCUPIED if job is None else CopyState.ENDED if job.ended else CopyState.RUNNING
        )
    if job is not None and not job.ended:
        raise BackupError(
            f"VM {vm.name}: job {job.id} runs, but {record_path(drive.receipt_path)}, the record of the job, is"
            " missing; cancel the job (block_job), or wait until it ends"
        )
    if not drive.existing and os.path.lexists(drive.image_path):
        raise Refused(
            "target", f"{drive.image_path} exists, and no record says that this collection made it; move it away"
        )
    receipt = read(drive.receipt_path)
    if not os.path.lexists(drive.target):
        return copy
    if receipt is None:
        return replace(copy, found=CopyState.OCCUPIED, reason="it has no receipt")
    if not receipt.whole:
        return replace(copy, reason="an earlier attempt left it unfinished")
    difference = _difference(drive, vm, disk, receipt)
    return replace(copy, found=CopyState.OCCUPIED if difference else CopyState.DONE, record=receipt, reason=difference)


def _difference(drive: Drive, vm: Vm, disk: Disk, receipt: Record) -> str:
    """Return how a finished target differs from what is asked for; empty where it does not."""
    asked = {
        "VM": (vm.identity, receipt.identity),
        "disk": (disk.qemu_name, receipt.device),
        "sync": (drive.sync, receipt.sync),
        "bitmap": (drive.bitmap, receipt.bitmap),
        "format": (drive.format or receipt.format, receipt.format),
        "virtual size": (disk.virtual_size, receipt.virtual_size),
    }
    for name, (wanted, found) in asked.items():
        if wanted != found:
            return "its receipt is for another {} ({})".format(name, found or "none")
    device = is_block_device(drive.target)
    if device and plain_path(drive.target) != plain_path(receipt.target):
        return f"its receipt is for another device ({receipt.target})"
    if not receipt.matches(os.stat(drive.target), device):
        return "it was changed or replaced after its receipt was written"
    return ""


def lost(request: DriveBackupRequest, attempt: str, reason: str) -> JobFailed:
    """Return the error of a call whose QEMU has ended: its jobs are gone, and what they left is no backup."""
    jobs = []
    for drive in request.drives:
        record = read(record_path(drive.receipt_path)) if drive.receipt_path else None
        if record and record.attempt == attempt and not record.whole:
            jobs.append(lost_result(drive, record, reason))
    return JobFailed(
        f"{reason}. QEMU has ended, so the backup has failed. Repeat the call when the VM runs: it removes the remains"
        " and starts again",
        jobs=jobs,
    )


@dataclass
class Session:
    """One call: what it asks for, and what it has done so far. C(commands) lists what QEMU was told.

    C(images) are the images that this process has made, by path. They stay open until it ends.
    """

    request: DriveBackupRequest
    commands: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changed: bool = False
    images: dict[str, Writeback] = field(default_factory=dict)

    def monitor(self) -> Monitor:
        """Return a conversation with QEMU that is still to be begun."""
        return Monitor(self.request.address, self.commands)


@dataclass(frozen=True)
class Locked:
    """A session that holds its VM's lock and its monitor. Whatever changes something takes one.

    C(fd) is the file descriptor of the lock.
    """

    session: Session
    monitor: Monitor
    fd: int


@asynccontextmanager
async def lock(session: Session, process: Process | None) -> AsyncIterator[Locked]:
    """Hold the lock of the VM whose QEMU is C(process), and its monitor after that."""
    address = session.request.address
    # In this order: nobody may wait for a lock while holding a monitor.
    async with locked(host_lock_path(process, address), str(address)) as fd, session.monitor() as monitor:
        if monitor.process != process:
            raise MonitorGone(f"{address}: QEMU was restarted in between")
        yield Locked(session, monitor, fd)


async def find_process(session: Session) -> Process | None:
    """Ask which QEMU serves the monitor; over TCP that is unknown."""
    async with session.monitor() as monitor:
        return monitor.process


async def observe(session: Session, monitor: Monitor, followed: str = "") -> Situation:
    """Look at the VM, and at all that is asked for."""
    request = session.request
    vm = await inspect_vm(monitor)
    owners = read_owners(host_lock_path(vm.process, request.address))
    copies = tuple(examine(drive, vm, owners) for drive in request.drives)
    nodes = [copy.disk.node for copy in copies]
    for copy in copies:
        if nodes.count(copy.disk.node) > 1:
            raise Refused("device", f"{copy.drive.device} is asked for more than once on VM {vm.name}")
    return Situation(request, vm, copies, followed)
