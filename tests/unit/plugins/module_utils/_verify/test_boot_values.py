# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What VMs really have is taken over from vm.json, and nothing else is."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_values import PATTERNS, checked

HONEST = {
    "machine": [
        "q35",
        "pc-q35-7.2",
        "pc-i440fx-noble",
        "virt-9.0",
        "microvm",
        "s390-ccw-virtio-7.2",
        "pseries-rhel9.0.0",
    ],
    "property of the machine": ["on", "off", "3", "host", "max"],
    "processor": [
        "host",
        "host,migratable=on",
        "max",
        "EPYC-Rome-v4",
        "Skylake-Server-IBRS,+ssse3,-hle,ss=on,hv-vendor-id=proxmox,host-phys-bits-limit=0x28",
        "qemu64,model-id=Common KVM processor (64-bit)",
        "kvm64,enforce,+kvm_pv_eoi,+kvm_pv_unhalt,vendor=GenuineIntel",
        "cortex-a57,sve128=on",
        "power9_v2.0",
    ],
    "uuid": ["4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10", "4B1E3CDE-4A29-4F1C-9A55-6B6F1B7C2D10"],
    "kernel command line": ["", "root=/dev/vda1 ro console=ttyS0,115200n8 quiet", "init='/bin/sh -c \"x\"'", "ä"],
    "firmware": ["bios.bin", "seabios-256k.bin", "OVMF.fd"],
    "-global": [
        "driver=cfi.pflash01,property=secure,value=on",
        "cfi.pflash01.secure=on",
        "ICH9-LPC.disable_s3=1",
        "driver=ICH9-LPC,property=disable_s4,value=0",
    ],
    "disk": [
        *("ide-hd", "ide-cd", "scsi-hd", "scsi-cd", "virtio-blk", "virtio-blk-pci", "virtio-blk-ccw", "nvme"),
        *("virtio-blk-device", "virtio-blk-pci-non-transitional", "virtio-blk-pci-transitional", "usb-storage"),
    ],
    "controller": [
        *(
            "virtio-scsi",
            "virtio-scsi-pci",
            "virtio-scsi-ccw",
            "lsi",
            "lsi53c895a",
            "megasas",
            "megasas-gen2",
            "pvscsi",
        ),
        *("mptsas1068", "spapr-vscsi", "qemu-xhci", "nec-usb-xhci", "ich9-usb-ehci1", "piix3-usb-uhci", "usb-ehci"),
    ],
    "serial": ["", "WD-12345", "QM00001", "a,b", "drive scsi0", "ä"],
    "property of a disk": ["0", "512", "0x5000c50015ea71ac", "100"],
}
"""As QEMU's documentation, libvirt and Proxmox have them."""
ODD = {
    "machine": ["", "q35,accel=kvm", "pc q35", "../q35", "q35\n", "-q35", "x" * 65, "q35=on", "q\x00"],
    "property of the machine": ["", "on,kernel=/etc/hostname", "a b", "/etc/hostname", "x" * 33, "on\n"],
    "processor": [
        "",
        "host,",
        "host,,x",
        "host,a=b=c,/x",
        "/etc/hostname",
        "host,x=\x1b[2J",
        "host\n",
        "host,=x",
        ",host",
    ],
    "uuid": ["", "x", "4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d1", "4b1e3cde4a294f1c9a556b6f1b7c2d10", "random"],
    "kernel command line": ["quiet\nroot=x", "\x1b]0;x\x07", "x" * 4097, "\x00", "\x9b1m"],
    "firmware": ["", "/etc/hostname", "../bios.bin", "bios bin", "-bios", "a,b", ".hidden"],
    "-global": [
        "cfi.pflash01.secure=on,x=y",
        "driver=cfi.pflash01,property=secure,value=on,file=/x",
        "cfi.pflash01.secure=/etc/hostname",
        "virtio-blk-pci.drive=x",
        "ICH9-LPC.disable_s3",
    ],
    "disk": [
        "",
        "vfio-pci",
        "vhost-user-blk-pci",
        "virtio-9p-pci",
        "scsi-block",
        "ide-hd,file=x",
        "usb-host",
        "loader",
        "nvme\n",
    ],
    "controller": ["", "vfio-pci", "vhost-scsi-pci", "vhost-user-scsi-pci", "usb-host", "qemu-xhci,x=y", "pxb", "x\n"],
    "serial": ["x" * 65, "a\nb", "\x1b[2J", "\x00"],
    "property of a disk": ["", "-1", "1,drive=x", "0 0", "/dev/sda", "1\n", "x" * 33],
}


def test_every_kind_is_here() -> None:
    assert HONEST.keys() == ODD.keys() == PATTERNS.keys()


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in HONEST.items() for value in values])
def test_honest_values_are_taken_over(kind: str, value: str) -> None:
    assert checked(kind, value) == value


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in ODD.items() for value in values])
def test_odd_values_are_refused_by_name(kind: str, value: str) -> None:
    with pytest.raises(BackupError) as refused:
        checked(kind, value)
    said = str(refused.value)
    assert f"vm.json has {value[:80]!r}" in said
    assert f"as {kind}, and a throwaway VM cannot have that; choose another with boot_options" in said
    assert said.isprintable()
    assert len(said) < 300
