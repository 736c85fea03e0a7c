# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Disks of a set brought back: copied out of their chain, or laid over it.

The repository is read as it lies. All that can be wrong with it or with a target is found before the first byte is
written. A target appears under its name only when it is whole and on stable storage; a receipt beside it then says what
it is, so that the same restore is not made twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import hashlib
import os
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils import _qemu_img, _target
from ansible_collections.vmfleet.backup.plugins.module_utils._checksum import check_all
from ansible_collections.vmfleet.backup.plugins.module_utils._documents import Pin, Restoration
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import BackupError, Refused, ToolError, after
from ansible_collections.vmfleet.backup.plugins.module_utils._files import in_words
from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import machine_id
from ansible_collections.vmfleet.backup.plugins.module_utils._library import holdings
from ansible_collections.vmfleet.backup.plugins.module_utils._lock import lock_directory, locked
from ansible_collections.vmfleet.backup.plugins.module_utils._marks import PARTIAL, read_marks, remove_marks, write_mark
from ansible_collections.vmfleet.backup.plugins.module_utils._names import check_length
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import (
    UNFINISHED,
    read_document,
    write_document,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._units import human, utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import DiskImage, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._library import Holdings
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository import Repository

COPY = "copy"
OVERLAY = "overlay"
METHODS = (COPY, OVERLAY)
FORMATS = ("qcow2", "raw")

RECEIPT = ".restored.json"

LOCK_TIMEOUT = 1.0
"""Seconds to wait for somebody else who restores to the same target: longer than the end of such a work takes."""


@dataclass(frozen=True)
class Piece:
    """One disk to be brought back: the images that it is made of, newest first, and where it goes."""

    disk: str
    steps: tuple[tuple[Manifest, DiskImage], ...]
    target: str
    format: str
    method: str

    @property
    def image(self) -> DiskImage:
        return self.steps[0][1]

    @property
    def manifest(self) -> Manifest:
        return self.steps[0][0]

    @property
    def block_device(self) -> bool:
        return _target.is_block_device(self.target)

    @property
    def receipt(self) -> str:
        return self.target + RECEIPT

    @property
    def partial(self) -> str:
        return self.target + PARTIAL

    def result(self, changed: bool, size: int) -> dict[str, Any]:
        return {
            "disk": self.disk,
            "target": self.target,
            "format": self.format,
            "method": self.method,
            "virtual_size": self.image.virtual_size,
            "bytes": size,
            "chain": [manifest.id for manifest, _image in self.steps],
            "changed": changed,
        }


@dataclass(frozen=True)
class Order:
    """What is asked for. C(checksum) takes the checksums of all images of the chains first."""

    overwrite: bool = False
    checksum: bool = True
    check_mode: bool = False


def headline(restored: Sequence[Mapping[str, Any]], check_mode: bool) -> str:
    """Return how many disks of a set were restored by this call."""
    made = sum(disk["changed"] for disk in restored)
    if check_mode:
        return f"{made} of {len(restored)} disks would be restored"
    return f"{made} of {len(restored)} disks were restored just now" if made else "all disks are there already"


def describe(restored: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return where each disk is, for people to read."""
    return [
        "{disk}: {target} ({format}, {size}, {method} of set {sets})".format(
            **disk, size=human(disk["virtual_size"]), sets=" on ".join(disk["chain"])
        )
        for disk in restored
    ]


async def restore(
    repository: Repository, held: Holdings, pieces: Sequence[Piece], order: Order
) -> tuple[list[dict[str, Any]], list[str]]:
    """Bring all pieces back, or none that could not be checked before; returns the results, and warnings."""
    _refuse_collisions(repository, pieces)
    waiting = [piece for piece in pieces if not _is_done(repository, piece)]
    for piece in waiting:
        _check_target(piece, order.overwrite)
    await _check_space(repository, [piece for piece in waiting if piece.method == COPY and not piece.block_device])
    if order.checksum and waiting:
        await _check_sums(repository, held, waiting)
    warnings: list[str] = []
    if not order.check_mode:
        done = await asyncio.gather(
            *(_bring_back(repository, held.name, piece, order, warnings) for piece in waiting), return_exceptions=True
        )
        _raise_failures(held.name, waiting, done)
        for piece in pieces:
            if piece not in waiting:
                await _go_on(repository, held, piece, warnings)
    return [piece.result(piece in waiting, _size(piece)) for piece in pieces], warnings


def _raise_failures(vm: str, pieces: Sequence[Piece], done: Sequence[BaseException | None]) -> None:
    failed = [(piece, error) for piece, error in zip(pieces, done) if error]
    for _piece, error in failed:
        if not isinstance(error, (BackupError, OSError)):
            raise error
    if failed:
        reasons = "; ".join(f"disk {piece.disk} to {piece.target}: {in_words(error)}" for piece, error in failed)
        good = [piece.result(True, _size(piece)) for piece, error in zip(pieces, done) if not error]
        raise BackupError(f"VM {vm}: {reasons}", restored=good)


def _size(piece: Piece) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(piece.target).st_blocks * 512 if not piece.block_device else piece.image.virtual_size
    return 0


# What is found before anything is written


def _refuse_collisions(repository: Repository, pieces: Sequence[Piece]) -> None:
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


def _is_done(repository: Repository, piece: Piece) -> bool:
    """Whether just this was restored to just there, and nobody has touched it since. A block device cannot tell."""
    receipt: Restoration | None = read_document(piece.receipt, Restoration)
    if receipt is None or piece.block_device:
        return False
    try:
        status = os.stat(piece.target)
    except FileNotFoundError:
        return False
    asked = _receipt(repository, piece, status)
    if piece.method == OVERLAY:
        # It is there to be written to.
        asked = replace(asked, size=receipt.size, mtime=receipt.mtime)
    return replace(receipt, when="") == replace(asked, when="")


def _receipt(repository: Repository, piece: Piece, status: os.stat_result) -> Restoration:
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


def _check_target(piece: Piece, overwrite: bool) -> None:
    """Refuse a target that is not to be written to, or that somebody has in use."""
    directory = os.path.dirname(piece.target)
    if not os.path.isdir(directory):
        raise Refused("target", f"{piece.target}: there is no directory {directory}")
    if piece.block_device:
        _check_device(piece, overwrite)
        return
    check_length("target", piece.target, PARTIAL, RECEIPT + UNFINISHED)
    if os.path.lexists(piece.target):
        if not os.path.isfile(piece.target):
            raise Refused("target", f"{piece.target} is neither a file nor a block device")
        if not overwrite:
            raise Refused(
                "target", f"{piece.target} exists, and is not this restore; with overwrite: true it is replaced"
            )
        _check_unused(piece.target)


def _check_device(piece: Piece, overwrite: bool) -> None:
    if piece.method == OVERLAY or piece.format != "raw":
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
    _check_unused(piece.target)


def _check_unused(path: str, user: str = "a running VM") -> None:
    """Refuse what a running VM has open: it would go on with a file that has no name any more."""
    if _target.is_locked(path):
        raise Refused("target", f"{path} is in use by {user}; see `fuser {path}`")


async def _check_space(repository: Repository, pieces: Sequence[Piece]) -> None:
    """Refuse what would not fit; pieces that go to one file system share what is free there."""
    needed: dict[int, int] = {}
    for piece in pieces:
        directory = os.path.dirname(piece.target)
        device = os.stat(directory).st_dev
        needed[device] = needed.get(device, 0) + await _measured(repository, piece)
        free = _target.free_bytes(directory)
        if needed[device] > free:
            raise Refused(
                "target",
                f"{directory} has {human(free)} free, and the disks that go there take {human(needed[device])}",
            )


async def _measured(repository: Repository, piece: Piece) -> int:
    """Bytes that a copy takes; where that cannot be found out, what its images take, which is no reason to refuse."""
    # For raw the holes would be counted.
    try:
        return await _qemu_img.copy_bytes(_path(repository, piece), piece.image.format, piece.image.virtual_size)
    except ToolError:
        return min(piece.image.virtual_size, sum(image.bytes for _manifest, image in piece.steps))


async def _check_sums(repository: Repository, held: Holdings, pieces: Sequence[Piece]) -> None:
    steps = {(manifest.id, image.name): (manifest, image) for piece in pieces for manifest, image in piece.steps}
    errors = await check_all(repository, steps.values())
    if errors:
        wrong = "; ".join(f"set {set_id}, disk {disk}: {error}" for (set_id, disk), error in errors.items())
        raise BackupError(f"VM {held.name}: {wrong}. Nothing was restored")


# Doing


async def _bring_back(repository: Repository, vm: str, piece: Piece, order: Order, warnings: list[str]) -> None:
    # Of two that write to one target, both would be lost.
    async with _alone(piece.target):
        if piece.block_device:
            async with _pinned(repository, vm, piece, warnings):
                # Checksums take long.
                _check_device(piece, order.overwrite)
                await _convert(repository, piece, piece.target)
                _target.flush(piece.target)
        else:
            await _write_file(repository, vm, piece, order, warnings)


def _alone(target: str) -> AbstractAsyncContextManager[int]:
    """The lock of a target on this machine."""
    mark = hashlib.sha256(os.path.realpath(target).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return locked(os.path.join(lock_directory(), f"restore-{mark}.lock"), f"target {target}", LOCK_TIMEOUT)


async def _write_file(repository: Repository, vm: str, piece: Piece, order: Order, warnings: list[str]) -> None:
    """Make the file under another name, and give it its own when it is whole."""
    replaces = _target.identity(piece.target) if order.overwrite else (0, 0)
    # A process that was killed may have left one.
    _remove_partial(piece.partial)
    os.close(os.open(piece.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    made = _target.identity(piece.partial)
    try:
        async with _pinned(repository, vm, piece, warnings):
            await (_lay_over if piece.method == OVERLAY else _convert)(repository, piece, piece.partial)
            _target.flush(piece.partial)
            if replaces[0]:
                _check_unused(piece.target)
            if _target.identity(piece.partial) != made:
                raise BackupError(f"{piece.partial} is another file by now: somebody else restores to the same place")
            _take_name(repository, piece, replaces)
    except BaseException as error:
        with after(error):
            if _target.identity(piece.partial) == made:
                _target.remove(piece.partial)
        raise


def _remove_partial(path: str) -> None:
    """Remove what a restore has left unfinished. Refused where somebody is at it, perhaps on another machine."""
    if os.path.isfile(path):
        _check_unused(path, "another process, such as a backup or a restore to the same place")
    _target.remove(path)


def _take_name(repository: Repository, piece: Piece, replaces: tuple[int, int]) -> None:
    """Give a complete file its name, and the receipt before: whatever comes in between, the two belong together."""
    write_document(piece.receipt, asdict(_receipt(repository, piece, os.stat(piece.partial))))
    try:
        _target.take_name(piece.partial, piece.target, replaces)
    except OSError as error:
        with after(error):
            _target.remove(piece.receipt)
        raise


async def _convert(repository: Repository, piece: Piece, path: str) -> None:
    source = await _qemu_img.whole(_path(repository, piece), piece.image.format)
    command = _qemu_img.convert_command(source, path, piece.format, piece.block_device)
    if _target.Target(path, piece.format, piece.image.virtual_size).direct and _takes_direct(path):
        # All of it is to be on stable storage in the end: the page cache would be a detour, and others need it.
        command[2:2] = ["-t", "none"]
    await _qemu_img.run(command, timeout=_qemu_img.LONG_TIMEOUT, is_long=True)


def _takes_direct(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _lay_over(repository: Repository, piece: Piece, path: str) -> None:
    backing = (_path(repository, piece), piece.image.format)
    await _qemu_img.run(_qemu_img.create_command(path, "qcow2", piece.image.virtual_size, backing=backing))


def _path(repository: Repository, piece: Piece) -> str:
    return os.path.join(repository.set_path(piece.manifest.vm.name, piece.manifest.id), piece.image.image)


async def _go_on(repository: Repository, held: Holdings, piece: Piece, warnings: list[str]) -> None:
    """Do what a process has left to do that was killed when the target was there already."""
    if os.path.lexists(piece.partial):
        async with _alone(piece.target):
            # Who is at it puts it away.
            with contextlib.suppress(Refused):
                _remove_partial(piece.partial)
    if piece.method == OVERLAY and not _same(_pin(piece), read_marks(repository, held.name).pins):
        await _put_pin(repository, held.name, piece, warnings)
    await _take_others(repository, held.name, piece, warnings)


# Pins


def _pin(piece: Piece) -> Pin:
    # A device is written to under its own name: nothing else stands for the restore.
    path = piece.target if piece.method == OVERLAY or piece.block_device else piece.partial
    return Pin(piece.manifest.id, piece.disk, path, os.uname().nodename, machine_id(), utc_now())


@asynccontextmanager
async def _pinned(repository: Repository, vm: str, piece: Piece, warnings: list[str]) -> AsyncIterator[None]:
    """Keep the chain from being pruned while it is read: for a moment, or as long as there is the overlay."""
    is_new = await _put_pin(repository, vm, piece, warnings)
    try:
        yield
    except BaseException:
        if is_new:
            await _take_back(repository, vm, [_pin(piece)], warnings)
        raise
    await _take_others(repository, vm, piece, warnings)


async def _put_pin(repository: Repository, vm: str, piece: Piece, warnings: list[str]) -> bool:
    """Whether there is a pin now that was not there before.

    A repository that is mounted read-only cannot be told, nor one whose lock is held by a machine that has died: it is
    read all the same. Raises BackupError where the set has gone since the sets were read: from here on the pin would
    keep it.
    """
    pin = _pin(piece)
    try:
        async with repository.lock(vm):
            _check_there(repository, vm, piece)
            if _same(pin, read_marks(repository, vm).pins):
                return False
            write_mark(repository, vm, pin)
    except (BackupError, OSError) as error:
        # This is what nothing can be restored without, with the lock or not.
        _check_there(repository, vm, piece)
        warnings.append(
            f"{repository.path} cannot be written to ({in_words(error)}), and so nobody is told that set {pin.id} is in"
            f" use: do not prune it while {pin.path} is there"
        )
        return False
    return True


def _check_there(repository: Repository, vm: str, piece: Piece) -> None:
    """BackupError where a set is not the one any more that was looked at, or cannot be read whole."""
    held = holdings(repository, vm)
    there = held.shelf.published(piece.manifest.id)
    if there is None or there.attempt != piece.manifest.attempt:
        raise BackupError(f"VM {vm}: set {piece.manifest.id} was removed meanwhile, and cannot be restored any more")
    # Its chain may have become shorter: what a disk reads as stays the same then.
    held.chain(there, piece.disk)


def _same(pin: Pin, pins: Iterable[Pin]) -> bool:
    return any(replace(other, since="") == replace(pin, since="") for other in pins)


async def _take_others(repository: Repository, vm: str, piece: Piece, warnings: list[str]) -> None:
    """Take the pins of what has stood under this name before, or was to; that of an overlay which is there stays."""
    needed = [_pin(piece)] if piece.method == OVERLAY else []
    others = [
        pin
        for pin in read_marks(repository, vm).pins
        if pin.machine_id == machine_id() and pin.path in (piece.target, piece.partial) and not _same(pin, needed)
    ]
    if others:
        await _take_back(repository, vm, others, warnings)


async def _take_back(repository: Repository, vm: str, pins: Sequence[Pin], warnings: list[str]) -> None:
    """Take back pins, as far as that can be done: what was restored is good without it."""
    try:
        await take_pins(repository, vm, pins)
    except (BackupError, OSError) as error:
        ids = ", ".join(sorted({pin.id for pin in pins}))
        warnings.append(
            f"{repository.path} cannot be written to ({in_words(error)}), and so set {ids} still counts as in use by"
            f" {pins[0].path}: restore once more, or leave it to the next prune on this machine"
        )


async def take_pins(repository: Repository, vm: str, pins: Sequence[Pin]) -> None:
    """Say that these overlays are no more."""
    async with repository.lock(vm):
        remove_marks(repository, vm, pins)


# Overlays removed


def overlays(repository: Repository, held: Holdings, directory: str) -> list[str]:
    """The overlays on the sets of a VM that were made here in a directory, whichever sets there are by now."""
    found = {
        pin.path
        for pin in held.marks.pins
        if pin.machine_id == machine_id() and os.path.dirname(pin.path) == os.path.normpath(directory)
    }
    for path in glob.glob(os.path.join(glob.escape(os.path.normpath(directory)), "*" + RECEIPT)):
        receipt: Restoration | None = read_document(path, Restoration)
        if receipt and (receipt.repository, receipt.vm, receipt.method) == (repository.uuid, held.name, OVERLAY):
            found.add(path[: -len(RECEIPT)])
    return sorted(path for path in found if not path.endswith(PARTIAL))


async def forget(
    repository: Repository, held: Holdings, targets: Sequence[str], check_mode: bool
) -> tuple[list[str], list[str]]:
    """Remove overlays of a VM that were made here, with their pins; returns the paths of those that were there.

    One that reads nothing from its set any more is somebody's disk by now: it stays, without its pin, and its path is
    among the second. So does a block device.
    """
    mine = [pin for pin in held.marks.pins if pin.machine_id == machine_id()]
    gone: list[str] = []
    independent: list[str] = []
    for path in targets:
        names = {path, path + PARTIAL}
        if _target.is_block_device(path):
            # What a restore that was killed has left is the pin alone: whatever is on the device stays.
            independent += [path] if any(pin.path == path for pin in mine) else []
            continue
        there = _is_overlay(repository, held.name, path)
        if there and await _is_independent(path):
            independent.append(path)
            continue
        for name in names:
            if os.path.isfile(name):
                _check_unused(name)
        if any(os.path.lexists(name) for name in names) or any(pin.path in names for pin in mine):
            gone.append(path)
    if not check_mode:
        for path in gone:
            await _let_go(repository, held.name, path, mine, ("", PARTIAL, RECEIPT, RECEIPT + UNFINISHED))
        for path in independent:
            await _let_go(repository, held.name, path, mine, (RECEIPT, RECEIPT + UNFINISHED))
    return gone, independent


def _is_overlay(repository: Repository, vm: str, path: str) -> bool:
    """Whether there is an overlay of a VM; Refused where something else stands there, such as that of another VM."""
    receipt: Restoration | None = read_document(path + RECEIPT, Restoration)
    there = os.path.lexists(path)
    if there and (receipt is None or receipt.method != OVERLAY):
        raise Refused("target", f"{path} is no overlay that was made by a restore; remove it by hand")
    is_begun = there or os.path.lexists(path + PARTIAL)
    if receipt and is_begun and (receipt.repository, receipt.vm) != (repository.uuid, vm):
        where = "" if receipt.repository == repository.uuid else " from another repository"
        raise Refused("target", f"{path} is disk {receipt.disk} of VM {receipt.vm}{where}, and not of VM {vm}")
    return there


async def _is_independent(path: str) -> bool:
    """Whether an overlay was rebased or streamed, so that all of its content is its own."""
    found = await _qemu_img.run_json(_qemu_img.info_command(path, "qcow2", shared=True))
    return "backing-filename" not in found


async def _let_go(repository: Repository, vm: str, path: str, pins: Sequence[Pin], ends: Iterable[str]) -> None:
    """Remove what stands at and beside an overlay's path, and its pins."""
    async with _alone(path):
        for end in ends:
            _target.remove(path + end)
        if os.path.isdir(os.path.dirname(path)):
            _target.sync_directory(os.path.dirname(path))
        own = [pin for pin in pins if pin.path in (path, path + PARTIAL)]
        if own:
            await take_pins(repository, vm, own)
