# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the overlays on the sets of a VM, and remove them."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._host import target_files
from .._host.directory import WrongEntry
from .._host.files import UNFINISHED
from .._host.process import machine_id
from .._qemu.qcow2 import read_header
from .._repository.pins import PARTIAL
from .checks import check_unused, lock_target, read_receipt
from .model import RECEIPT, RestoreMethod
from .pins import remove_pins

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .._repository.annotations import Pin
    from .._repository.catalog import VmCatalog
    from .._repository.repository import Repository


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
    is among the second. So does a block device.
    """
    mine = [pin for pin in catalog.annotations.pins if pin.machine_id == machine_id()]
    gone: list[str] = []
    independent: list[str] = []
    for path in targets:
        names = {path, path + PARTIAL}
        if target_files.is_block_device(path):
            # A killed restore leaves a pin; what is on the device stays.
            independent += [path] if any(pin.path == path for pin in mine) else []
            continue
        if _overlay_exists(repository, catalog.name, path) and _is_independent(path):
            independent.append(path)
            continue
        for name in names:
            if os.path.isfile(name):
                check_unused(name)
        if any(os.path.lexists(name) for name in names) or any(pin.path in names for pin in mine):
            gone.append(path)
    if not check_mode:
        for path in gone:
            await _remove(repository, catalog.name, path, mine, ("", PARTIAL, RECEIPT, RECEIPT + UNFINISHED))
        for path in independent:
            await _remove(repository, catalog.name, path, mine, (RECEIPT, RECEIPT + UNFINISHED))
    return gone, independent


def _overlay_exists(repository: Repository, vm: str, path: str) -> bool:
    """Return whether there is an overlay of a VM; Refused where something else is there, such as that of another VM."""
    receipt = read_receipt(path + RECEIPT)
    there = os.path.lexists(path)
    if there and (receipt is None or receipt.method != RestoreMethod.OVERLAY):
        raise Refused("target", f"{path} is no overlay that was made by a restore; remove it by hand")
    is_begun = there or os.path.lexists(path + PARTIAL)
    if receipt and is_begun and (receipt.repository, receipt.vm) != (repository.uuid, vm):
        where = "" if receipt.repository == repository.uuid else " from another repository"
        raise Refused("target", f"{path} is disk {receipt.disk} of VM {receipt.vm}{where}, and not of VM {vm}")
    return there


def _is_independent(path: str) -> bool:
    """Return whether an overlay was rebased or streamed, so that all of its content is its own."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return read_header(fd).backing is None
    except ValueError as error:
        raise Refused("target", f"{path} is no overlay any more: {error}; remove it by hand") from error
    finally:
        os.close(fd)


async def _remove(repository: Repository, vm: str, path: str, pins: Sequence[Pin], suffixes: Iterable[str]) -> None:
    """Remove the files whose names are the path of an overlay with these suffixes, and its pins."""
    async with lock_target(path):
        for suffix in suffixes:
            target_files.remove(path + suffix)
        if os.path.isdir(os.path.dirname(path)):
            target_files.sync_directory(os.path.dirname(path))
        own = [pin for pin in pins if pin.path in (path, path + PARTIAL)]
        if own:
            await remove_pins(repository, vm, own)
