# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which disks libvirt takes for the domain of a set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import Firmware, parse_domain
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.old_domain import OldDomain
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID, image, manifest
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import disk_restore

NVRAM = image("nvram", qdev="/machine/system.flash1")


def old_domain(more: str = "", device: str = "disk") -> OldDomain:
    """Return a domain with one disk."""
    xml = f"<disk type='file' device='{device}'><source file='/a'/><target dev='vda'/>{more}</disk>"
    xml = f"<domain type='kvm'><name>web01</name><uuid>{UUID}</uuid><devices>{xml}</devices></domain>"
    return OldDomain(manifest("s1", image()), {"domain": {"xml": xml}}, parse_domain(xml))


@pytest.mark.parametrize(
    ("more", "raw"),
    [
        ("", {}),
        ("<shareable/>", {"vda": ".raw"}),
        # Nobody writes to it.
        ("<shareable/><readonly/>", {}),
    ],
)
def test_format_of_a_disk(more: str, raw: dict[str, str]) -> None:
    domain = old_domain(more)
    assert domain.raw_files() == raw
    domain.check_disks([disk_restore("/new/a", format="raw")])
    if not raw:
        domain.check_disks([disk_restore("/new/a")])
        return
    with pytest.raises(Refused, match="format: /new/a: disk vda is shareable, and libvirt takes such a disk in format"):
        domain.check_disks([disk_restore("/new/a")])


@pytest.mark.parametrize(("format_", "raw"), [("raw", {"nvram": ".fd"}), ("qcow2", {})])
def test_variables_of_the_firmware_keep_their_format(format_: str, raw: dict[str, str]) -> None:
    xml = old_domain().xml
    domain = OldDomain(manifest("s1", NVRAM), {}, replace(xml, firmware=Firmware(nvram_format=format_)))
    assert domain.raw_files() == raw
    chain = ((domain.manifest, NVRAM),)
    for other in ("raw", "qcow2"):
        wanted = disk_restore("/new/nvram", name="nvram", chain=chain, format=other)
        if other == format_:
            domain.check_disks([wanted])
            continue
        with pytest.raises(Refused, match=f"the UEFI variables of this domain are restored in format {format_}"):
            domain.check_disks([wanted])


def test_a_disk_of_scsi_commands_is_a_block_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_files, "is_block_device", lambda path: path.startswith("/dev/"))
    domain = old_domain(device="lun")
    domain.check_disks([disk_restore("/dev/a", format="raw")])
    with pytest.raises(Refused, match="disk vda has device='lun', and libvirt takes only a block device"):
        domain.check_disks([disk_restore("/new/a", format="raw")])
