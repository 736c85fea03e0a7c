# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains that are not what their definition says: their memory was saved, or they run with other disks."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.filesystems import LoopDevice
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import FIRMWARE, DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

ADDRESS = "libvirt:web"
WITHOUT = (
    "VM web: disk sdb is not in the set: the domain {} without it, and gets it at its next start (virsh dumpxml"
    " --inactive)"
)
NBD = "<nvram type='network'><source protocol='nbd' name='vars'><host name='127.0.0.1' port='1'/></source></nvram>"
MEMORY = (
    "VM web: its saved memory (virsh managedsave) is not in the set, nor is data that the guest had not yet written to"
    " its disks"
)


class Changed:
    """A domain that is defined with `vda` and `sdb`, and runs with an overlay over `vda`, without `sdb`, with `sdc`."""

    def __init__(self, libvirt: Libvirt, directory: Path) -> None:
        self.sets = Sets(directory / "repository", libvirt.inside)
        self.inside = libvirt.inside
        directory.chmod(0o777)
        self._directory = directory
        self.files = {
            target: patterned(directory / f"{target}.qcow2", size=8 * MIB, seed=seed)
            for seed, target in enumerate(("vda", "sdb", "sdc"))
        }
        defined = (DomainDisk(self.files["vda"], "vda"), DomainDisk(self.files["sdb"], "sdb", "scsi"))
        self.domain = libvirt.start("web", *defined)
        (directory / "sdc.xml").write_text(DomainDisk(self.files["sdc"], "sdc", "scsi").xml)
        self.domain.virsh("attach-device", directory / "sdc.xml", "--live")
        self.domain.virsh("detach-disk", "sdb", "--live")
        self.domain.virsh("snapshot-create-as", "--disk-only", "--no-metadata", "--name", "over")
        self.files["vda"] = directory / "vda.over"
        self.files["sdc"] = directory / "sdc.over"

    def back_up(self, set_id: str, *targets: str) -> list[str]:
        """Make a set that has just these disks, and what they hold now; returns the warnings of its plan."""
        if self.domain.state == "running":
            for target in targets:
                self.domain.io(target, "flush")
        frozen = {target: self._directory / f"{set_id}-{target}" for target in targets}
        for target, copy in frozen.items():
            qemu_img("convert", "-U", "-f", "qcow2", "-O", "qcow2", self.files[target], copy)
        planned = self.sets.plan(ADDRESS, id=set_id)
        made = succeed("backup_set", {"plan": planned["plan"]}, inside=self.inside)
        assert result_of(made, "web")["state"] == "published", made
        images = self.sets.images("web", set_id)
        assert list(images) == list(targets)
        for target, copy in frozen.items():
            assert identical(copy, images[target]), target
        return list(planned["warnings"])

    def check_definition(self) -> None:
        """What is defined of the newest set is told, where that is not what it was."""
        (self._directory / "restored").mkdir()
        wanted = {"directory": str(self._directory / "restored"), "domain": "define", "domain_name": "web02"}
        arguments = {"repository": str(self.sets.path), "vm": "web", "domain_uuid": "new", **wanted}
        notes = succeed("backup_restore", arguments, inside=self.inside)["notes"]
        assert "disk sdc was restored, but belongs to no disk of the domain as it was defined; attach it" in notes
        assert "disk sdb is not in the set, and was removed from the domain" in notes

    def refusal(self, set_id: str) -> str:
        """Return why there can be no set."""
        [planned] = self.sets.plan(ADDRESS, id=set_id)["plan"]["vms"]
        assert planned["action"] == "fail"
        return str(planned["reason"])


@pytest.fixture
def changed(libvirt: Libvirt, directory: Path) -> Changed:
    return Changed(libvirt, directory)


def test_a_saved_domain_has_the_disks_that_it_had_then(changed: Changed) -> None:
    assert WITHOUT.format("runs") in changed.back_up("s1", "vda", "sdc")
    changed.domain.write("sdc", 0xA1, MIB, 65536)
    changed.domain.virsh("managedsave")
    warnings = changed.back_up("s2", "vda", "sdc")
    assert {MEMORY, WITHOUT.format("was saved")} <= set(warnings)
    changed.check_definition()
    changed.domain.start()
    changed.domain.write("sdc", 0xB1, 2 * MIB, 65536)
    changed.domain.write("vda", 0xB2, 2 * MIB, 65536)
    changed.back_up("s3", "vda", "sdc")
    for set_id in ("s2", "s3"):
        assert changed.sets.levels("web", set_id) == {"vda": "incremental", "sdc": "incremental"}
    # When it has come to an end, it is as it is defined.
    changed.domain.destroy()
    assert changed.back_up("s4", "vda", "sdb") == []


def test_variables_that_are_in_no_file(libvirt: Libvirt, directory: Path) -> None:
    loader = f"<loader readonly='yes' type='pflash'>{FIRMWARE}</loader>"
    disk = DomainDisk(patterned(directory / "vda.qcow2", size=8 * MIB), "vda")
    sets = Sets(directory / "repository", libvirt.inside)
    libvirt.define("web", disk, os=loader + NBD)
    [planned] = sets.plan(ADDRESS, id="s1")["plan"]["vms"]
    assert planned["action"] == "fail"
    assert planned["reason"] == (
        "disk nvram of VM web (network nbd:vars) cannot be copied while the VM is off. Only qcow2 and raw images that"
        " the VM writes to can be copied then: start the VM, or leave the disk out (exclude_disks)"
    )
    [planned] = sets.plan(ADDRESS, id="s1", exclude_disks=["nvram"])["plan"]["vms"]
    assert planned["left_out"] == [{"name": "nvram", "reason": "is excluded"}]
    # Those on a block device are copied.
    with LoopDevice(directory / "vars", 256 * 2112) as device:
        device.path.write_bytes(bytes(range(256)) * 2112)
        libvirt.define("db", disk, os=f"{loader}<nvram type='block'><source dev='{device.path}'/></nvram>")
        sets.back_up("libvirt:db", id="s1")
        assert identical(device.path, sets.images("db", "s1")["nvram"], "raw")


def test_what_was_saved_cannot_be_read(changed: Changed) -> None:
    changed.domain.virsh("managedsave")
    state = changed.domain.libvirt.seen_here("/var/lib/libvirt/qemu/save/web.save")
    content = state.read_bytes()
    state.write_bytes(content[:50])
    reason = changed.refusal("s1")
    assert "libvirt cannot read the saved memory of the domain (" in reason
    assert reason.endswith(
        "so the disks of its next start are unknown. Start the domain, or remove its saved memory (virsh"
        " managedsave-remove web)"
    )
    # libvirt itself does not know yet that it has gone.
    state.unlink()
    assert "Managed save:   yes" in changed.domain.virsh("dominfo")
    assert changed.back_up("s1", "vda", "sdb") == []
