# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks of a set brought back: copied out of their chain, or laid over it.

The repository is read as it lies. All that can be wrong with it or with a target is found before the first byte is
written. A target appears under its name only when it is whole and on stable storage; a receipt beside it then says what
it is, so that the same restore is not made twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, after, in_words
from .._common.formats import human
from .._host import files, preallocate
from .._qemu import qemu_img, target_image
from .._repository.annotations import read_annotations
from .._repository.json_file import write_document
from .checks import (
    check_device,
    check_space,
    check_sums,
    check_target,
    check_unused,
    is_done,
    lock_target,
    read_receipt,
    refuse_collisions,
)
from .model import RestoreMethod, image_path, size_of
from .pins import is_same_pin, pin_of, pinned, put_pin, take_other_pins

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.repository import Repository
    from .model import DiskRestore, RestoreOptions


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
    repository: Repository, held: VmCatalog, pieces: Sequence[DiskRestore], order: RestoreOptions
) -> tuple[list[dict[str, Any]], list[str]]:
    """Bring all pieces back, or none that could not be checked before; returns the results, and warnings."""
    refuse_collisions(repository, pieces)
    waiting = [piece for piece in pieces if not is_done(repository, piece)]
    for piece in waiting:
        check_target(piece, order.overwrite)
    await check_space(
        repository, [piece for piece in waiting if piece.method == RestoreMethod.COPY and not piece.block_device]
    )
    if order.checksum and waiting:
        await check_sums(repository, held, waiting)
    warnings: list[str] = []
    if not order.check_mode:
        done = await asyncio.gather(
            *(_bring_back(repository, held.name, piece, order, warnings) for piece in waiting), return_exceptions=True
        )
        _raise_failures(held.name, waiting, done)
        for piece in pieces:
            if piece not in waiting:
                await _go_on(repository, held, piece, warnings)
    return [piece.result(piece in waiting, size_of(piece)) for piece in pieces], warnings


def _raise_failures(vm: str, pieces: Sequence[DiskRestore], done: Sequence[BaseException | None]) -> None:
    failed = [(piece, error) for piece, error in zip(pieces, done) if error]
    for _piece, error in failed:
        if not isinstance(error, (BackupError, OSError)):
            raise error
    if failed:
        reasons = "; ".join(f"disk {piece.disk} to {piece.target}: {in_words(error)}" for piece, error in failed)
        good = [piece.result(True, size_of(piece)) for piece, error in zip(pieces, done) if not error]
        raise BackupError(f"VM {vm}: {reasons}", restored=good)


# Doing


async def _bring_back(
    repository: Repository, vm: str, piece: DiskRestore, order: RestoreOptions, warnings: list[str]
) -> None:
    # Of two that write to one target, both would be lost.
    async with lock_target(piece.target):
        if piece.block_device:
            async with pinned(repository, vm, piece, warnings):
                # Checksums take long.
                check_device(piece, order.overwrite)
                await _convert(repository, piece, piece.target)
                preallocate.flush(piece.target)
        else:
            await _write_file(repository, vm, piece, order, warnings)


async def _write_file(
    repository: Repository, vm: str, piece: DiskRestore, order: RestoreOptions, warnings: list[str]
) -> None:
    """Make the file under another name, and give it its own when it is whole."""
    replaces = files.identity(piece.target) if order.overwrite else (0, 0)
    # A process that was killed may have left one.
    _remove_partial(piece.partial)
    os.close(os.open(piece.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    made = files.identity(piece.partial)
    try:
        async with pinned(repository, vm, piece, warnings):
            await (_lay_over if piece.method == RestoreMethod.OVERLAY else _convert)(repository, piece, piece.partial)
            preallocate.flush(piece.partial)
            if replaces[0]:
                check_unused(piece.target)
            if files.identity(piece.partial) != made:
                raise BackupError(f"{piece.partial} is another file by now: somebody else restores to the same place")
            _take_name(repository, piece, replaces)
    except BaseException as error:
        with after(error):
            if files.identity(piece.partial) == made:
                files.remove(piece.partial)
        raise


def _remove_partial(path: str) -> None:
    """Remove what a restore has left unfinished. Refused where somebody is at it, perhaps on another machine."""
    if os.path.isfile(path):
        check_unused(path, "another process, such as a backup or a restore to the same place")
    files.remove(path)


def _take_name(repository: Repository, piece: DiskRestore, replaces: tuple[int, int]) -> None:
    """Give a complete file its name, and the receipt before: whatever comes in between, the two belong together."""
    write_document(piece.receipt, asdict(read_receipt(repository, piece, os.stat(piece.partial))))
    try:
        files.take_name(piece.partial, piece.target, replaces)
    except OSError as error:
        with after(error):
            files.remove(piece.receipt)
        raise


async def _convert(repository: Repository, piece: DiskRestore, path: str) -> None:
    source = await qemu_img.whole(image_path(repository, piece), piece.image.format)
    command = qemu_img.convert_command(source, path, piece.format, piece.block_device)
    if target_image.Target(path, piece.format, piece.image.virtual_size).direct and _takes_direct(path):
        # All of it is to be on stable storage in the end: the page cache would be a detour, and others need it.
        command[2:2] = ["-t", "none"]
    await qemu_img.run(command, timeout=qemu_img.LONG_TIMEOUT, is_long=True)


def _takes_direct(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _lay_over(repository: Repository, piece: DiskRestore, path: str) -> None:
    backing = (image_path(repository, piece), piece.image.format)
    await qemu_img.run(qemu_img.create_command(path, "qcow2", piece.image.virtual_size, backing=backing))


async def _go_on(repository: Repository, held: VmCatalog, piece: DiskRestore, warnings: list[str]) -> None:
    """Do what a process has left to do that was killed when the target was there already."""
    if os.path.lexists(piece.partial):
        async with lock_target(piece.target):
            # Who is at it puts it away.
            with contextlib.suppress(Refused):
                _remove_partial(piece.partial)
    if piece.method == RestoreMethod.OVERLAY and not is_same_pin(
        pin_of(piece), read_annotations(repository, held.name).pins
    ):
        await put_pin(repository, held.name, piece, warnings)
    await take_other_pins(repository, held.name, piece, warnings)
