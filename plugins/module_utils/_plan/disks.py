# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Choose the disks of a set, and the level of the image of each: full, incremental or differential."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._common.redaction import redact_name
from .._qemu.domain_disks import NO_MEDIUM, passed_through, unseen
from .._qemu.model import chain_of, plain_path
from .._repository.chain import newest_full, walk
from .._repository.documents import Level, Parent
from .._repository.names import image_files
from .model import Choice, DiskPlan, LeftOut

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .._qemu.disk_file import DiskFile
    from .._qemu.model import Bitmap, Disk, Vm
    from .._repository.documents import DiskImage, Intent, Manifest
    from .._repository.repository import VmRecords
    from .model import Observation, Request, RunContext


IMAGE_SUFFIX = ".qcow2"
READ_ONLY = "is read-only"
EXCLUDED = "is excluded"
LONGEST_NAME = 3000
"""Bytes of a chain's backing file names, joined: QEMU opens C(b/../a/...) and is refused beyond PATH_MAX (4096)."""


def choose_disks(vm: Vm, request: Request) -> Choice:
    """Choose all disks that can be written to, or those that are named; a name that no disk has is an error."""
    absent = {**dict.fromkeys(vm.empty, NO_MEDIUM), **unseen(vm)}
    try:
        included = [vm.disk(name, "include_disks") for name in request.include_disks if name not in absent]
        excluded = [vm.disk(name, "exclude_disks") for name in request.exclude_disks if name not in absent]
    except Refused as error:
        return Choice(error=str(error))
    impossible = {**absent, **passed_through(vm)}
    wrong = next((name for name in request.include_disks if name in impossible), "")
    if wrong:
        return Choice(error=f"include_disks: drive {wrong} of VM {vm.name} {impossible[wrong]}")
    chosen: list[Disk] = []
    left_out = [
        LeftOut(name, EXCLUDED if name in request.exclude_disks and reason != NO_MEDIUM else reason)
        for name, reason in absent.items()
    ]
    for disk in dict.fromkeys([*vm.disks, *included]):
        if disk in excluded:
            left_out.append(LeftOut(disk.name, EXCLUDED))
        elif disk.name in impossible:
            left_out.append(LeftOut(disk.name, impossible[disk.name]))
        elif included and disk not in included:
            left_out.append(LeftOut(disk.name, "is not in include_disks"))
        elif disk.read_only and disk not in included:
            left_out.append(LeftOut(disk.name, READ_ONLY))
        else:
            chosen.append(disk)
    refused = next(filter(None, (vm.cannot_copy(disk) for disk in chosen)), "")
    if refused:
        return Choice(error=f"{refused}, or leave the disk out (exclude_disks)")
    names = [disk.name for disk in chosen]
    twins = [disk for disk in chosen if names.count(disk.name) > 1]
    if twins:
        nodes = ", ".join(disk.node for disk in twins if disk.name == twins[0].name)
        return Choice(
            error=f"several disks of VM {vm.name} are called {twins[0].name} (nodes {nodes}); exclude all but one of"
            " them by its node's name, or give them different names"
        )
    return Choice(tuple(chosen), tuple(left_out))


def link_disks(
    request: Request, seen: Observation, records: VmRecords, context: RunContext, choice: Choice
) -> tuple[ChainLink, ...]:
    """Decide how each chosen disk goes into the next set."""
    if seen.vm is None:
        return ()
    vm = seen.vm
    wish = LevelPolicy(request.wanted, context.policy.tracking, context.policy.max_chain)
    links = (
        link(disk, vm.disks, vm.identity, records.sets, wish, seen.damage, vm.other_nodes) for disk in choice.disks
    )
    # Of a VM that runs, nobody knows what it has just written.
    return tuple(_noting_no_change(one) if vm.is_off else one for one in links)


def plan_disks(disks: Iterable[Disk], links: Iterable[ChainLink]) -> tuple[DiskPlan, ...]:
    """Return what is said of the disks of a set."""
    chosen = tuple(disks)
    images = image_files((disk.name for disk in chosen), IMAGE_SUFFIX)
    return tuple(
        DiskPlan(
            name=disk.name,
            node=disk.node,
            level=link.level,
            reason=link.reason,
            parent=link.parent.id if link.parent else None,
            target=images[disk.name],
        )
        for disk, link in zip(chosen, links)
    )


def disks_of_intent(intent: Intent | None) -> tuple[DiskPlan, ...]:
    if intent is None:
        return ()
    return tuple(
        DiskPlan(
            name=disk.image.name,
            node=disk.image.node,
            level=disk.image.level,
            reason=disk.image.reason,
            parent=disk.image.parent.id if disk.image.parent else None,
            target=disk.image.image,
            bytes=disk.expected,
        )
        for disk in intent.disks
    )


def listed_otherwise(files: Iterable[DiskFile], vm: Vm) -> tuple[str, ...]:
    """Return what a VM that is on has otherwise than it is listed for when it is off, one sentence for each disk."""
    if vm.is_off:
        return ()
    disks = {disk.name: disk for disk in vm.disks}
    return tuple(filter(None, (_otherwise(file, disks.get(file.name)) for file in files)))


def _otherwise(file: DiskFile, disk: Disk | None) -> str:
    if disk is None:
        return f"disk {file.name} is listed (vms: disks), and the VM has none of that name"
    is_same = plain_path(disk.file) == plain_path(file.file) and disk.driver == file.format
    return (
        ""
        if is_same
        else f"disk {file.name} is listed as {file.file} ({file.format}), but the VM has it in {disk.file}"
        f" ({disk.driver}). While the VM is off, the backup would copy the wrong file: correct the list"
    )


@dataclass(frozen=True)
class LevelPolicy:
    """What sort of images is asked for. C(max_chain) is the most images that a chain may have."""

    level: Level = Level.AUTO
    tracking: bool = True
    max_chain: int = 30


@dataclass(frozen=True)
class ChainLink:
    """How a disk goes into a set. C(bitmap) has marked the writes since the C(parent)'s file C(image).

    C(below) are the nodes under the disk's own that have a bitmap of this name too, each with a part of these writes:
    external snapshots lie between. C(records) are all these bitmaps as they were seen, the disk's own first.
    C(unchanged) says that there was no such write, and that there can be none while the VM is off.
    """

    level: Level
    reason: str
    parent: Parent | None = None
    image: str = ""
    bitmap: str = ""
    below: tuple[str, ...] = ()
    records: tuple[Bitmap, ...] = ()
    unchanged: bool = False

    @property
    def backing(self) -> tuple[str, str] | None:
        """The backing file's name, as seen from a set's directory and from where it grows, and its format."""
        return (f"../{self.parent.id}/{self.image}", "qcow2") if self.parent else None


def link(
    disk: Disk,
    disks: Iterable[Disk],
    identity: str,
    sets: Sequence[Manifest],
    wish: LevelPolicy,
    damage: Mapping[tuple[str, str], str],
    layers: Iterable[Disk] = (),
) -> ChainLink:
    """Decide how C(disk), one of a VM's C(disks), goes into the set that follows C(sets).

    C(layers) are the nodes that the disks are made of. C(damage) says, by set id and disk, what is wrong with the files
    of an image or of those that it builds on.
    """
    if wish.level == Level.FULL:
        return ChainLink(Level.FULL, "a full image is asked for")
    if not wish.tracking:
        return ChainLink(Level.FULL, "changes are not tracked")
    if not disk.stable_name:
        return ChainLink(Level.FULL, "its name changes when QEMU restarts; give the drive or its device an id")
    if not sets:
        return ChainLink(Level.FULL, "it is the VM's first set")
    newest = sets[-1].find(disk.names)
    found = newest_full(sets, disk.names) if wish.level == Level.DIFFERENTIAL else newest and (sets[-1], newest)
    if not found:
        is_new = wish.level != Level.DIFFERENTIAL
        return ChainLink(Level.FULL, f"it is not in set {sets[-1].id}" if is_new else "no set holds it in full")
    base, below = found
    chain = chain_of(disk, (*disks, *layers))
    doubt = (
        _other_disk(base, below, disk, identity)
        or written_elsewhere(disk, disks)
        or _lost_record(base, below, chain, disks, layers, sets[-1])
        or damage.get((base.id, disk.name), "")
        or _too_long(sets, base, below.name, wish.max_chain)
    )
    if doubt:
        return ChainLink(Level.FULL, doubt)
    level = Level.DIFFERENTIAL if wish.level == Level.DIFFERENTIAL else Level.INCREMENTAL
    name = below.bitmap or ""
    records = records_of(chain, name)
    snapshots = f", recorded in {len(records)} layers (external snapshots)" if len(records) > 1 else ""
    return ChainLink(
        level,
        f"changes since set {base.id}{snapshots}",
        Parent(base.id, below.sha256, base.attempt, "" if below.name == disk.name else below.name),
        below.image,
        name,
        tuple(records)[1:],
        tuple(records.values()),
    )


def records_of(chain: Iterable[Disk], name: str) -> dict[str, Bitmap]:
    """Return the bitmaps of this name in the layers of a disk, by node, from the top to the bottom."""
    return {layer.node: bitmap for layer in chain for bitmap in layer.bitmaps if bitmap.name == name}


def _noting_no_change(link: ChainLink) -> ChainLink:
    if link.parent is None or any(record.count for record in link.records):
        return link
    return replace(link, reason=f"it has not changed since set {link.parent.id}", unchanged=True)


def _other_disk(base: Manifest, below: DiskImage, disk: Disk, identity: str) -> str:
    if base.vm.identity != identity:
        return f"set {base.id} is of another VM ({base.vm.identity})"
    if below.virtual_size != disk.virtual_size:
        return f"its size has changed from {below.virtual_size} to {disk.virtual_size} bytes since set {base.id}"
    return ""


def written_elsewhere(disk: Disk, disks: Iterable[Disk]) -> str:
    """Return why no bitmap of C(disk) holds all writes to its file; empty where one does."""
    if disk.shared:
        return "it is shareable: what other VMs write to it is not recorded"
    twin = next((other for other in disks if other.shares_file(disk) and not other.read_only), None)
    return f"disk {twin.name} is on the same file, and its writes are not recorded" if twin else ""


def _lost_record(
    base: Manifest,
    below: DiskImage,
    chain: Sequence[Disk],
    disks: Iterable[Disk],
    layers: Iterable[Disk],
    newest: Manifest,
) -> str:
    """Return why the record of the changes since an image cannot be trusted; empty where it can.

    C(chain) is the disk's.
    """
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
    latest = newest.find(disk.names)
    if newest is not base and latest and latest.level == Level.INCREMENTAL:
        return f"{record} is gone: set {newest.id} was incremental, and the next differential one starts anew"
    if not disk.keeps_bitmaps:
        return (
            f"{record} is gone: a disk like this one ({disk.driver}) keeps none when QEMU ends, or while its VM is off"
        )
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
    # Names of before may hold secrets, which those of disks do not.
    names = {redact_name(name) for name in (below.source, *below.layers)}
    known = [place for place, layer in enumerate(chain) if layer.filename in names]
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
