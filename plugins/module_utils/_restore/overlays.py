# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the overlays that stand on sets, and let them go."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._host import files
from .._host.machine import machine_id
from .._qemu import qemu_img
from .._repository.annotations import PARTIAL
from .._repository.documents import Restoration
from .._repository.json_file import UNFINISHED, read_document
from .checks import check_unused, lock_target
from .model import RECEIPT, RestoreMethod
from .pins import take_pins

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Pin
    from .._repository.repository import Repository


# Overlays removed


def overlays(repository: Repository, held: VmCatalog, directory: str) -> list[str]:
    """The overlays on the sets of a VM that were made here in a directory, whichever sets there are by now."""
    found = {
        pin.path
        for pin in held.marks.pins
        if pin.machine_id == machine_id() and os.path.dirname(pin.path) == os.path.normpath(directory)
    }
    for path in glob.glob(os.path.join(glob.escape(os.path.normpath(directory)), "*" + RECEIPT)):
        receipt: Restoration | None = read_document(path, Restoration)
        if receipt and (receipt.repository, receipt.vm, receipt.method) == (
            repository.uuid,
            held.name,
            RestoreMethod.OVERLAY,
        ):
            found.add(path[: -len(RECEIPT)])
    return sorted(path for path in found if not path.endswith(PARTIAL))


async def forget(
    repository: Repository, held: VmCatalog, targets: Sequence[str], check_mode: bool
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
        if files.is_block_device(path):
            # What a restore that was killed has left is the pin alone: whatever is on the device stays.
            independent += [path] if any(pin.path == path for pin in mine) else []
            continue
        there = _is_overlay(repository, held.name, path)
        if there and await _is_independent(path):
            independent.append(path)
            continue
        for name in names:
            if os.path.isfile(name):
                check_unused(name)
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
    if there and (receipt is None or receipt.method != RestoreMethod.OVERLAY):
        raise Refused("target", f"{path} is no overlay that was made by a restore; remove it by hand")
    is_begun = there or os.path.lexists(path + PARTIAL)
    if receipt and is_begun and (receipt.repository, receipt.vm) != (repository.uuid, vm):
        where = "" if receipt.repository == repository.uuid else " from another repository"
        raise Refused("target", f"{path} is disk {receipt.disk} of VM {receipt.vm}{where}, and not of VM {vm}")
    return there


async def _is_independent(path: str) -> bool:
    """Whether an overlay was rebased or streamed, so that all of its content is its own."""
    found = await qemu_img.run_json(qemu_img.info_command(path, "qcow2", shared=True))
    return "backing-filename" not in found


async def _let_go(repository: Repository, vm: str, path: str, pins: Sequence[Pin], ends: Iterable[str]) -> None:
    """Remove what stands at and beside an overlay's path, and its pins."""
    async with lock_target(path):
        for end in ends:
            files.remove(path + end)
        if os.path.isdir(os.path.dirname(path)):
            files.sync_directory(os.path.dirname(path))
        own = [pin for pin in pins if pin.path in (path, path + PARTIAL)]
        if own:
            await take_pins(repository, vm, own)
