# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Which image a disk's next one builds on, and what has to be kept for that: pure functions of the published sets.

Every image has a bitmap of its own, which records the writes since that image and is never cleared. An increment is
what the bitmap of the image below it has marked; without any doubt about that bitmap, or it is a full image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._documents import Parent
from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import chain_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import DiskImage, Intent, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Bitmap, Disk

AUTO = "auto"
FULL = "full"
INCREMENTAL = "incremental"
DIFFERENTIAL = "differential"
LEVELS = (AUTO, FULL, INCREMENTAL, DIFFERENTIAL)

LONGEST_NAME = 3000
"""Bytes of a chain's backing file names, joined: QEMU opens C(b/../a/...) and is refused beyond PATH_MAX (4096)."""


@dataclass(frozen=True)
class Wish:
    """What sort of images is asked for. C(max_chain) is the most images that a chain may have."""

    level: str = AUTO
    tracking: bool = True
    max_chain: int = 30


@dataclass(frozen=True)
class Link:
    """How a disk goes into a set. C(bitmap) has marked the writes since the C(parent)'s file C(image).

    C(below) are the nodes under the disk's own that have a bitmap of this name too, each with a part of these writes:
    external snapshots lie between. C(records) are all these bitmaps as they were seen, the disk's own first.
    """

    level: str
    reason: str
    parent: Parent | None = None
    image: str = ""
    bitmap: str = ""
    below: tuple[str, ...] = ()
    records: tuple[Bitmap, ...] = ()

    @property
    def backing(self) -> tuple[str, str] | None:
        """The backing file's name, as seen from a set's directory and from where it grows, and its format."""
        return (f"../{self.parent.id}/{self.image}", "qcow2") if self.parent else None


def link(
    disk: Disk,
    disks: Iterable[Disk],
    identity: str,
    sets: Sequence[Manifest],
    wish: Wish,
    damage: Mapping[tuple[str, str], str],
    layers: Iterable[Disk] = (),
) -> Link:
    """How C(disk), one of a VM's C(disks), goes into the set that follows C(sets).

    C(layers) are the nodes that the disks are made of. C(damage) says, by set id and disk, what is wrong with the files
    of an image or of those that it builds on.
    """
    if wish.level == FULL:
        return Link(FULL, "a full image is asked for")
    if not wish.tracking:
        return Link(FULL, "changes are not tracked")
    if not disk.stable_name:
        return Link(FULL, "it has no name that holds beyond a restart; give the drive or its device an id")
    if not sets:
        return Link(FULL, "it is the VM's first set")
    base = _newest_full(sets, disk.name) if wish.level == DIFFERENTIAL else sets[-1]
    below = base.disk(disk.name) if base else None
    if base is None or below is None:
        return Link(FULL, f"it is not in set {sets[-1].id}" if base else "no set holds it in full")
    chain = chain_of(disk, (*disks, *layers))
    doubt = (
        _other_disk(base, below, disk, identity)
        or written_elsewhere(disk, disks)
        or _lost_record(base, below, chain, disks, layers, sets[-1])
        or damage.get((base.id, disk.name), "")
        or _too_long(sets, base, disk.name, wish.max_chain)
    )
    if doubt:
        return Link(FULL, doubt)
    level = DIFFERENTIAL if wish.level == DIFFERENTIAL else INCREMENTAL
    name = below.bitmap or ""
    records = {layer.node: bitmap for layer in chain for bitmap in layer.bitmaps if bitmap.name == name}
    snapshots = f", recorded in {len(records)} layers (external snapshots)" if len(records) > 1 else ""
    return Link(
        level,
        f"changes since set {base.id}{snapshots}",
        Parent(base.id, below.sha256, base.attempt),
        below.image,
        name,
        tuple(records)[1:],
        tuple(records.values()),
    )


def _newest_full(sets: Sequence[Manifest], disk: str) -> Manifest | None:
    for manifest in reversed(sets):
        image = manifest.disk(disk)
        if image and image.level == FULL:
            return manifest
    return None


def _other_disk(base: Manifest, below: DiskImage, disk: Disk, identity: str) -> str:
    if base.vm.identity != identity:
        return f"set {base.id} is of another VM ({base.vm.identity})"
    if below.virtual_size != disk.virtual_size:
        return f"its size has changed from {below.virtual_size} to {disk.virtual_size} bytes since set {base.id}"
    return ""


def written_elsewhere(disk: Disk, disks: Iterable[Disk]) -> str:
    """Why no bitmap of C(disk) holds all writes to its file; empty where one does."""
    twin = next((other for other in disks if other.shares_file(disk) and not other.read_only), None)
    return f"disk {twin.name} is on the same file, and what is written through that one is not recorded" if twin else ""


def _lost_record(
    base: Manifest,
    below: DiskImage,
    chain: Sequence[Disk],
    disks: Iterable[Disk],
    layers: Iterable[Disk],
    newest: Manifest,
) -> str:
    """Why the record of the changes since an image cannot be trusted; empty where it can. C(chain) is the disk's."""
    disk = chain[0]
    if not below.bitmap:
        return f"set {base.id} was made without a record of the changes after it"
    record = f"the record of the changes since set {base.id} (bitmap {below.bitmap})"
    if disk.bitmap(below.bitmap):
        doubt = _gap(below, chain)
        return doubt and f"{record} {doubt}"
    holder = next((other.name for other in disks if other.bitmap(below.bitmap)), "")
    if holder:
        return f"{record} is on disk {holder}: the disks were swapped, or one was copied over the other"
    layer = next((other.node for other in layers if other.bitmap(below.bitmap)), "")
    if layer:
        return f"{record} is in a layer below (node {layer}): somebody took an external snapshot since"
    latest = newest.disk(disk.name)
    if newest is not base and latest and latest.level == INCREMENTAL:
        return f"{record} is gone: set {newest.id} was incremental, and the next differential one starts anew"
    if not disk.keeps_bitmaps:
        return f"{record} is gone: a disk like this one ({disk.driver}) keeps none when QEMU ends"
    return f"{record} is gone: QEMU was killed, the disk was replaced or reverted, or somebody removed it"


def _gap(below: DiskImage, chain: Sequence[Disk]) -> str:
    """Return what is wrong with the record that a disk has, in one of its layers; empty where it is whole and right.

    libvirt copies our bitmap, empty, onto the overlay of an external snapshot: the writes before the snapshot are in
    the bitmap of the layer below. What is recorded is what all layers have recorded together, down to those that were
    there when the set was made; where one of them has no bitmap, nobody knows what was written there.
    """
    disk = chain[0]
    found = [layer.bitmap(below.bitmap or "") for layer in chain]
    holders = [place for place, bitmap in enumerate(found) if bitmap]
    known = [place for place, layer in enumerate(chain) if layer.filename in (below.source, *below.layers)]
    # Below a layer that the set was made of, all is as it was then.
    deepest = max([*holders, *known[:1]], default=0)
    for layer, bitmap in zip(chain[: deepest + 1], found):
        where = "" if layer is disk else f" in a layer below (node {layer.node})"
        if bitmap is None:
            return f"is gone{where}: somebody removed it, or merged layers without it"
        if bitmap.unusable:
            return f"{bitmap.unusable}{where}"
        if layer.virtual_size != disk.virtual_size:
            return f"is{where} of {layer.virtual_size} bytes, and the disk has {disk.virtual_size} now"
    if deepest and disk.read_only:
        return "is in several layers, and the disk is read-only"
    return ""


def _too_long(sets: Sequence[Manifest], base: Manifest, disk: str, max_chain: int) -> str:
    steps, broken = walk(sets, base, disk)
    if broken:
        return broken
    if len(steps) >= max_chain:
        return f"its chain has {len(steps)} images (max_chain is {max_chain})"
    if sum(len(f"../{manifest.id}/{image.image}") for manifest, image in steps) > LONGEST_NAME:
        return f"its chain has {len(steps)} images, and with longer backing file names QEMU could not open it"
    return ""


def walk(sets: Sequence[Manifest], start: Manifest, disk: str) -> tuple[list[tuple[Manifest, DiskImage]], str]:
    """The images that a disk's image in C(start) is made of, itself first; and what is wrong with a broken chain."""
    by_id = {manifest.id: manifest for manifest in sets}
    steps: list[tuple[Manifest, DiskImage]] = []
    manifest: Manifest | None = start
    image = start.disk(disk)
    while manifest and image:
        steps.append((manifest, image))
        broken = _broken_below(by_id, manifest, image)
        if broken or image.parent is None:
            return steps, broken
        manifest = by_id[image.parent.id]
        image = manifest.disk(disk)
    return steps, f"set {start.id} has no disk {disk}"


def broken_images(sets: Sequence[Manifest], damage: Callable[[Manifest, DiskImage], str]) -> dict[tuple[str, str], str]:
    """Which images of all sets cannot be read whole, by set id and disk, and why.

    C(damage) says what is wrong with an image's own file; it is asked once for each.
    """
    by_id = {manifest.id: manifest for manifest in sets}
    broken: dict[tuple[str, str], str] = {}
    for manifest in sets:
        for image in manifest.disks:
            reason = damage(manifest, image) or _broken_below(by_id, manifest, image)
            if not reason and image.parent:
                reason = broken.get((image.parent.id, image.name), "")
            if reason:
                broken[(manifest.id, image.name)] = reason
    return broken


def _broken_below(by_id: Mapping[str, Manifest], manifest: Manifest, image: DiskImage) -> str:
    """What is wrong with the link from an image to the one that it builds on."""
    parent = image.parent
    if parent is None:
        return ""
    base = by_id.get(parent.id)
    below = base.disk(image.name) if base else None
    if base is None or below is None:
        return f"set {parent.id}, which {manifest.id} builds on, is gone or has no disk {image.name}"
    if base.sequence >= manifest.sequence or _is_another(parent, base, below):
        return f"set {parent.id} is not the one that {manifest.id} builds on"
    return ""


def _is_another(parent: Parent, manifest: Manifest, image: DiskImage) -> bool:
    return parent.attempt != manifest.attempt if parent.attempt else parent.sha256 != image.sha256


def lost_parent(intent: Intent, sets: Sequence[Manifest]) -> str:
    """What is wrong with the chains that a set builds on that is being made; empty where nothing is."""
    by_id = {manifest.id: manifest for manifest in sets}
    for disk in intent.disks:
        name, parent = disk.image.name, disk.image.parent
        base = by_id.get(parent.id) if parent else None
        image = base.disk(name) if base else None
        if parent and (not base or not image or _is_another(parent, base, image) or walk(sets, base, name)[1]):
            return f"set {parent.id}, which the increment of disk {name} builds on, was removed while it was made"
    return ""


def set_level(levels: Iterable[str]) -> str:
    """The level of a set whose disks have these: full if all are, else what the others are."""
    found = set(levels)
    return next((level for level in (INCREMENTAL, DIFFERENTIAL) if level in found), FULL)


def bitmaps_to_keep(sets: Sequence[Manifest], differential: bool) -> frozenset[str]:
    """The bitmaps that the next set may need: the newest set's, and for differentials those of the disks' fulls."""
    if not sets:
        return frozenset()
    images = list(sets[-1].disks)
    if differential:
        fulls = ((_newest_full(sets, disk.name), disk.name) for disk in sets[-1].disks)
        images += [image for image in (full.disk(name) for full, name in fulls if full) if image]
    return frozenset(image.bitmap for image in images if image.bitmap)
