# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bring together the disks that QEMU shows and those that libvirt knows: a disk of a domain is called by its target.

QEMU's device has the id that libvirt's XML has as alias. Targets are the same whether a domain runs or not, after each
snapshot and each start; the names of nodes are counted anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._common.device_names import qdev_id
from .model import LIBVIRT_NODE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .domain_xml import DomainDisk, DomainXml
    from .model import Disk, Vm


NO_MEDIUM = "has no medium"
PASSED_THROUGH = "is passed through (device='lun'): the guest writes to it past QEMU"
ELSEWHERE = frozenset({"vhostuser", "vhostvdpa"})
"""The kinds of sources that other programs serve to the guest."""
NVRAM, NVRAM_CHIP = "nvram", "/machine/system.flash1"
CHIPS = {"/machine/system.flash0": "loader", NVRAM_CHIP: NVRAM}
"""What the flash chips of a machine are called, which are no disks to libvirt: code, and UEFI variables."""


@dataclass(frozen=True)
class Domain:
    """What libvirt says of a domain, as it runs or as it is defined.

    C(job) is what libvirt does with it at the moment, in words. C(saved) says that its memory was saved, and that it
    goes on from there when it is started: then C(xml) is what it was at that time. C(defined) are the disks that it is
    started with when it has come to an end.
    """

    xml: DomainXml
    job: str = ""
    saved: bool = False
    defined: tuple[DomainDisk, ...] = ()


def with_domain(vm: Vm, domain: Domain) -> Vm:
    """Return a VM as a domain of libvirt, with the names that libvirt has for its disks and drives."""
    by_alias = _by_alias(domain.xml)
    return replace(
        vm,
        disks=tuple(_named(disk, by_alias) for disk in vm.disks),
        empty=tuple(by_alias[name].target if name in by_alias else name for name in vm.empty),
        domain=domain,
    )


def _named(disk: Disk, by_alias: Mapping[str, DomainDisk]) -> Disk:
    known = by_alias.get(qdev_id(disk.qdev))
    if known is None:
        return replace(disk, name=CHIPS.get(disk.qdev, disk.name))
    return replace(disk, name=known.target, stable_name=True, shared=known.shareable)


def unseen(vm: Vm) -> dict[str, str]:
    """Return the disks of a domain that QEMU does not show as its own, each with the reason."""
    if vm.domain is None:
        return {}
    shown = {*vm.empty, *(disk.name for disk in vm.disks)}
    return {disk.target: _why_unseen(disk) for disk in vm.domain.xml.disks if disk.target not in shown}


def _why_unseen(disk: DomainDisk) -> str:
    if disk.source.kind in ELSEWHERE:
        return f"is served by another program ({disk.source.kind}, {disk.source.path}), and not by QEMU"
    if disk.source.kind == "none":
        return NO_MEDIUM
    return "is not shown by QEMU: it has been attached or detached at this moment"


def for_next_start(vm: Vm) -> tuple[str, ...]:
    """Return the disks that a domain writes to only when it is started anew: it was given them for then."""
    if vm.domain is None:
        return ()
    defined = (disk for disk in vm.domain.defined if disk.device in ("disk", "lun") and not disk.read_only)
    return tuple(disk.target for disk in defined if disk.source.kind != "none" and not vm.domain.xml.disk(disk.target))


def passed_through(vm: Vm) -> dict[str, str]:
    """Return the disks whose writes QEMU does not see, each with the reason: no copy is of one moment."""
    disks = vm.domain.xml.disks if vm.domain else ()
    return {disk.target: PASSED_THROUGH for disk in disks if disk.device == "lun" and disk.bus == "scsi"}


def abandoned(nodes: Iterable[str], domain: DomainXml) -> tuple[str, ...]:
    """Return those nodes of libvirt's that belong to no disk of the domain any more."""
    known = {index for disk in domain.disks for index in disk.indexes}
    matches = ((name, LIBVIRT_NODE.fullmatch(name)) for name in nodes)
    return tuple(name for name, match in matches if match and int(match[1]) not in known)


def _by_alias(domain: DomainXml) -> Mapping[str, DomainDisk]:
    return {disk.alias: disk for disk in domain.disks if disk.alias}
