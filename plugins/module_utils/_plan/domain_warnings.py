# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Warn of what libvirt knows of a domain's disks: what no set can have, and what its sets do to libvirt's snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._qemu.domain_disks import NO_MEDIUM, for_next_start, passed_through, unseen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .._qemu.domain_disks import Domain
    from .._qemu.model import Disk, Vm
    from .model import LeftOut


def domain_warnings(vm: Vm, copied: Iterable[Disk], left_out: Iterable[LeftOut], tracking: bool) -> Iterator[str]:
    """Return what is to be known of a domain of which a set is made, with these disks."""
    if vm.domain is None:
        return
    yield from _not_in_the_set(vm, vm.domain)
    lost = {reason for reason in (*unseen(vm).values(), *passed_through(vm).values()) if reason != NO_MEDIUM}
    for drive in left_out:
        if drive.reason in lost:
            yield (
                f"disk {drive.name} is not in the set: it {drive.reason}. Back it up by other means, and exclude it"
                " (exclude_disks)"
            )
    for disk in copied:
        known = vm.domain.xml.disk(disk.name)
        if known and known.transient:
            yield (
                f"disk {disk.name} is transient: the set has what it holds now, and when the domain stops it goes back"
                " to what it was"
            )
        if disk.shared:
            yield (
                f"disk {disk.name} is shareable: each copy of it is a full one, and what another VM writes to it"
                " meanwhile may be in the set or not"
            )
        if tracking and disk.snapshots and disk.keeps_bitmaps:
            yield (
                f"disk {disk.name} has internal snapshots: while it has the bitmaps of its sets, a revert to one of"
                " them (virsh snapshot-revert) fails, and leaves the domain off. Take the bitmaps away before, with"
                " backup_set and state=untracked; the set after that is a full one"
            )


def _not_in_the_set(vm: Vm, domain: Domain) -> Iterator[str]:
    """Return what belongs to a domain, and is no disk that it has now."""
    if domain.saved:
        yield (
            "its memory was saved (virsh managedsave), and is not in the set: what the guest had not written to its"
            " disks by then is not, either"
        )
    if domain.xml.firmware.varstore:
        yield (
            f"its UEFI variables are not in the set: they are in {domain.xml.firmware.varstore} (<varstore>), and in no"
            " flash chip. Back that file up by other means"
        )
    for target in for_next_start(vm):
        without = "was saved" if domain.saved else "runs"
        yield (
            f"disk {target} is not in the set: the domain {without} without it, and has it when it is started anew, as"
            " it is defined (virsh dumpxml --inactive)"
        )
