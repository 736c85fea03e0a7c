# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell what the copies of disks will lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .model import IN_THE_CLEAR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .model import Disk


def lost_in_copy(disks: Iterable[Disk], among: Iterable[Disk]) -> tuple[str, ...]:
    """Return what the copies of C(disks) will lack, one sentence for each fact; C(among) are all disks of their VM."""
    every = tuple(among)
    return tuple(loss for disk in disks for loss in _losses(disk, every))


def _losses(disk: Disk, among: tuple[Disk, ...]) -> Iterator[str]:
    if disk.encrypted:
        yield f"disk {disk.name} {IN_THE_CLEAR}"
    if disk.data_file:
        yield f"disk {disk.name} has its data in another file ({disk.data_file}); its copy is one image"
    if disk.snapshots:
        noun = "snapshot, which is" if disk.snapshots == 1 else "snapshots, which are"
        yield f"disk {disk.name} has {disk.snapshots} internal {noun} not copied: its copy is the disk as it is now"
    for other in among[among.index(disk) + 1 :]:
        if disk.shares_file(other) and not (disk.read_only and other.read_only):
            yield (
                f"disks {disk.name} and {other.name} are on one file ({disk.file}): a write through one of them can"
                " get into the copy of the other at any moment"
            )
