# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks that are restored to places on which domains rely, in ways that no lock and no path tells."""

from __future__ import annotations

import os
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._restore.libvirt_host import LibvirtHost
from ansible_collections.vmfleet.backup.tests.harness.images import patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain, DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")


class Backup:
    """A domain with one disk, which is off, and its set."""

    def __init__(self, libvirt: Libvirt, directory: Path) -> None:
        self.libvirt = libvirt
        self.disk = patterned(directory / "vda.qcow2")
        self.domain = libvirt.define("web01", DomainDisk(self.disk))
        self.sets = Sets(directory / "repository", libvirt.inside)
        self.sets.back_up("libvirt:web01")
        self.place = directory / "restored"
        self.place.mkdir()
        self.beside = {"domain": "define", "domain_name": "web02", "domain_uuid": "new"}

    def asked(self, target: Path, **options: t.Any) -> dict[str, t.Any]:
        disks = [{"name": "vda", "target": str(target)}]
        return {"repository": str(self.sets.path), "vm": "web01", "disks": disks, **options}

    def restore(self, target: Path, **options: t.Any) -> dict[str, t.Any]:
        return succeed("backup_restore", self.asked(target, **options), inside=self.libvirt.inside)

    def refuse(self, target: Path, **options: t.Any) -> str:
        return str(fail("backup_restore", self.asked(target, **options), inside=self.libvirt.inside)["msg"])


@pytest.fixture
def backup(libvirt: Libvirt, directory: Path) -> Backup:
    return Backup(libvirt, directory)


def test_a_disk_of_another_domain_that_is_mounted_elsewhere(backup: Backup, directory: Path) -> None:
    images, alias = directory / "images", directory / "alias"
    images.mkdir()
    alias.mkdir()
    other = patterned(images / "other.qcow2")
    domain = backup.libvirt.define("db01", DomainDisk(other))
    domain.start("--paused")
    domain.virsh("managedsave")
    before = other.stat().st_ino
    # As where /var/lib/libvirt/images is a part of a larger disk.
    backup.libvirt.run("mount", "--bind", images, alias)
    try:
        told = [backup.refuse(alias / "other.qcow2", overwrite=True, **more) for more in (backup.beside, {})]
    finally:
        backup.libvirt.run("umount", alias)
    assert told[0] == f"target: {alias}/other.qcow2 is a file of domain db01; restore to another place"
    assert told[1].startswith(f"target: {alias}/other.qcow2 is a file of domain db01, which has a saved state")
    assert other.stat().st_ino == before


def test_a_disk_that_is_lost_of_a_domain_that_was_saved(backup: Backup) -> None:
    target = backup.place / "vda.qcow2"
    backup.restore(target, **backup.beside)
    domain = Domain(backup.libvirt, "web02")
    domain.start("--paused")
    domain.virsh("managedsave")
    target.unlink()
    told = backup.refuse(target, **backup.beside)
    assert told.startswith("domain_name: domain web02 has a saved state (virsh managedsave)")
    assert not target.exists()
    domain.virsh("managedsave-remove")
    assert backup.restore(target, **backup.beside)["restored"][0]["changed"]
    assert not backup.restore(target, **backup.beside)["changed"]


def test_a_domain_that_is_started_while_libvirt_is_asked(backup: Backup, monkeypatch: pytest.MonkeyPatch) -> None:
    before = backup.disk.stat().st_ino
    known, asked = LibvirtHost.known_domains, []

    def know_slowly(host: LibvirtHost) -> t.Any:
        found = known(host)
        asked.append(1)
        if len(asked) == 2:
            # It takes its time at the last look: up to a minute.
            subprocess.run(["virsh", "start", "web01", "--paused"], check=True, capture_output=True)
        return found

    monkeypatch.setattr(LibvirtHost, "known_domains", know_slowly)
    told = backup.refuse(backup.disk, overwrite=True)
    assert "is in use by a running VM" in told
    assert backup.disk.stat().st_ino == before


def test_a_disk_that_is_lost_of_a_domain_that_was_saved_without_its_domain(backup: Backup) -> None:
    backup.domain.start("--paused")
    backup.domain.virsh("managedsave")
    backup.disk.unlink()
    told = backup.refuse(backup.disk)
    assert "is a file of domain web01, which has a saved state (virsh managedsave)" in told
    assert not backup.disk.exists()


def test_a_name_that_is_too_long_for_a_file(backup: Backup) -> None:
    target = backup.place / "vda.qcow2"
    told = backup.refuse(target, **{**backup.beside, "domain_name": "w" * 252})
    assert told.startswith("domain_name: ")
    assert not target.exists()
