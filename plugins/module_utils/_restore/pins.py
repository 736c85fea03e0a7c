# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep sets that overlays stand on from being pruned."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, in_words
from .._common.formats import utc_now
from .._host.mounts import place_of
from .._host.process import machine_id
from .._repository.annotations import Pin, read_annotations
from .._repository.pins import is_elsewhere
from .._repository.published import remove_annotations, write_annotation
from .checks import images

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from .._repository.repository import Repository
    from .model import DiskRestore


def make_pin(disk: DiskRestore) -> Pin:
    """Return the pin of the file that reads the set, which is the unfinished copy, or an overlay."""
    # A block device has no other name while it is written to.
    path = disk.target if disk.overlay or disk.block_device else disk.partial
    # A prune in a container may have the machine-id of this machine, and other directories.
    place = place_of(path)
    return Pin(
        disk.manifest.id,
        disk.name,
        path,
        os.uname().nodename,
        machine_id(),
        utc_now(),
        mount=place.mount,
        file_system=place.file_system,
    )


@asynccontextmanager
async def pinned(repository: Repository, vm: str, disk: DiskRestore, warnings: list[str]) -> AsyncIterator[None]:
    """Keep a chain from being pruned while it is read: until the copy is complete, or as long as the overlay exists."""
    # When something goes wrong, the file system of the target may answer no more.
    pin = make_pin(disk)
    is_new = await put_pin(repository, vm, disk, warnings)
    try:
        yield
    except BaseException:
        if is_new:
            await _remove_or_warn(repository, vm, [pin], warnings)
        raise
    await remove_other_pins(repository, vm, disk, warnings)


async def put_pin(repository: Repository, vm: str, disk: DiskRestore, warnings: list[str]) -> bool:
    """Write the pin of a disk, and return whether it is new.

    A repository that is mounted read-only, or locked by a machine that has died, is read all the same, with a warning.
    Raises BackupError where the set was removed meanwhile: from here on, the pin keeps it.
    """
    pin = make_pin(disk)
    try:
        async with repository.lock(vm):
            images(repository, disk)
            pins = read_annotations(repository, vm).pins
            if not is_noted(pin, pins):
                write_annotation(repository, vm, pin)
    except (BackupError, OSError) as error:
        # The set has to be there, with the lock or without.
        images(repository, disk)
        warnings.append(
            f"{repository.path} cannot be written to ({in_words(error)}), so no note says that set {pin.id} is in use."
            f" Do not prune it while {pin.path} exists"
        )
        return False
    return not is_known(pin, pins)


def is_known(pin: Pin, pins: Iterable[Pin]) -> bool:
    """Return whether there is such a pin, however old, and wherever its path was then."""
    return is_noted(_without_place(pin), map(_without_place, pins))


def _without_place(pin: Pin) -> Pin:
    return replace(pin, mount="", file_system="")


def is_noted(pin: Pin, pins: Iterable[Pin]) -> bool:
    """Return whether there is just this pin, however old."""
    return any(replace(other, since="") == replace(pin, since="") for other in pins)


async def remove_other_pins(repository: Repository, vm: str, disk: DiskRestore, warnings: list[str]) -> None:
    """Remove the pins of what stood at the target before, or was to. The pin of an overlay that is there stays.

    So does that of one on another file system, which was mounted there before.
    """
    await _remove_pins_of_target(repository, vm, disk, [make_pin(disk)] if disk.overlay else [], warnings)


async def remove_former_pins(repository: Repository, vm: str, disk: DiskRestore, warnings: list[str]) -> None:
    """Remove the pins of another VM's disk that stood at the target, and was replaced."""
    if repository.has(vm):
        await _remove_pins_of_target(repository, vm, disk, [], warnings)


async def _remove_pins_of_target(
    repository: Repository, vm: str, disk: DiskRestore, needed: Sequence[Pin], warnings: list[str]
) -> None:
    others = [
        pin
        for pin in read_annotations(repository, vm).pins
        if pin.machine_id == machine_id()
        and pin.path in (disk.target, disk.partial)
        and not is_known(pin, needed)
        and not is_elsewhere(pin)
    ]
    if others:
        await _remove_or_warn(repository, vm, others, warnings)


async def _remove_or_warn(repository: Repository, vm: str, pins: Sequence[Pin], warnings: list[str]) -> None:
    """Remove pins. Where that fails, the restored disk is still good."""
    try:
        await remove_pins(repository, vm, pins)
    except (BackupError, OSError) as error:
        ids = ", ".join(sorted({pin.id for pin in pins}))
        warnings.append(
            f"{repository.path} cannot be written to ({in_words(error)}), so set {ids} still counts as in use by"
            f" {pins[0].path}: repeat the restore, or wait for the next prune on this machine"
        )


async def remove_pins(repository: Repository, vm: str, pins: Sequence[Pin]) -> None:
    """Say that these files read the set no more."""
    async with repository.lock(vm):
        remove_annotations(repository, vm, pins)
