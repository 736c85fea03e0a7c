# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said of the disks of a domain of which a set is made."""

from __future__ import annotations

from dataclasses import replace

from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import choose_disks
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.domain_warnings import domain_warnings
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_disks import Domain, with_domain
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import (
    DomainDisk,
    DomainXml,
    Firmware,
    Source,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID, disk
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import REQUEST, vm

PASSED = DomainDisk("sda", "scsi", "lun", "scsi0-0-0-0", Source("block", "/dev/sdq", "raw", 2))
SERVED = DomainDisk("vdb", "virtio", alias="virtio-disk1", source=Source("vhostuser", "/s", "raw"))
PLAIN = DomainDisk("vda", "virtio", alias="virtio-disk0")
VM = with_domain(
    vm(disk("virtio-disk0", device="", qdev="virtio-disk0"), disk("scsi0-0-0-0", "n1", device="", qdev="scsi0-0-0-0")),
    Domain(DomainXml("web01", UUID, disks=(PLAIN, SERVED, PASSED))),
)


def warned(exclude: tuple[str, ...] = (), tracking: bool = True, of: DomainDisk = PLAIN, **values: object) -> list[str]:
    """What is said of a domain whose first disk is like this."""
    domain = Domain(DomainXml("web01", UUID, disks=(of, SERVED, PASSED)))
    seen = replace(VM, disks=(replace(VM.disks[0], **values), VM.disks[1]), domain=domain)
    choice = choose_disks(seen, replace(REQUEST, exclude_disks=exclude))
    assert [one.name for one in choice.disks] == ["vda"]
    return list(domain_warnings(seen, choice.disks, choice.left_out, tracking))


def test_what_is_in_no_set() -> None:
    first, second = warned()
    assert first.startswith("disk vdb is not in the set: it is served by another program (vhostuser, /s)")
    assert second.startswith("disk sda is not in the set: it is passed through (device='lun')")
    # Whoever excludes them knows of it.
    assert warned(exclude=("vdb", "sda")) == []


def test_names_that_cannot_be_included() -> None:
    for name, reason in (("vdb", "is served by another"), ("sda", "is passed through"), ("cd", "has no medium")):
        error = choose_disks(VM, replace(REQUEST, include_disks=("vda", name))).error
        assert error.startswith(f"include_disks: drive {name} of VM web01 {reason}")
    assert "has no device 'vdz'" in choose_disks(VM, replace(REQUEST, exclude_disks=("vdz",))).error


def test_what_is_copied_and_not_what_it_seems() -> None:
    both = ("vdb", "sda")
    [said] = warned(both, of=replace(PLAIN, transient=True))
    assert said.startswith("disk vda is transient: ")
    [said] = warned(both, shared=True)
    assert said.startswith("disk vda is shareable: each copy of it is full")
    [said] = warned(both, snapshots=2)
    assert "backup_set and state=untracked" in said
    # Without bitmaps nothing is in the way of a revert.
    assert warned(both, tracking=False, snapshots=2) == warned(both, snapshots=2, keeps_bitmaps=False) == []


def test_of_other_vms_nothing_is_said() -> None:
    assert list(domain_warnings(vm(), [disk(snapshots=2)], (), True)) == []


def test_what_belongs_to_it_and_is_no_disk_of_it_now() -> None:
    later = DomainDisk("vdz", source=Source("file", "/z", "raw"))
    others = (replace(later, target="vdy", read_only=True), replace(later, target="sda", device="cdrom"))
    xml = DomainXml("web01", UUID, disks=(PLAIN,), firmware=Firmware(varstore="/v.json"))
    seen = replace(VM, domain=Domain(xml, saved=True, defined=(PLAIN, later, *others)))
    memory, variables, disk_told = domain_warnings(seen, (), (), True)
    assert memory.startswith("its saved memory (virsh managedsave) is not in the set")
    assert variables.startswith("its UEFI variables are not in the set: they are in /v.json (<varstore>)")
    assert disk_told.startswith("disk vdz is not in the set: the domain was saved without it")
