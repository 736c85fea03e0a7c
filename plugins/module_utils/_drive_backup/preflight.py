# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Refuse what a look at the VM and the target shows to be wrong, before the first file or job exists."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, ToolError, in_words
from .._common.redaction import REMOVED, redact_name
from .._host import open_files, preallocate, target_files
from .._host.confinement import ADMITTED, Label, Sample, admit, keeps_length, label_of, open_labels
from .._host.files import scratch
from .._qemu import estimate, image_commands, image_lock, qemu_img, target_image
from .receipt import ReceiptPhase
from .request import NO_KEY, Sync
from .steps import CopyState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._host.confinement import Admission
    from .._qemu.model import Disk, Vm
    from .request import Drive
    from .steps import Copy


async def prepare_target(vm: Vm, copy: Copy, overwrite: bool, may_label: bool = True) -> target_image.Target:
    """Return the target to be written, after every check that needs the VM or the file.

    C(may_label) says that the file may get another SELinux context, where QEMU is not given it otherwise.
    """
    drive, disk = copy.drive, copy.disk
    _refuse_own_image(drive, vm)
    if vm.cannot_copy(disk):
        raise Refused("device", vm.cannot_copy(disk))
    if drive.sync == Sync.TOP and not drive.existing and REMOVED in disk.backing_file:
        raise Refused(
            "sync",
            f"disk {disk.name} of VM {vm.name}: the name of its backing file contains a secret ({disk.backing_file}),"
            " and the target would contain that name. Make the target yourself and use mode: existing, or copy the"
            " whole disk with sync: full",
        )
    _refuse_bitmap(drive, disk, vm)
    image_format = drive.format or "qcow2"
    if drive.existing:
        image_format = await _existing_format(drive, disk)
    else:
        await _check_format(image_format)
    if drive.compress and image_format == "raw":
        raise Refused("compress", f"{drive.target} is a raw image, which cannot be compressed")
    if copy.found in (CopyState.OCCUPIED, CopyState.DONE) and not overwrite:
        await _refuse_overwriting(copy, image_format)
    elif copy.found in (CopyState.OCCUPIED, CopyState.DONE):
        _refuse_hidden(copy, vm)
    await _refuse_used(drive, image_format)
    admission = _admission(vm, drive, image_format)
    refusal = admission.refusal(may_label)
    if refusal:
        raise Refused("target", refusal)
    return target_image.Target(
        path=drive.image_path,
        format=image_format,
        size=disk.virtual_size,
        expected=await estimate.expected_bytes(disk, image_format, drive.sync, drive.bitmap),
        compress=drive.compress,
        block_device=target_files.is_block_device(drive.target),
        label=admission.label,
        former_label=admission.former_label,
    )


def _admission(vm: Vm, drive: Drive, image_format: str) -> Admission:
    """Tell whether a confined QEMU is given the target. Refused where its format is one that it could not write."""
    qemu = label_of(vm.process.pid) if vm.process else Label()
    fault = keeps_length(qemu, image_format)
    if fault:
        raise Refused("target" if drive.existing else "format", f"{drive.target}: {fault}")
    if vm.process is None or not (qemu.is_held or qemu.context):
        return ADMITTED
    is_device = target_files.is_block_device(drive.target)
    directory = os.path.dirname(drive.target)
    images = open_labels(vm.process.pid, vm.files) if qemu.context else []
    if not drive.existing:
        try:
            with scratch(directory, f".{os.path.basename(drive.target)[:8]}.") as fd:
                return admit(qemu, Sample(fd, directory, spare=True), images)
        except OSError as error:
            raise Refused("target", in_words(error)) from error
    fd = target_files.open_image(drive.target, os.O_RDONLY)
    try:
        kind, place = ("blk_file", drive.target) if is_device else ("file", directory)
        return admit(qemu, Sample(fd, place, kind=kind), images)
    finally:
        os.close(fd)


def refuse_busy(vm: Vm, starting: list[Copy]) -> None:
    """Refuse to start beside any other block job: no guest is to find out what QEMU does with two."""
    others = vm.active_jobs()
    if others:
        raise BackupError(
            "VM {} is busy: {}; wait for its end, or cancel it with block_job, then repeat the backup of {}".format(
                vm.name,
                ", ".join(f"job {job.id} ({job.type}, {job.status})" for job in others),
                ", ".join(copy.who for copy in starting),
            )
        )
    if vm.domain and vm.domain.job:
        raise BackupError(
            f"VM {vm.name} is busy: libvirt is working on the domain: {vm.domain.job}; wait for its end (virsh"
            f" domjobinfo), then repeat the backup of {', '.join(copy.who for copy in starting)}"
        )
    for copy in starting:
        if copy.drive.job_id and vm.job(copy.drive.job_id):
            raise Refused(
                "job_id",
                f"{copy.drive.job_id} is taken by an ended job on VM {vm.name}; dismiss that one with block_job",
            )


def refuse_strangers(vm: Vm, copies: Sequence[Copy]) -> None:
    """Refuse to join jobs that leave out some of what is asked for."""
    jobs = ", ".join(copy.job_id for copy in copies if copy.running)
    rest = ", ".join(copy.who for copy in copies if copy.missing)
    raise BackupError(
        f"VM {vm.name} is busy with {jobs}, but not with {rest}; wait until the jobs end, or cancel them, then repeat"
        " the call"
    )


def refuse_mixed(vm: Vm, copies: Sequence[Copy]) -> None:
    """Refuse images that are there, but do not belong to one point in time."""
    records = ", ".join(f"{copy.record.target} ({copy.record.started})" for copy in copies if copy.record)
    raise Refused(
        "target",
        f"VM {vm.name}: the targets exist, but are of different moments: {records}; use other targets, or"
        " completion_mode individual",
    )


def refuse_encrypted(vm: Vm, starting: list[Copy]) -> None:
    """Refuse to copy what is encrypted at rest: its copy is not."""
    encrypted = ", ".join(copy.disk.name for copy in starting if copy.disk.encrypted)
    if encrypted:
        raise Refused(
            "encrypted_source",
            f"disk {encrypted} of VM {vm.name} is encrypted at rest, but its copy would not be encrypted; leave the"
            " disk out, or allow the copy with encrypted_source: warn",
        )


def refuse_lost_increment(copy: Copy, accepted: bool) -> None:
    """Refuse to go on where a copy is lost whose bitmap QEMU may have cleared at its end: that leaves a gap."""
    record = copy.record
    if copy.found != CopyState.DEAD or record is None or not record.consumes_bitmap or accepted:
        return
    if record.phase not in (ReceiptPhase.COPYING, ReceiptPhase.COPIED, ReceiptPhase.LOST):
        return
    raise BackupError(
        f"bitmap: the increment of {copy.who} that was started at {record.started} is lost ({copy.reason}), and QEMU"
        f" may have cleared bitmap {record.bitmap}, so later increments can miss its changes. Make a full backup and"
        f" begin a new chain. overwrite: true continues the old chain in spite of this, and removes {copy.record_path}"
    )


def _refuse_own_image(drive: Drive, vm: Vm) -> None:
    for path in (drive.target, drive.image_path):
        for own in (*vm.files, *_open_files(vm)):
            try:
                same = os.path.samefile(path, own)
            except OSError:
                same = os.path.normpath(path) == os.path.normpath(own)
            if same:
                raise Refused("target", f"{path} is an image of VM {vm.name} itself")


def _open_files(vm: Vm) -> list[str]:
    """Return what QEMU has open, whatever it is called where QEMU is; nothing where that is not to be seen."""
    directory = f"/proc/{vm.process.pid}/fd" if vm.process else ""
    try:
        return [os.path.join(directory, fd) for fd in os.listdir(directory)] if directory else []
    except OSError:
        return []


def _refuse_hidden(copy: Copy, vm: Vm) -> None:
    """Refuse to replace what may be an image of the VM itself. That an image is not locked proves little: QEMU can be
    told not to lock them.
    """
    target = copy.drive.target
    is_ours = copy.record is not None and copy.record.matches(os.stat(target), target_files.is_block_device(target))
    if hidden_files(vm) and not is_ours:
        raise Refused(
            "target",
            f"{target} exists without a receipt, and it may be an image of VM {vm.name} itself: this process cannot"
            f" see which files {', '.join(hidden_files(vm))} of that VM are. Use another target. Or remove the file"
            " yourself if nobody needs it. Or run this on the machine of the QEMU, over a monitor on a UNIX socket",
        )


def hidden_files(vm: Vm) -> tuple[str, ...]:
    """Return the images of a VM whose names do not tell which files they are; none where /proc tells the files."""
    if vm.process is not None:
        return ()
    hidden = (path for path in vm.files if not path.startswith("/") or path.startswith("/dev/fdset/"))
    return tuple(redact_name(path) for path in hidden)


def _refuse_bitmap(drive: Drive, disk: Disk, vm: Vm) -> None:
    if not drive.bitmap:
        return
    bitmap = disk.bitmap(drive.bitmap)
    if bitmap is None:
        known = ", ".join(found.name for found in disk.bitmaps) or "none"
        raise Refused("bitmap", f"disk {disk.name} of VM {vm.name} has no bitmap {drive.bitmap!r}; it has: {known}")
    if bitmap.unusable:
        raise Refused(
            "bitmap",
            f"{bitmap.name} of disk {disk.name}, VM {vm.name}, {bitmap.unusable}; make a full backup",
        )
    below = [layer.node for layer in vm.chain(disk)[1:] if layer.bitmap(drive.bitmap)]
    if below and drive.sync in (Sync.INCREMENTAL, Sync.BITMAP):
        # libvirt puts an empty one of the same name onto the overlay of an external snapshot.
        raise Refused(
            "bitmap",
            f"{bitmap.name} of disk {disk.name}, VM {vm.name}, is also in a layer below (node {', '.join(below)}):"
            " somebody took an external snapshot, and the writes before it are marked there only. Commit the snapshot,"
            " merge the bitmaps (block-dirty-bitmap-merge) into one of another name, or make a full backup",
        )


async def _check_format(image_format: str) -> None:
    try:
        await qemu_img.run(image_commands.options_command(image_format))
    except qemu_img.NotInstalled:
        raise
    except ToolError as error:
        raise Refused("format", f"qemu-img cannot make an image of format {image_format!r}") from error


async def _existing_format(drive: Drive, disk: Disk) -> str:
    """Return the format of an existing target. It must be given where it is raw: anything can be taken for raw."""
    try:
        info = await qemu_img.run_json(image_commands.info_command(drive.target, drive.format))
    except ToolError as error:
        raise Refused("target", f"{drive.target} cannot be used: {error}") from error
    if info.get("encrypted") and drive.compress:
        raise Refused(
            "compress",
            f"{drive.target} is encrypted, and QEMU writes compressed data into such an image without encryption;"
            f" {NO_KEY}",
        )
    if info.get("encrypted"):
        raise Refused("target", f"{drive.target} is encrypted: {NO_KEY}")
    if info["format"] == "raw" and drive.format != "raw":
        raise Refused("format", f"{drive.target} looks raw; say format: raw if it is meant to be")
    rounded = -(-disk.virtual_size // preallocate.SECTOR) * preallocate.SECTOR
    if info["virtual-size"] != rounded:
        raise Refused(
            "target",
            f"{drive.target} has {info['virtual-size']} bytes, and disk {disk.name} has {disk.virtual_size};"
            " they must be equal",
        )
    return str(info["format"])


async def _refuse_overwriting(copy: Copy, image_format: str) -> None:
    drive = copy.drive
    if drive.existing and copy.record is None:
        if target_files.is_block_device(drive.target):
            return
        # Nothing is lost in an image that holds nothing, such as one just made with qemu-img create.
        extents = await qemu_img.run_json(image_commands.map_command(drive.target, image_format))
        if not any(extent["data"] and extent["depth"] == 0 for extent in extents):
            return
    reason = copy.reason or "was made at another moment than the other drives' targets"
    raise Refused("target", f"{drive.target} exists, and {reason}; use another target, or overwrite: true")


def refuse_opened(target: str) -> None:
    """Refuse a target that somebody has open."""
    if image_lock.is_locked(target):
        raise Refused("target", f"{target} is in use by another process, a VM most often; see `fuser` of it")
    open_files.refuse_used("target", target)


async def _refuse_used(drive: Drive, image_format: str) -> None:
    """Refuse a target that another process has open as an image, or that is mounted."""
    if not os.path.exists(drive.target):
        return
    if target_files.is_block_device(drive.target):
        reason = target_files.unusable_device(drive.target)
        if reason:
            raise Refused("target", f"{drive.target} {reason}")
    refuse_opened(drive.target)
    try:
        await qemu_img.run(image_commands.info_command(drive.target, image_format if drive.existing else ""))
    except ToolError as error:
        if "lock" in str(error):
            raise Refused("target", f"{drive.target} is in use by another process: {error}") from error
