# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check everything before the first byte is restored."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, ToolError
from .._common.formats import human, utc_now
from .._host import target_files
from .._host.directory import Directory
from .._host.files import UNFINISHED
from .._host.lock import lock_directory, locked
from .._host.open_files import refuse_used
from .._qemu import image_lock
from .._qemu.image_chain import ImageRefused, open_chain
from .._qemu.qcow2 import read_header
from .._repository.catalog import read_catalog
from .._repository.images import check_all, layers
from .._repository.json_file import OddDocument, read_document
from .._repository.names import refuse_inside
from .._repository.pins import PARTIAL
from .model import RECEIPT
from .receipt import Restoration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from .._host.pace import Pace
    from .._qemu.image_chain import Chain
    from .._repository.documents import DiskImage, Manifest
    from .._repository.repository import Repository
    from .model import DiskRestore


LOCK_TIMEOUT = 1.0
"""Seconds to wait for another process that restores to the same target: longer than its last steps take."""


def refuse_collisions(disks: Sequence[DiskRestore]) -> None:
    """Refuse targets that are in the way of each other, or of backups."""
    taken: set[str] = set()
    for disk in disks:
        target = os.path.realpath(disk.target)
        refuse_inside("target", target)
        names = {target, target + PARTIAL, target + RECEIPT}
        if names & taken:
            raise Refused("target", f"{disk.target} conflicts with the target of another disk")
        taken |= names


def is_restored(repository: Repository, disk: DiskRestore) -> bool:
    """Return whether the receipt says that just this was restored, and nobody has changed it since.

    A block device has no time of its last change.
    """
    receipt = read_receipt(disk.receipt)
    if receipt is None or disk.block_device:
        return False
    try:
        status = os.stat(disk.target)
    except FileNotFoundError:
        return False
    expected = make_receipt(repository, disk, status)
    if disk.overlay:
        # An overlay is there to be written to.
        expected = replace(expected, size=receipt.size, mtime=receipt.mtime)
    return replace(receipt, when="") == replace(expected, when="") and (
        not disk.overlay or _is_overlay_of(disk.target, repository.set_image_path(disk.manifest, disk.image))
    )


def _is_overlay_of(path: str, image: str) -> bool:
    """Return whether a file builds on an image, or reads no other one any more. The next file may get its inode."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            backing = read_header(fd).backing
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return False
    return not backing or os.path.realpath(os.path.join(os.path.dirname(path), backing)) == os.path.realpath(image)


def read_receipt(path: str) -> Restoration | None:
    """Return what stands beside a restored disk; None where there is nothing."""
    try:
        with Directory.at(os.path.dirname(path)) as directory:
            found: Restoration | None = read_document(directory, os.path.basename(path), Restoration)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OddDocument as error:
        # What nobody can read says of nothing that it was restored.
        if error.damaged:
            return None
        raise
    return found


def make_receipt(repository: Repository, disk: DiskRestore, status: os.stat_result) -> Restoration:
    """Return what is written beside a restored disk, whose file has this status."""
    return Restoration(
        repository=repository.uuid,
        vm=disk.manifest.vm.name,
        id=disk.manifest.id,
        attempt=disk.manifest.attempt,
        disk=disk.name,
        method=disk.method,
        format=disk.format,
        inode=status.st_ino,
        size=status.st_size,
        mtime=status.st_mtime_ns,
        when=utc_now(),
    )


def check_target(disk: DiskRestore, overwrite: bool) -> None:
    """Refuse a target that must not be overwritten, or that is in use."""
    directory = os.path.dirname(disk.target)
    if not os.path.isdir(directory):
        raise Refused("target", f"{disk.target}: there is no directory {directory}")
    if disk.block_device:
        check_device(disk, overwrite)
        return
    target_files.check_length("target", disk.target, PARTIAL, RECEIPT + UNFINISHED)
    if os.path.lexists(disk.target):
        if not os.path.isfile(disk.target):
            raise Refused("target", f"{disk.target} is neither a file nor a block device")
        if not overwrite:
            raise Refused(
                "target", f"{disk.target} exists, and this restore has not written it; overwrite: true replaces it"
            )
        check_unused(disk.target)


def check_device(disk: DiskRestore, overwrite: bool) -> None:
    """Refuse a block device that is too small, in use, or not to be overwritten."""
    if disk.overlay or disk.format != "raw":
        raise Refused("target", f"{disk.target} is a block device: it takes a copy in format raw only")
    if not overwrite:
        raise Refused("target", f"{disk.target} is a block device: to replace its content, use overwrite: true")
    fd = os.open(disk.target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size < disk.image.virtual_size:
        raise Refused(
            "target",
            f"{disk.target} has {size} bytes, and disk {disk.name} needs {disk.image.virtual_size}",
        )
    reason = target_files.unusable_device(disk.target)
    if reason:
        raise Refused("target", f"{disk.target} {reason}")
    check_unused(disk.target)


def check_unused(path: str, user: str = "a running VM") -> None:
    """Refuse a file that a running VM has open: the VM would go on with a file that has no name any more."""
    if image_lock.is_locked(path):
        raise Refused("target", f"{path} is in use by {user}; see `fuser {path}`")
    refuse_used("target", path)


async def check_space(repository: Repository, disks: Sequence[DiskRestore]) -> None:
    """Refuse what would not fit; disks that go to one file system share its free space."""
    needed: dict[int, int] = {}
    for disk in disks:
        directory = os.path.dirname(disk.target)
        device = os.stat(directory).st_dev
        needed[device] = needed.get(device, 0) + await _copy_bytes(repository, disk)
        free = target_files.free_bytes(directory)
        if needed[device] > free:
            raise Refused(
                "target",
                f"{directory} has {human(free)} free, and the disks that go there take {human(needed[device])}",
            )


async def _copy_bytes(repository: Repository, disk: DiskRestore) -> int:
    """Return the bytes that a copy takes, as a qcow2 image: for raw, qemu-img would count the holes."""
    try:
        with open_images(repository, disk) as chain:
            return await chain.copy_bytes(disk.image.virtual_size)
    except ToolError:
        # A set that cannot be measured is still restored.
        return min(disk.image.virtual_size, sum(image.bytes for _manifest, image in disk.chain))


def images(repository: Repository, disk: DiskRestore) -> list[tuple[Manifest, DiskImage]]:
    """Return the images of a disk as they are now; BackupError where the set is another one, or not whole any more."""
    vm = disk.manifest.vm.name
    catalog = read_catalog(repository, vm)
    there = catalog.records.published(disk.manifest.id)
    if there is None or there.attempt != disk.manifest.attempt:
        raise BackupError(f"VM {vm}: set {disk.manifest.id} was removed meanwhile, and cannot be restored any more")
    # A consolidation makes the chain shorter; the disk reads the same.
    return catalog.chain(there, disk.name)


@contextmanager
def open_images(repository: Repository, disk: DiskRestore) -> Iterator[Chain]:
    """Open the images of a disk; ImageRefused where one says that it is something else than its manifest says."""
    with ExitStack() as stack:
        while True:
            found = images(repository, disk)
            try:
                chain = stack.enter_context(open_chain(layers(repository, found)))
                break
            except (ImageRefused, OSError):
                # It may have become a full image at this moment, and what it has built on may have gone.
                if images(repository, disk) == found:
                    raise
        yield chain


def check_headers(repository: Repository, disks: Sequence[DiskRestore]) -> None:
    """Raise BackupError where an image of these disks says that it is something else than its manifest says."""
    for disk in disks:
        try:
            with open_images(repository, disk):
                pass
        except ImageRefused as error:
            where = f"VM {disk.manifest.vm.name}, set {disk.manifest.id}, disk {disk.name}"
            raise BackupError(f"{where}: {error}. Nothing was restored") from error


async def check_checksums(
    repository: Repository, vm: str, disks: Sequence[DiskRestore], paces: Mapping[str, Pace]
) -> None:
    """Raise BackupError where an image of these disks is not what was written.

    C(paces) has, by their targets, the disks that are copied at this moment.
    """
    while True:
        chains = [images(repository, disk) for disk in disks]
        # The oldest ones are the largest, and what a copy begins with.
        found = {
            (manifest.id, image.name): ((manifest, image), paces.get(disk.target))
            for disk, chain in zip(disks, chains)
            for manifest, image in reversed(chain)
        }
        errors = await check_all(
            repository,
            [image for image, _pace in found.values()],
            {name: pace for name, (_image, pace) in found.items() if pace},
        )
        # Where no pin can be written, an image may have become a full one meanwhile, and what it has built on may have
        # gone.
        if not errors or chains == [images(repository, disk) for disk in disks]:
            break
    if errors:
        wrong = "; ".join(f"set {set_id}, disk {disk}: {error}" for (set_id, disk), error in errors.items())
        spoilt = [disk.target for disk in disks if disk.block_device and disk.target in paces]
        devices = f", except {', '.join(spoilt)}: do not use its content" if spoilt else ""
        raise BackupError(f"VM {vm}: {wrong}. Nothing was restored{devices}")


def lock_target(target: str) -> AbstractAsyncContextManager[int]:
    """Return the lock of a target on this machine."""
    name = hashlib.sha256(os.path.realpath(target).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return locked(os.path.join(lock_directory(), f"restore-{name}.lock"), f"target {target}", LOCK_TIMEOUT)
