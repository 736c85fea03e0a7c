# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check everything before the first byte is restored."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, ToolError
from .._common.formats import human, utc_now
from .._host import files
from .._host.lock import lock_directory, locked
from .._qemu import image_lock, qemu_img
from .._repository.annotations import PARTIAL
from .._repository.checksums import check_all
from .._repository.documents import Restoration
from .._repository.json_file import UNFINISHED, read_document
from .._repository.names import check_length
from .model import RECEIPT, RestoreMethod, image_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from .._repository.catalog import VmCatalog
    from .._repository.repository import Repository
    from .model import DiskRestore


LOCK_TIMEOUT = 1.0
"""Seconds to wait for somebody else who restores to the same target: longer than the end of such a work takes."""


# What is found before anything is written


def refuse_collisions(repository: Repository, pieces: Sequence[DiskRestore]) -> None:
    """Refuse targets that come in the way of each other, or of the backups."""
    taken: set[str] = set()
    for piece in pieces:
        target = os.path.realpath(piece.target)
        if os.path.commonpath([target, os.path.realpath(repository.path)]) == os.path.realpath(repository.path):
            raise Refused("target", f"{piece.target} is inside of the repository")
        names = {target, target + PARTIAL, target + RECEIPT}
        if names & taken:
            raise Refused("target", f"{piece.target} comes in the way of another disk's target")
        taken |= names


def is_done(repository: Repository, piece: DiskRestore) -> bool:
    """Whether just this was restored to just there, and nobody has touched it since. A block device cannot tell."""
    receipt: Restoration | None = read_document(piece.receipt, Restoration)
    if receipt is None or piece.block_device:
        return False
    try:
        status = os.stat(piece.target)
    except FileNotFoundError:
        return False
    asked = read_receipt(repository, piece, status)
    if piece.method == RestoreMethod.OVERLAY:
        # It is there to be written to.
        asked = replace(asked, size=receipt.size, mtime=receipt.mtime)
    return replace(receipt, when="") == replace(asked, when="")


def read_receipt(repository: Repository, piece: DiskRestore, status: os.stat_result) -> Restoration:
    return Restoration(
        repository=repository.uuid,
        vm=piece.manifest.vm.name,
        id=piece.manifest.id,
        attempt=piece.manifest.attempt,
        disk=piece.disk,
        method=piece.method,
        format=piece.format,
        inode=status.st_ino,
        size=status.st_size,
        mtime=status.st_mtime_ns,
        when=utc_now(),
    )


def check_target(piece: DiskRestore, overwrite: bool) -> None:
    """Refuse a target that is not to be written to, or that somebody has in use."""
    directory = os.path.dirname(piece.target)
    if not os.path.isdir(directory):
        raise Refused("target", f"{piece.target}: there is no directory {directory}")
    if piece.block_device:
        check_device(piece, overwrite)
        return
    check_length("target", piece.target, PARTIAL, RECEIPT + UNFINISHED)
    if os.path.lexists(piece.target):
        if not os.path.isfile(piece.target):
            raise Refused("target", f"{piece.target} is neither a file nor a block device")
        if not overwrite:
            raise Refused(
                "target", f"{piece.target} exists, and is not this restore; with overwrite: true it is replaced"
            )
        check_unused(piece.target)


def check_device(piece: DiskRestore, overwrite: bool) -> None:
    if piece.method == RestoreMethod.OVERLAY or piece.format != "raw":
        raise Refused("target", f"{piece.target} is a block device: it takes a copy in format raw only")
    if not overwrite:
        raise Refused("target", f"{piece.target} is a block device: overwrite: true says that its content may go")
    fd = os.open(piece.target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size < piece.image.virtual_size:
        raise Refused(
            "target",
            f"{piece.target} has {size} bytes, and disk {piece.disk} needs {piece.image.virtual_size}",
        )
    try:
        # The kernel refuses this while the device is mounted or part of another one.
        os.close(os.open(piece.target, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        use = "is in use" if error.errno == errno.EBUSY else "cannot be written to"
        raise Refused("target", f"{piece.target} {use}: {error.strerror}") from error
    check_unused(piece.target)


def check_unused(path: str, user: str = "a running VM") -> None:
    """Refuse what a running VM has open: it would go on with a file that has no name any more."""
    if image_lock.is_locked(path):
        raise Refused("target", f"{path} is in use by {user}; see `fuser {path}`")


async def check_space(repository: Repository, pieces: Sequence[DiskRestore]) -> None:
    """Refuse what would not fit; pieces that go to one file system share what is free there."""
    needed: dict[int, int] = {}
    for piece in pieces:
        directory = os.path.dirname(piece.target)
        device = os.stat(directory).st_dev
        needed[device] = needed.get(device, 0) + await _measured(repository, piece)
        free = files.free_bytes(directory)
        if needed[device] > free:
            raise Refused(
                "target",
                f"{directory} has {human(free)} free, and the disks that go there take {human(needed[device])}",
            )


async def _measured(repository: Repository, piece: DiskRestore) -> int:
    """Bytes that a copy takes; where that cannot be found out, what its images take, which is no reason to refuse."""
    # For raw the holes would be counted.
    try:
        return await qemu_img.copy_bytes(image_path(repository, piece), piece.image.format, piece.image.virtual_size)
    except ToolError:
        return min(piece.image.virtual_size, sum(image.bytes for _manifest, image in piece.steps))


async def check_sums(repository: Repository, held: VmCatalog, pieces: Sequence[DiskRestore]) -> None:
    steps = {(manifest.id, image.name): (manifest, image) for piece in pieces for manifest, image in piece.steps}
    errors = await check_all(repository, steps.values())
    if errors:
        wrong = "; ".join(f"set {set_id}, disk {disk}: {error}" for (set_id, disk), error in errors.items())
        raise BackupError(f"VM {held.name}: {wrong}. Nothing was restored")


def lock_target(target: str) -> AbstractAsyncContextManager[int]:
    """The lock of a target on this machine."""
    mark = hashlib.sha256(os.path.realpath(target).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return locked(os.path.join(lock_directory(), f"restore-{mark}.lock"), f"target {target}", LOCK_TIMEOUT)
