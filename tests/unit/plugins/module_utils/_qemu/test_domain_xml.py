# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The XML of a domain is read as libvirt means it, or refused with the place where it is odd."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import domain_xml as reader
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.answers import Odd
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import (
    DomainDisk,
    Firmware,
    Note,
    Source,
    Tpm,
    parse_domain,
)
from ansible_collections.vmfleet.backup.tests.harness.domains import SAMPLES, domain_xml
from ansible_collections.vmfleet.backup.tests.harness.fuzzing import examples

UUID = "4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10"


def domain(*disks: str, name: str = "web", os: str = "", metadata: str = "") -> str:
    """The XML of a domain with these disks."""
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{UUID}</uuid><metadata>{metadata}</metadata>"
        f"<os>{os}</os><devices>{''.join(disks)}</devices></domain>"
    )


def test_domain_that_runs() -> None:
    found = parse_domain(domain_xml("running"))
    assert (found.name, found.uuid, found.kind, found.machine) == ("web 01", UUID, "qemu", "pc-i440fx-7.2")
    assert [(disk.target, disk.bus, disk.device, disk.alias) for disk in found.disks] == [
        ("vda", "virtio", "disk", "virtio-disk0"),
        ("vdb", "virtio", "disk", "ua-data"),
        ("vdc", "virtio", "disk", "virtio-disk2"),
        ("vdd", "virtio", "disk", "virtio-disk3"),
        ("vde", "virtio", "disk", "virtio-disk4"),
        ("sda", "scsi", "disk", "scsi0-0-0-0"),
        ("hda", "ide", "cdrom", "ide0-0-0"),
        ("hdb", "ide", "cdrom", "ide0-0-1"),
        ("fda", "fdc", "floppy", "fdc0-0-0"),
    ]
    assert found.disks[0].source == Source("file", "/srv/images/top.qcow2", "qcow2", 9)
    assert found.disks[0].chain == (
        Source("file", "/srv/images/mid.qcow2", "qcow2", 10),
        Source("file", "/srv/images/base.qcow2", "qcow2", 11),
    )
    assert found.disks[0].ends
    assert found.disks[0].indexes == {9, 10, 11}
    assert found.disks[3].source == Source("network", "nbd:exp", "raw", 6)
    assert found.disks[7].source == Source("none", "", "", None)
    assert [disk.target for disk in found.disks if disk.read_only] == ["vdc", "hda", "hdb"]
    assert [disk.target for disk in found.disks if disk.shareable] == ["sda"]
    assert [disk.target for disk in found.disks if disk.transient] == ["vde"]
    assert (found.firmware, found.tpm) == (Firmware(), None)
    assert found.disk("vdb") is found.disks[1]
    assert found.disk("vdz") is None


def test_domain_as_it_is_defined() -> None:
    found = parse_domain(domain_xml("running-inactive"))
    running = parse_domain(domain_xml("running"))
    assert [disk.target for disk in found.disks] == [disk.target for disk in running.disks]
    assert {disk.alias for disk in found.disks} == {"", "ua-data"}
    assert found.disks[0] == DomainDisk("vda", "virtio", source=Source("file", "/srv/images/top.qcow2", "qcow2"))
    # A transient disk has an overlay while it runs only.
    assert found.disks[4].source.path == "/srv/images/c.qcow2"
    assert [layer.path for layer in running.disks[4].chain] == ["/srv/images/c.qcow2"]


def test_firmware_and_tpm() -> None:
    for sample in ("uefi", "uefi-inactive"):
        found = parse_domain(domain_xml(sample))
        code, variables = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
        nvram = "/var/lib/libvirt/qemu/nvram/uefi_VARS.fd"
        assert found.firmware == Firmware("", code, "pflash", nvram, variables)
        assert found.tpm == Tpm("tpm-crb", "emulator", "2.0")
    assert parse_domain(domain_xml("defined")).firmware == Firmware(auto="efi")
    # As libvirt 8.5 and later write variables that are no raw file.
    other = parse_domain(domain(os="<nvram type='file' format='qcow2'><source file='/srv/vars.qcow2'/></nvram>"))
    assert (other.firmware.nvram, other.firmware.nvram_format) == ("/srv/vars.qcow2", "qcow2")
    network = "<nvram type='network' format='raw'><source protocol='nbd' name='v'><host name='h'/></source></nvram>"
    for kind, xml, where in (
        ("network", network, "nbd:v"),
        ("block", "<nvram type='block'><source dev='/dev/vg0/vars'/></nvram>", "/dev/vg0/vars"),
    ):
        elsewhere = parse_domain(domain(os=xml)).firmware
        assert (elsewhere.nvram_kind, elsewhere.nvram) == (kind, where)
    store = "<varstore template='/t.json' path='/v.json'/>"
    assert parse_domain(domain(os=store)).firmware.varstore == "/v.json"
    for kind, place in (("dir", "/srv/tpm"), ("file", "file:///srv/tpm"), ("unix", "")):
        tpm = f"<tpm><backend type='emulator'><source type='{kind}' path='/srv/tpm'/></backend></tpm>"
        assert parse_domain(domain(tpm)).tpm == Tpm("", "emulator", place=place)
    locked = "<tpm model='tpm-tis'><backend type='emulator'><encryption secret='s'/></backend></tpm>"
    assert parse_domain(domain(locked)).tpm == Tpm("tpm-tis", "emulator", secret="s")


def test_what_a_disk_is_copied_to_belongs_to_it() -> None:
    found = parse_domain(domain_xml("copied"))
    assert [sorted(disk.indexes) for disk in found.disks] == [[3, 4], [2], [1, 5]]
    assert found.disks[1].source == Source("block", "/dev/loop1", "raw", 2)


def test_every_kind_of_source() -> None:
    found = parse_domain(domain_xml("defined"))
    assert {disk.target: (disk.source.kind, disk.source.path, disk.source.format) for disk in found.disks} == {
        "vda": ("block", "/dev/vg0/db", "raw"),
        "vdb": ("volume", "images/db-data.qcow2", "qcow2"),
        # No secret is in these: its user, its password's uuid, the token of its query.
        "vdc": ("network", "rbd:pool/db", "raw"),
        "sdb": ("network", "https:/iso/x.iso", "raw"),
        "vdd": ("vhostuser", "/run/spdk/db.sock", "raw"),
        "vde": ("nvme", "0x0000:0x01:0x00:0x0:1", "raw"),
        "fda": ("dir", "/srv/floppy", "fat"),
        # It was defined without a format.
        "vdf": ("file", "/srv/images/plain", "raw"),
        "vdg": ("file", "/srv/images/secret.qcow2", "qcow2"),
        "sda": ("block", "/dev/sdq", "raw"),
    }
    assert found.disks[7].device == "lun"


def test_policy_in_the_metadata() -> None:
    policy = Note("backup", (("level", "full"), ("skip", "no")), (Note("exclude", (("disk", "vdb"),)),))
    assert parse_domain(domain_xml("running")).policies == (policy,)
    # virsh gives the name space a prefix, and others write it as a default.
    policy = Note("backup", (("quiesce", "try"),), (Note("exclude", (("disk", "vdb"),)),))
    assert parse_domain(domain_xml("uefi")).policies == (policy,)
    assert parse_domain(domain_xml("defined")).policies == ()
    # The same words in a name space of others mean something else.
    others = "<backup xmlns='https://example.org/1' skip='yes'/><backup skip='yes'/>"
    assert parse_domain(domain(metadata=others)).policies == ()
    text = f"<backup xmlns='{reader.POLICY}'> full </backup>"
    assert parse_domain(domain(metadata=text)).policies == (Note("backup", text="full"),)


def test_names_keep_their_characters() -> None:
    found = parse_domain(domain(name=" a&amp;b: #%=\u00fc "))
    assert found.name == " a&b: #%=\u00fc "


DISK = "<disk type='file' device='disk'><source file='/a'{}/><target dev='vda' bus='virtio'/>{}</disk>"


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        pytest.param("", "the XML cannot be read: no element found", id="empty"),
        pytest.param("<domain>", "the XML cannot be read: no element found", id="cut off"),
        pytest.param("<domain/>\0", "the XML cannot be read", id="zero byte"),
        pytest.param("<domain>\ud800</domain>", "the XML is no text in Unicode", id="half a character"),
        pytest.param("<network><name>n</name></network>", "the XML is a 'network', not a domain", id="no domain"),
        pytest.param("<domain><name>n</name></domain>", "domain.uuid is missing", id="no uuid"),
        pytest.param("<domain><uuid>7</uuid></domain>", "domain.uuid is no uuid", id="uuid"),
        pytest.param(f"<domain><uuid>{UUID}</uuid></domain>", "domain.name is missing", id="no name"),
        pytest.param(domain(name="n" * 4097), "domain.name has 4097 characters", id="long name"),
        pytest.param(domain("<disk/>"), "domain.devices.disk[0] has no target", id="no target"),
        pytest.param(
            domain("<disk><target dev='a/../b'/></disk>"),
            "domain.devices.disk[0].target has no name of a disk as its dev: 'a/../b'",
            id="target",
        ),
        pytest.param(
            domain("<disk device='tape'><target dev='vda'/></disk>"),
            "domain.devices.disk[0] is a device of a kind that nobody knows: 'tape'",
            id="device",
        ),
        pytest.param(
            domain("<disk type='moon'><source/><target dev='vda'/></disk>"),
            "domain.devices.disk[0].source is of a kind that nobody knows: 'moon'",
            id="kind",
        ),
        pytest.param(
            domain(DISK.format("", ""), DISK.format("", "")),
            "domain.devices has two disks with the target vda",
            id="twins",
        ),
        pytest.param(
            domain(DISK.format(" index='-1'", "")),
            "domain.devices.disk[0].source has an index that is no number: '-1'",
            id="index",
        ),
        pytest.param(
            domain(DISK.format("", "<backingStore type='file'><source file='/b' index='x'/></backingStore>")),
            "domain.devices.disk[0].backingStore.source has an index that is no number: 'x'",
            id="index of a layer",
        ),
        pytest.param(domain("<disk/>" * 1001), "domain.devices has 1001 disks", id="many disks"),
        # In what a domain says of its backup, each level takes two of Python's calls.
        pytest.param(
            domain(metadata=f"<backup xmlns='{reader.POLICY}'>{'<a>' * 505}{'</a>' * 505}</backup>"),
            "the XML is nested too deep",
            id="deep",
        ),
        pytest.param("<!DOCTYPE domain><domain/>", "the XML has a document type, which no domain has", id="doctype"),
        pytest.param(f"<domain>{' ' * reader.LONGEST}", "the XML has 16777224 characters", id="long"),
    ],
)
def test_what_is_odd_is_refused_with_its_place(xml: str, reason: str) -> None:
    with pytest.raises(Odd, match=re.escape(reason)):
        parse_domain(xml)


def test_entities_are_not_resolved() -> None:
    for entity in ('"x"', 'SYSTEM "file:///etc/hostname"'):
        with pytest.raises(Odd, match="document type"):
            parse_domain(f"<!DOCTYPE domain [<!ENTITY e {entity}>]>{domain(name='&e;')}")


def test_as_many_layers_as_libvirt_opens() -> None:
    layer = "<backingStore type='file' index='{}'><format type='qcow2'/><source file='/l{}'/>"
    layers = "".join(layer.format(number, number) for number in range(2, 202)) + "<backingStore/>"
    found = parse_domain(domain(DISK.format(" index='1'", layers + "</backingStore>" * 200)))
    assert len(found.disks[0].chain) == 200
    assert found.disks[0].chain[-1] == Source("file", "/l201", "qcow2", 201)
    assert found.disks[0].indexes == set(range(1, 202))


PART = re.compile(r"'[^']*'|>[^<]+<|</?\w+|/>|\w+=")


@examples(50)
@given(sample=st.sampled_from(SAMPLES), data=st.data())
def test_whatever_it_says_is_read_or_refused(sample: str, data: st.DataObject) -> None:
    honest = domain_xml(sample)
    parts = list(PART.finditer(honest))
    place = data.draw(st.sampled_from(parts))
    other = data.draw(st.sampled_from(parts))[0] if data.draw(st.booleans()) else data.draw(st.text(max_size=20))
    with contextlib.suppress(Odd):
        parse_domain(honest[: place.start()] + other + honest[place.end() :])
