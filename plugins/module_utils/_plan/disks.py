# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Choose the disks of a set, and plan their images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._repository.names import image_files
from . import levels
from .levels import LevelPolicy
from .model import Choice, DiskPlan, LeftOut

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._qemu.model import Disk, Vm
    from .._repository.documents import Intent
    from .._repository.repository import VmRecords
    from .levels import ChainLink
    from .model import Observation, Request, RunContext


IMAGE_SUFFIX = ".qcow2"
READ_ONLY = "is read-only"


def choose_disks(vm: Vm, request: Request) -> Choice:
    """Choose all disks that can be written to, or those that are named; a name that no disk has is an error."""
    try:
        included = [vm.disk(name, "include_disks") for name in request.include_disks if name not in vm.empty]
        excluded = [vm.disk(name, "exclude_disks") for name in request.exclude_disks if name not in vm.empty]
    except Refused as error:
        return Choice(error=str(error))
    without_medium = [name for name in request.include_disks if name in vm.empty]
    if without_medium:
        return Choice(error=f"include_disks: drive {without_medium[0]} of VM {vm.name} has no medium")
    chosen: list[Disk] = []
    left_out = [LeftOut(name, "has no medium") for name in vm.empty]
    for disk in dict.fromkeys([*vm.disks, *included]):
        if disk in excluded:
            left_out.append(LeftOut(disk.name, "is excluded"))
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
    return tuple(
        levels.link(disk, vm.disks, vm.identity, records.sets, wish, seen.damage, vm.other_nodes)
        for disk in choice.disks
    )


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
