# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU's disks and those of libvirt's XML are brought together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_disks import (
    Domain,
    abandoned,
    passed_through,
    unseen,
    with_domain,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import parse_domain
from ansible_collections.vmfleet.backup.tests.harness.domains import domain_xml
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, vm

RUNNING, COPIED, DEFINED = (parse_domain(domain_xml(sample)) for sample in ("running", "copied", "defined"))
# As QEMU has told of the domain in running.xml.
QDEVS = {
    "virtio-disk0": "/machine/peripheral/virtio-disk0/virtio-backend",
    "ua-data": "/machine/peripheral/ua-data/virtio-backend",
    "virtio-disk2": "/machine/peripheral/virtio-disk2/virtio-backend",
    "virtio-disk3": "/machine/peripheral/virtio-disk3/virtio-backend",
    "virtio-disk4": "/machine/peripheral/virtio-disk4/virtio-backend",
    "scsi0-0-0-0": "scsi0-0-0-0",
    "ide0-0-0": "ide0-0-0",
    "fdc0-0-0": "fdc0-0-0",
}
SEEN = vm(*(disk(name, f"n-{name}", device="", qdev=qdev) for name, qdev in QDEVS.items()), empty=("ide0-0-1",))


def test_disks_are_called_by_their_targets() -> None:
    found = with_domain(SEEN, Domain(RUNNING))
    assert [one.name for one in found.disks] == ["vda", "vdb", "vdc", "vdd", "vde", "sda", "hda", "fda"]
    assert found.empty == ("hdb",)
    assert [one.name for one in found.disks if one.shared] == ["sda"]
    assert found.disks[1].names == ("vdb", "ua-data")
    assert found.disk("ua-data") is found.disk("vdb") is found.disk("n-ua-data") is found.disks[1]
    assert [one.qemu_name for one in found.disks] == list(QDEVS)
    assert unseen(found) == passed_through(found) == {}


def test_what_libvirt_does_not_know_keeps_its_name() -> None:
    chips = [disk(f"libvirt-pflash{n}-format", qdev=f"/machine/system.flash{n}") for n in (0, 1)]
    bare = disk("extra", device="", qdev="")
    plugged = disk("vd7", device="", qdev="/machine/peripheral/vd7/virtio-backend")
    found = with_domain(vm(*chips, bare, plugged), Domain(RUNNING))
    assert [one.name for one in found.disks] == ["loader", "nvram", "extra", "vd7"]


def test_a_target_is_a_name_that_lasts() -> None:
    found = with_domain(vm(disk(qdev="ide0-0-0", stable_name=False)), Domain(RUNNING))
    assert (found.disks[0].name, found.disks[0].stable_name) == ("hda", True)


def test_without_a_domain_nothing_is_unseen() -> None:
    assert unseen(SEEN) == passed_through(SEEN) == {}


def test_why_a_disk_is_not_qemus() -> None:
    found = with_domain(
        vm(disk(device="", qdev="virtio-disk0"), empty=()), Domain(replace(DEFINED, disks=DEFINED.disks[3:5]))
    )
    assert unseen(found) == {
        "vdd": "is served by another program (vhostuser, /run/spdk/db.sock), and not by QEMU",
        "vde": "is not shown by QEMU: it has been attached or detached at this moment",
    }
    drives = with_domain(vm(), Domain(replace(RUNNING, disks=RUNNING.disks[7:8])))
    assert unseen(drives) == {"hdb": "has no medium"}


def test_what_goes_past_qemu() -> None:
    found = with_domain(vm(), Domain(DEFINED))
    assert passed_through(found) == {"sda": "is passed through (device='lun'): the guest writes to it past QEMU"}
    # Of a virtio disk, only what is no read or write is passed on.
    others = tuple(replace(one, bus="virtio") for one in DEFINED.disks)
    assert passed_through(with_domain(vm(), Domain(replace(DEFINED, disks=others)))) == {}


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        (["libvirt-1-format", "libvirt-1-storage", "libvirt-4-format", "libvirt-3-storage", "libvirt-2-storage"], []),
        # What a disk is being copied to.
        (["libvirt-5-format", "libvirt-5-storage"], []),
        (["libvirt-6-storage", "libvirt-7-format", "#block12"], ["libvirt-6-storage", "libvirt-7-format"]),
        (["libvirt-pflash0-format", "libvirt-6", "vmf.x", "libvirt-1-format-x"], []),
    ],
)
def test_nodes_of_no_disk(nodes: list[str], left: list[str]) -> None:
    assert abandoned(nodes, COPIED) == tuple(left)
