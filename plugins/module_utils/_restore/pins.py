# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep sets that overlays stand on from being pruned."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, in_words
from .._common.formats import utc_now
from .._host.machine import machine_id
from .._repository.annotations import read_annotations, remove_annotations, write_annotation
from .._repository.catalog import read_catalog
from .._repository.documents import Pin
from .model import RestoreMethod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from .._repository.repository import Repository
    from .model import DiskRestore


# Pins


def pin_of(piece: DiskRestore) -> Pin:
    # A device is written to under its own name: nothing else stands for the restore.
    path = piece.target if piece.method == RestoreMethod.OVERLAY or piece.block_device else piece.partial
    return Pin(piece.manifest.id, piece.disk, path, os.uname().nodename, machine_id(), utc_now())


@asynccontextmanager
async def pinned(repository: Repository, vm: str, piece: DiskRestore, warnings: list[str]) -> AsyncIterator[None]:
    """Keep the chain from being pruned while it is read: for a moment, or as long as there is the overlay."""
    is_new = await put_pin(repository, vm, piece, warnings)
    try:
        yield
    except BaseException:
        if is_new:
            await _take_back(repository, vm, [pin_of(piece)], warnings)
        raise
    await take_other_pins(repository, vm, piece, warnings)


async def put_pin(repository: Repository, vm: str, piece: DiskRestore, warnings: list[str]) -> bool:
    """Whether there is a pin now that was not there before.

    A repository that is mounted read-only cannot be told, nor one whose lock is held by a machine that has died: it is
    read all the same. Raises BackupError where the set has gone since the sets were read: from here on the pin would
    keep it.
    """
    pin = pin_of(piece)
    try:
        async with repository.lock(vm):
            _check_there(repository, vm, piece)
            if is_same_pin(pin, read_annotations(repository, vm).pins):
                return False
            write_annotation(repository, vm, pin)
    except (BackupError, OSError) as error:
        # This is what nothing can be restored without, with the lock or not.
        _check_there(repository, vm, piece)
        warnings.append(
            f"{repository.path} cannot be written to ({in_words(error)}), and so nobody is told that set {pin.id} is in"
            f" use: do not prune it while {pin.path} is there"
        )
        return False
    return True


def _check_there(repository: Repository, vm: str, piece: DiskRestore) -> None:
    """BackupError where a set is not the one any more that was looked at, or cannot be read whole."""
    held = read_catalog(repository, vm)
    there = held.shelf.published(piece.manifest.id)
    if there is None or there.attempt != piece.manifest.attempt:
        raise BackupError(f"VM {vm}: set {piece.manifest.id} was removed meanwhile, and cannot be restored any more")
    # Its chain may have become shorter: what a disk reads as stays the same then.
    held.chain(there, piece.disk)


def is_same_pin(pin: Pin, pins: Iterable[Pin]) -> bool:
    return any(replace(other, since="") == replace(pin, since="") for other in pins)


async def take_other_pins(repository: Repository, vm: str, piece: DiskRestore, warnings: list[str]) -> None:
    """Take the pins of what has stood under this name before, or was to; that of an overlay which is there stays."""
    needed = [pin_of(piece)] if piece.method == RestoreMethod.OVERLAY else []
    others = [
        pin
        for pin in read_annotations(repository, vm).pins
        if pin.machine_id == machine_id() and pin.path in (piece.target, piece.partial) and not is_same_pin(pin, needed)
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
        remove_annotations(repository, vm, pins)
