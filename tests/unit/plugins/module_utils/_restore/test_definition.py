# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What becomes of the XML of a domain that is restored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import parse_domain, parse_xml
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.definition import (
    RestoredFrom,
    Wanted,
    origin_of,
    redefine,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import IMAGE, MANIFEST, disk_restore

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    import pytest

    from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import DiskRestore

OTHER = "0f0e3cde-4a29-4f1c-9a55-6b6f1b7c2d11"
ORIGIN = RestoredFrom(UUID, "s1", "0123456789ab")
EMULATORS = frozenset({"/usr/bin/qemu-system-x86_64"})
OLD = f"""
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web01</name><uuid>{UUID}</uuid><genid>{OTHER}</genid>
  <metadata><my:app xmlns:my='urn:my'/></metadata>
  <sysinfo type='smbios'><system><entry name='uuid'>{UUID}</entry><entry name='serial'>7</entry></system></sysinfo>
  <sysinfo type='fwcfg'><entry name='opt/x' file='/old/table'/></sysinfo>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><kernel>/boot/vmlinuz</kernel>
    <nvram template='/usr/share/VARS.fd' format='qcow2'>/old/VARS.qcow2</nvram></os>
  <devices>
    <emulator>/opt/evil</emulator>
    <disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/><auth username='me'/>
      <source protocol='rbd' name='pool/x'><encryption format='luks'/></source><backingStore/>
      <target dev='vda' bus='virtio'/><serial>7</serial></disk>
    <disk type='file'><source file='/old/b'/><target dev='vdb'/></disk>
    <disk type='file'><source file='/etc/shadow'/><target dev='vdc'/><readonly/></disk>
    <disk type='file' device='cdrom'><source file='/old/cd'/><target dev='sda'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/></interface>
    <filesystem type='mount'><source dir='/srv'/><target dir='srv'/></filesystem>
    <hostdev mode='subsystem' type='pci'/>
    <memory model='nvdimm'><source><path>/old/nvdimm</path></source></memory>
    <interface type='ethernet'><script path='/old/up'/></interface>
    <serial type='file'><source path='/old/serial'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  <qemu:commandline><qemu:arg value='-s'/></qemu:commandline>
</domain>"""
USES = (
    "/boot/vmlinuz, network default, bridge br0, /old/table (sysinfo), /srv (filesystem), /old/nvdimm (memory),"
    " /old/up (interface), /old/serial (serial), host devices (1), options for QEMU (1)"
)
NVRAM = replace(IMAGE, name="nvram", qdev="/machine/system.flash1")


def restored(name: str, target: str) -> DiskRestore:
    image = NVRAM if name == "nvram" else IMAGE
    return disk_restore(target, name=name, chain=((MANIFEST, image),), format="raw" if name == "nvram" else "qcow2")


def defined(*disks: DiskRestore, wanted: Wanted | None = None, text: str = OLD) -> tuple[Element, list[str]]:
    xml, notes = redefine(parse_xml(text), wanted or Wanted("web01", UUID), disks, ORIGIN, EMULATORS)
    # It is still the XML of a domain, to us and to libvirt.
    parse_domain(xml)
    return parse_xml(xml), notes


def test_restored_disks_take_the_places_of_the_old_ones() -> None:
    root, notes = defined(
        restored("vda", "/new/a.qcow2"), restored("nvram", "/new/nvram.fd"), restored("vdx", "/new/x")
    )
    [disk, *drives] = root.findall("devices/disk")
    assert disk.attrib == {"type": "file", "device": "disk"}
    assert [(one.tag, one.attrib) for one in disk] == [
        ("driver", {"name": "qemu", "type": "qcow2", "cache": "none"}),
        ("source", {"file": "/new/a.qcow2"}),
        ("target", {"dev": "vda", "bus": "virtio"}),
        ("serial", {}),
    ]
    assert [drive.findall("source") for drive in drives] == [[], []]
    [nvram] = root.findall("os/nvram")
    assert (nvram.text, nvram.attrib) == ("/new/nvram.fd", {"template": "/usr/share/VARS.fd", "format": "qcow2"})
    assert root.find("devices/emulator") is None
    assert notes == [
        "disk vdb is not in the set, and was removed from the domain",
        "disk vdc is not in the set, and was removed from the domain",
        "drive sda is empty: what was in it is not in the set",
        "disk vdx was restored, but belongs to no disk of the domain as it was defined; attach it",
        "libvirt does not know the emulator /opt/evil here, and uses its own",
        f"it uses of this machine: {USES}",
    ]


def test_a_disk_on_a_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_files, "is_block_device", lambda path: path.startswith("/dev/vg0/"))
    root, _notes = defined(replace(restored("vdb", "/dev/vg0/b"), format="raw"))
    [disk, *_drives] = root.findall("devices/disk")
    assert disk.attrib == {"type": "block"}
    assert [(one.tag, one.attrib) for one in disk] == [
        ("driver", {"name": "qemu", "type": "raw"}),
        ("source", {"dev": "/dev/vg0/b"}),
        ("target", {"dev": "vdb"}),
    ]


def test_what_is_only_for_the_old_format_goes() -> None:
    old = "<driver name='qemu' type='qcow2' discard_no_unref='on'><metadata_cache/></driver>"
    text = OLD.replace("<disk type='file'><source file='/old/b'/>", f"<disk type='file'>{old}<source file='/old/b'/>")
    for image_format, attributes, parts in (("raw", 2, 0), ("qcow2", 3, 1)):
        root, _notes = defined(replace(restored("vdb", "/new/b"), format=image_format), text=text)
        driver = root.find("devices/disk/driver")
        assert driver is not None
        assert (driver.attrib["type"], len(driver.attrib), len(driver)) == (image_format, attributes, parts)


def test_it_keeps_what_it_was_known_by() -> None:
    root, _notes = defined()
    assert (root.findtext("name"), root.findtext("uuid")) == ("web01", UUID)
    assert [mac.attrib["address"] for mac in root.iter("mac")] == ["52:54:00:00:00:01", "52:54:00:00:00:02"]
    # To the guest, time has gone back.
    assert root.findtext("genid") == ""
    assert root.find("metadata/{urn:my}app") is not None
    assert origin_of(root) == ORIGIN
    # That of an earlier restore goes.
    again = RestoredFrom(UUID, "s2", "ba9876543210")
    xml, _notes = redefine(root, Wanted("web01", UUID), [], again, EMULATORS)
    assert origin_of(parse_xml(xml)) == again
    assert xml.count("policy/1") + xml.count(":restored ") == 1
    assert origin_of(parse_xml(OLD)) is None


def test_it_becomes_another_one() -> None:
    root, _notes = defined(wanted=Wanted("web02", OTHER, new_mac=True))
    assert (root.findtext("name"), root.findtext("uuid")) == ("web02", OTHER)
    assert [entry.text for entry in root.iter("entry")] == [OTHER, "7", None]
    assert not list(root.iter("mac"))
    assert len(root.findall("devices/interface")) == 3


def test_variables_that_are_not_in_the_set_are_not_those_of_the_old_domain() -> None:
    told = "its UEFI variables are not in the set: the firmware begins without them"
    root, notes = defined()
    [nvram] = root.findall("os/nvram")
    assert (nvram.text, nvram.attrib) == (None, {"template": "/usr/share/VARS.fd", "format": "qcow2"})
    assert told in notes
    root, notes = defined(text=OLD.replace("template='/usr/share/VARS.fd'", ""))
    assert root.find("os/nvram") is None
    assert told in notes
    # libvirt may have chosen the file while the domain ran.
    without = OLD.replace("<nvram", "<!-- <nvram").replace("</nvram>", "</nvram> -->")
    root, notes = defined(restored("nvram", "/new/nvram.fd"), text=without)
    assert root.findtext("os/nvram") == "/new/nvram.fd"
    assert told not in notes


def test_variables_in_a_file_of_their_own_are_not_those_of_the_old_domain() -> None:
    store = "<os><varstore template='/t.json' path='/old.json'/>"
    root, notes = defined(restored("vda", "/new/a.qcow2"), text=OLD.replace("<os>", store, 1))
    [found] = root.findall("os/varstore")
    assert found.attrib == {"template": "/t.json"}
    assert "its UEFI variables (<varstore>) are not in the set: the firmware begins without them" in notes


def test_the_state_of_a_tpm_is_not_where_the_old_domain_has_it() -> None:
    tpm = "<tpm model='tpm-tis'><backend type='emulator'><source type='dir' path='/old/tpm'/></backend></tpm>"
    root, notes = defined(restored("vda", "/new/a.qcow2"), text=OLD.replace("<devices>", f"<devices>{tpm}", 1))
    [backend] = root.findall("devices/tpm/backend[@type='emulator']")
    assert list(backend) == []
    assert "the state of its TPM is in the default place of libvirt, not in the place of the old domain" in notes
