# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Follow the chains of images through the sets of a VM: pure functions of what the repository says.

Every image has a bitmap of its own, which records the writes since that image and is never cleared. An increment is
what the bitmap of the image below it has marked. Where there is any doubt about that bitmap, a full image is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .documents import Level

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .documents import DiskImage, Intent, Manifest, Parent


def newest_full(sets: Sequence[Manifest], names: Sequence[str]) -> tuple[Manifest, DiskImage] | None:
    """Return the newest set with a full image of the disk that goes by C(names), and the image."""
    for manifest in reversed(sets):
        image = manifest.find(names)
        if image and image.level == Level.FULL:
            return manifest, image
    return None


def walk(sets: Sequence[Manifest], start: Manifest, disk: str) -> tuple[list[tuple[Manifest, DiskImage]], str]:
    """Return the images that a disk's image in C(start) is made of, itself first, and why a chain is broken.

    C(disk) is its name there. It may have other names in the sets below.
    """
    by_id = {manifest.id: manifest for manifest in sets}
    steps: list[tuple[Manifest, DiskImage]] = []
    manifest: Manifest | None = start
    image = start.disk(disk)
    while manifest and image:
        steps.append((manifest, image))
        broken = broken_below(by_id, manifest, image)
        if broken or image.parent is None:
            return steps, broken
        manifest, image = by_id[image.parent.id], by_id[image.parent.id].disk(image.name_in_parent)
    return steps, f"set {start.id} has no disk {disk}"


def broken_below(by_id: Mapping[str, Manifest], manifest: Manifest, image: DiskImage) -> str:
    """Return what is wrong with the link from an image to the one that it builds on."""
    parent = image.parent
    if parent is None:
        return ""
    base = by_id.get(parent.id)
    below = base.disk(image.name_in_parent) if base else None
    if base is None or below is None:
        return f"set {parent.id}, which {manifest.id} builds on, is gone or has no disk {image.name_in_parent}"
    if base.sequence >= manifest.sequence or is_another(parent, base, below):
        return f"set {parent.id} is not the one that {manifest.id} builds on"
    return ""


def is_another(parent: Parent, manifest: Manifest, image: DiskImage) -> bool:
    """Return whether an image is not the one that an increment names as its parent."""
    return parent.attempt != manifest.attempt if parent.attempt else parent.sha256 != image.sha256


def lost_parent(intent: Intent, sets: Sequence[Manifest]) -> str:
    """Return what is wrong with the chains that a growing set builds on; empty where nothing is."""
    by_id = {manifest.id: manifest for manifest in sets}
    for disk in intent.disks:
        name, parent = disk.image.name_in_parent, disk.image.parent
        base = by_id.get(parent.id) if parent else None
        image = base.disk(name) if base else None
        if parent and (not base or not image or is_another(parent, base, image) or walk(sets, base, name)[1]):
            own = disk.image.name
            return f"set {parent.id}, which the increment of disk {own} builds on, was removed while it was made"
    return ""


def set_level(levels: Iterable[str]) -> Level:
    """Return the level of a set whose disks have these: full if all are, else what the others are."""
    found = set(levels)
    return next((level for level in (Level.INCREMENTAL, Level.DIFFERENTIAL) if level in found), Level.FULL)


def bitmaps_to_keep(
    sets: Sequence[Manifest], differential: bool, disks: Iterable[Sequence[str]] = ()
) -> frozenset[str]:
    """Return the bitmaps that the next set may need: those of the newest set, and for differentials of the fulls.

    C(disks) are the names of each disk that the VM has now: the newest set may have been made without it.
    """
    if not sets:
        return frozenset()
    images = list(sets[-1].disks)
    if differential:
        fulls = (newest_full(sets, names) for names in (*(disk.names for disk in sets[-1].disks), *disks))
        images += [full[1] for full in fulls if full]
    return frozenset(image.bitmap for image in images if image.bitmap)
