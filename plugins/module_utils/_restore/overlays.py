# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the overlays on the sets of a VM, and remove them."""

from __future__ import annotations

import glob
import os
import stat
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host import target_files
from .._host.directory import WrongEntry
from .._host.files import UNFINISHED
from .._host.process import machine_id
from .._qemu.qcow2 import read_header
from .._repository.annotations import annotation_name
from .._repository.names import vm_directory
from .._repository.pins import PARTIAL
from .checks import check_unused, lock_target, read_receipt
from .model import RECEIPT, RestoreMethod
from .pins import remove_pins

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from .._repository.annotations import Pin
    from .._repository.catalog import VmCatalog
    from .._repository.repository import Repository
    from .receipt import Restoration


def find_overlays(repository: Repository, catalog: VmCatalog, directory: str) -> list[str]:
    """Return the overlays of a VM that this machine has made in a directory, whether their sets exist or not."""
    found = {
        pin.path
        for pin in catalog.annotations.pins
        if pin.machine_id == machine_id() and os.path.dirname(pin.path) == os.path.normpath(directory)
    }
    for path in glob.glob(os.path.join(glob.escape(os.path.normpath(directory)), "*" + RECEIPT)):
        try:
            receipt = read_receipt(path)
        except WrongEntry:
            # It is none of ours.
            continue
        if receipt and (receipt.repository, receipt.vm, receipt.method) == (
            repository.uuid,
            catalog.name,
            RestoreMethod.OVERLAY,
        ):
            found.add(path[: -len(RECEIPT)])
    return sorted(path for path in found if not path.endswith(PARTIAL))


async def remove_overlays(
    repository: Repository, catalog: VmCatalog, targets: Sequence[str], check_mode: bool
) -> tuple[list[str], list[str]]:
    """Remove overlays of a VM that this machine has made, with their pins; return the paths of those that were there.

    An overlay that reads nothing from its set any more is a disk of its own: the file stays, its pin goes, and its path
    is among the second. So does a block device. BackupError in the end where something stands that is none of them.
    """
    mine = [pin for pin in catalog.annotations.pins if pin.machine_id == machine_id()]
    gone, independent, left = _sort(repository, catalog.name, targets, mine)
    if not check_mode:
        for path in gone:
            await _remove(repository, catalog.name, path, mine, ("", PARTIAL, RECEIPT, RECEIPT + UNFINISHED))
        for path in independent:
            await _remove(repository, catalog.name, path, mine, (RECEIPT, RECEIPT + UNFINISHED))
    if left:
        raise BackupError(f"target: {'; '.join(left)}", removed=gone, independent=independent)
    return gone, independent


def _sort(
    repository: Repository, vm: str, targets: Iterable[str], mine: Sequence[Pin]
) -> tuple[list[str], list[str], list[str]]:
    """Return which targets are overlays, which are disks of their own by now, and why others have to stay.

    C(mine) are the pins of this machine. Refused where a VM uses an overlay: its other disks are not removed, either.
    """
    gone: list[str] = []
    independent: list[str] = []
    left: list[str] = []
    for path in targets:
        names = {path, path + PARTIAL}
        if target_files.is_block_device(path):
            # A killed restore leaves a pin; what is on the device stays.
            independent += [path] if any(pin.path == path for pin in mine) else []
            continue
        objection = _objection(repository, vm, path, [pin for pin in mine if pin.path == path])
        if objection:
            left.append(objection)
            continue
        if os.path.lexists(path) and _backing(path) is None:
            independent.append(path)
            continue
        for name in names:
            if os.path.isfile(name):
                check_unused(name)
        if any(os.path.lexists(name) for name in names) or any(pin.path in names for pin in mine):
            gone.append(path)
    return gone, independent, left


def _objection(repository: Repository, vm: str, path: str, pins: Iterable[Pin]) -> str:
    """Return why what stands at a path is no overlay of a VM to be removed, such as that of another VM; mostly empty.

    C(pins) are those of this path.
    """
    try:
        receipt = read_receipt(path + RECEIPT)
    except WrongEntry as error:
        return str(error)
    there = os.path.lexists(path)
    is_begun = there or os.path.lexists(path + PARTIAL)
    if receipt and is_begun and (receipt.repository, receipt.vm) != (repository.uuid, vm):
        where = "" if receipt.repository == repository.uuid else " from another repository"
        return f"{path} is disk {receipt.disk} of VM {receipt.vm}{where}, and not of VM {vm}"
    if there and (receipt is None or receipt.method != RestoreMethod.OVERLAY):
        return f"{path} is no overlay that was made by a restore; remove it by hand"
    if receipt and there and not _is_made(repository, receipt, path):
        notes = [path + RECEIPT, *(os.path.join(repository.directory(vm), annotation_name(pin)) for pin in pins)]
        return (
            f"{path} is another file than the overlay of set {receipt.id} that was made there, so it stays, and so do"
            " the notes of that overlay. If the overlay has another name now, move it back. If it is gone, remove"
            f" {' and '.join(notes)}"
        )
    return ""


def _is_made(repository: Repository, receipt: Restoration, path: str) -> bool:
    """Return whether the overlay of a receipt stands at a path.

    Its inode alone does not tell: a tool may have written a copy that has taken its name, and the next file often gets
    the inode of one that was removed. What is to be removed has to build on the set. What builds on nothing stays.
    """
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return False
    try:
        backing = _backing(path)
    except ValueError:
        return False
    if backing is None:
        return found.st_ino == receipt.inode
    below = os.path.dirname(os.path.join(os.path.dirname(path), backing))
    place = os.path.join(vm_directory(receipt.vm), receipt.id)
    if os.path.realpath(below) == os.path.realpath(os.path.join(repository.path, place)):
        return True
    # The repository may have had another path then.
    return found.st_ino == receipt.inode and below.endswith(f"/{place}")


def _backing(path: str) -> str | None:
    """Return what an image builds on; None for one whose content is all its own. ValueError where it is no qcow2."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return read_header(fd).backing
    finally:
        os.close(fd)


async def _remove(repository: Repository, vm: str, path: str, pins: Sequence[Pin], suffixes: Collection[str]) -> None:
    """Remove the files whose names are the path of an overlay with these suffixes, and its pins."""
    async with lock_target(path):
        # It may have taken long to remove those before it.
        gone, independent, _left = _sort(repository, vm, [path], pins)
        if path not in (gone if "" in suffixes else independent):
            raise BackupError(f"target: {path} has changed since it was looked at. Call again")
        for suffix in suffixes:
            target_files.remove(path + suffix)
        if os.path.isdir(os.path.dirname(path)):
            target_files.sync_directory(os.path.dirname(path))
        own = [pin for pin in pins if pin.path in (path, path + PARTIAL)]
        if own:
            await remove_pins(repository, vm, own)
