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
                f"disk {disk.name} is transient: the set has its present content, and the disk loses that content when"
                " the domain stops"
            )
        if disk.shared:
            yield (
                f"disk {disk.name} is shareable: each copy of it is full, and the set may or may not have what another"
                " VM writes during the copy"
            )
        if tracking and disk.snapshots and disk.keeps_bitmaps:
            yield (
                f"disk {disk.name} has internal snapshots: a revert to one of them (virsh snapshot-revert) fails and"
                " leaves the domain off, as long as the disk has the bitmaps of its sets. Remove the bitmaps first,"
                " with backup_set and state=untracked; the next set is full"
            )


def _not_in_the_set(vm: Vm, domain: Domain) -> Iterator[str]:
    """Return what belongs to a domain, and is no disk that it has now."""
    if domain.saved:
        yield (
            "its saved memory (virsh managedsave) is not in the set, nor is data that the guest had not yet written to"
            " its disks"
        )
    if domain.xml.firmware.varstore:
        yield (
            f"its UEFI variables are not in the set: they are in {domain.xml.firmware.varstore} (<varstore>), and in no"
            " flash chip. Back that file up by other means"
        )
    for target in for_next_start(vm):
        without = "was saved" if domain.saved else "runs"
        yield (
            f"disk {target} is not in the set: the domain {without} without it, and gets it at its next start (virsh"
            " dumpxml --inactive)"
        )
