# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore where libvirt has other domains, and what they have: nothing of theirs is replaced."""

from __future__ import annotations

import os
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._restore import libvirt_host
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import restore as restore_module
from ansible_collections.vmfleet.backup.tests.harness.images import (
    MIB,
    identical,
    patterned,
    qemu_img,
)
from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt, restart_in_here, version
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import (
    FIRMWARE,
    VARIABLES,
    Domain,
    DomainDisk,
)
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")


def test_uefi_whose_files_are_qcow2(libvirt: Libvirt, directory: Path) -> None:
    # As Fedora has them.
    if version().startswith("9.0."):
        pytest.skip("this libvirt takes every image of a firmware for a raw one")
    (directory / "restored").mkdir()
    code, template, variables = (directory / f"{name}.qcow2" for name in ("code", "template", "variables"))
    for raw, image in ((FIRMWARE, code), (VARIABLES, template)):
        qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    loader = f"<loader readonly='yes' type='pflash' format='qcow2'>{code}</loader>"
    firmware = f"{loader}<nvram template='{template}' format='qcow2'>{variables}</nvram>"
    disk = DomainDisk(patterned(directory / "vda.qcow2"))
    domain = libvirt.define("web01", disk, os=firmware, memory=64)
    domain.start("--paused")
    sets = Sets(directory / "repository", libvirt.inside)
    sets.back_up("libvirt:web01", id="s1")
    domain.destroy()
    sets.back_up("libvirt:web01", id="s2")
    for set_id in ("s1", "s2"):
        assert identical(variables, sets.images("web01", set_id)["nvram"])
        place = directory / "restored"
        beside = {"domain": "define", "domain_name": f"new-{set_id}", "domain_uuid": "new", "overwrite": True}
        wanted = {"repository": str(sets.path), "vm": "web01", "id": set_id, "directory": str(place), **beside}
        done = succeed("backup_restore", wanted, inside=libvirt.inside)
        assert [disk["format"] for disk in done["restored"]] == ["qcow2", "qcow2"]
        assert identical(variables, place / "nvram.qcow2")
        restored = Domain(libvirt, f"new-{set_id}")
        restored.start("--paused")
        restored.destroy()
        libvirt.virsh("undefine", restored.name, "--keep-nvram")
        del wanted["directory"]
        raw = {name: str(place / f"{name}.raw") for name in ("vda", "nvram")}
        disks = [{"name": name, "target": target, "format": "raw"} for name, target in raw.items()]
        told = fail("backup_restore", {**wanted, "disks": disks}, inside=libvirt.inside)["msg"]
        assert told == f"format: {raw['nvram']}: the UEFI variables of this domain are restored in format qcow2"


def test_files_that_a_domain_relies_on_are_not_replaced(
    libvirt: Libvirt, directory: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, device = directory / "vda.qcow2", storage.loop(64 * MIB)
    domain = libvirt.define("web01", DomainDisk(patterned(disk)))
    sets = Sets(directory / "repository", libvirt.inside)
    sets.back_up("libvirt:web01")
    # The domain of the set may be called otherwise by now, and others have disks, too.
    domain.virsh("domrename", "web02")
    domain = Domain(libvirt, "web02")
    shared = f"<disk type='block' device='disk'><source dev='{device}'/><target dev='vdb' bus='virtio'/></disk>"
    other = libvirt.define("web03", DomainDisk(patterned(directory / "other.qcow2")), devices=shared)
    wanted = {"repository": str(sets.path), "vm": "web01", "overwrite": True}
    in_place = {**wanted, "disks": [{"name": "vda", "target": str(disk)}]}
    to_device = {**wanted, "disks": [{"name": "vda", "target": str(device)}]}

    def assert_kept(target: Path, name: str, options: dict[str, t.Any], check: bool = False) -> None:
        before = disk.stat().st_ino, sorted(directory.rglob("*"))
        told = fail("backup_restore", options, check=check, inside=libvirt.inside)["msg"]
        assert f"target: {target} is a file of domain {name}, which has a saved state (virsh managedsave)" in told
        assert f"virsh managedsave-remove {name}" in told
        assert (disk.stat().st_ino, sorted(directory.rglob("*"))) == before

    for one in (domain, other):
        one.start("--paused")
        one.virsh("managedsave")
    assert_kept(disk, "web02", in_place)
    assert_kept(disk, "web02", in_place, check=True)
    assert_kept(device, "web03", to_device)
    # What it builds on is in no definition of a domain that is off.
    for one in (domain, other):
        one.virsh("managedsave-remove")
    copy = restore_module._copy

    async def copy_and_save(*place: t.Any) -> None:
        await copy(*place)
        for words in (("start", "web02", "--paused"), ("managedsave", "web02")):
            subprocess.run(["virsh", *words], check=True, capture_output=True)

    with monkeypatch.context() as patched:
        patched.setattr(restore_module, "_copy", copy_and_save)
        assert_kept(disk, "web02", in_place)
    domain.virsh("managedsave-remove")
    top = directory / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk.name, "-F", "qcow2", top)
    overlay = libvirt.define("web04", DomainDisk(top))
    told = fail("backup_restore", in_place, inside=libvirt.inside)["msg"]
    assert told == (
        f"target: a disk of domain web04 builds on {disk}, and would be spoilt by another file there; restore to"
        " another place"
    )
    overlay.virsh("undefine")
    # Where there is no libvirt, disks are restored, too.
    inode = disk.stat().st_ino
    silent = {**in_place, "libvirt_uri": "qemu+unix:///system?socket=/nowhere"}
    unknown = "nobody knows whether a domain relies on the files that are replaced"
    for target, is_told in ((disk, True), (directory / "new.qcow2", False)):
        options = {**silent, "disks": [{"name": "vda", "target": str(target)}]}
        warnings = succeed("backup_restore", options, check=True, inside=libvirt.inside)["warnings"]
        assert any(warning.startswith(unknown) for warning in warnings) == is_told
    assert succeed("backup_restore", in_place, inside=libvirt.inside)["changed"]
    assert disk.stat().st_ino != inode
    succeed("backup_restore", to_device, inside=libvirt.inside)


def test_libvirtd_is_restarted_in_the_middle_of_the_look_at_the_disks_of_others(
    libvirt: Libvirt, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, other = (patterned(directory / f"{name}.qcow2", size=MIB) for name in ("vda", "other"))
    libvirt.define("web01", DomainDisk(disk))
    libvirt.define("web02", DomainDisk(other))
    sets = Sets(directory / "repository", libvirt.inside)
    sets.back_up("libvirt:web01")
    wanted = {"repository": str(sets.path), "vm": "web01", "overwrite": True}
    wanted["disks"] = [{"name": "vda", "target": str(other)}]
    inode = other.stat().st_ino
    looks = libvirt_host._looks

    restarted: list[int] = []

    def restart_and_look(domain: t.Any) -> t.Any:
        if not restarted:
            restarted.append(restart_in_here())
        return looks(domain)

    with monkeypatch.context() as patched:
        patched.setattr(libvirt_host, "_looks", restart_and_look)
        defined = {**wanted, "domain": "define", "domain_name": "web03", "domain_uuid": "new"}
        told = fail("backup_restore", defined, inside=libvirt.inside)["msg"]
    assert "the connection to libvirt broke off during the look at its domains" in told
    assert other.stat().st_ino == inode
    told = fail("backup_restore", defined, inside=libvirt.inside)["msg"]
    assert told == f"target: {other} is a file of domain web02; restore to another place"
