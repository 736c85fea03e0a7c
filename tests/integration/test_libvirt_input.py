# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains that are not what they were, odd ones, hosts that lack something: what goes on, and what is to be done."""

from __future__ import annotations

import sys
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned, write
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain, DomainDisk, domain_xml
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

SOCKET = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"
# What somebody may have in a path.
ODD = "a, b=c:d;e 'f\" <g>&h \\i %j ,,k#l?m=é json:{}"


@pytest.fixture
def sets(libvirt: Libvirt, directory: Path) -> Sets:
    return Sets(directory / "repository", libvirt.inside)


@pytest.fixture
def disk(directory: Path) -> Path:
    return patterned(directory / "web.qcow2", size=8 * MIB)


@pytest.fixture
def domain(libvirt: Libvirt, disk: Path) -> Domain:
    """A domain that is off."""
    return libvirt.define("web", DomainDisk(disk))


def reason(sets: Sets, *vms: str, **options: t.Any) -> tuple[str, str]:
    """What is planned for the first VM."""
    planned = sets.plan(*vms, **options)["plan"]["vms"][0]
    return planned["action"], planned["reason"]


def test_a_domain_that_was_renamed(domain: Domain, sets: Sets, disk: Path) -> None:
    uuid = domain.uuid
    sets.back_up("libvirt:web")
    domain.virsh("domrename", "shop")
    write(disk, "write -P 1 0 64k")
    told = (
        f"libvirt:web: libvirt has no domain of this name, and the one that had it ({uuid}) is shop now. To continue"
        " its sets, list it as name: web, monitor: libvirt:shop; to begin new ones, name it shop"
    )
    assert reason(sets, "libvirt:web", domains=["*"], id="s2") == ("fail", told)
    # Both of what is said there.
    sets.back_up(vms=[{"name": "web", "monitor": "libvirt:shop"}], domains=["*"], id="s2")
    warned = (
        f"VM shop: this VM (uuid {uuid}) has older sets under the name web, and its sets under this name begin with"
        " full images. To continue the older sets, list the VM as name: web, monitor: libvirt:shop. Otherwise remove"
        " them when nobody needs them any more"
    )
    assert warned in sets.plan(vms=[], domains=["*"], id="s3")["warnings"]
    sets.back_up(vms=[], domains=["*"], id="s3")
    assert warned not in sets.plan(vms=[], domains=["*"], id="s4")["warnings"]
    assert (sets.levels("web", "s2"), sets.levels("shop", "s3")) == ({"vda": "incremental"}, {"vda": "full"})
    for name, set_id in (("web", "s2"), ("shop", "s3")):
        assert identical(disk, sets.images(name, set_id)["vda"])


def test_a_domain_with_another_uuid(domain: Domain, sets: Sets, libvirt: Libvirt, disk: Path) -> None:
    old = domain.uuid
    sets.back_up("libvirt:web")
    domain.virsh("undefine")
    domain = libvirt.define("web", DomainDisk(disk))
    told = (
        f"the directory belongs to another VM of this name ({old}, set s1; this one is {domain.uuid}). Give one of"
        " them another name; if this VM replaces the other, adopt: true continues in this directory, with a full set"
    )
    assert reason(sets, "libvirt:web", id="s2") == ("fail", told)
    domain.start("--paused")
    assert reason(sets, "libvirt:web", id="s2") == ("fail", told)
    plan = sets.plan("libvirt:web", id="s2", adopt=True)["plan"]
    succeed("backup_set", {"plan": plan, "adopt": True}, inside=libvirt.inside)
    assert sets.levels("web", "s2") == {"vda": "full"}
    assert sets.manifest("web", "s2")["vm"]["uuid"] == domain.uuid


def test_odd_paths_and_a_disk_without_a_format(libvirt: Libvirt, directory: Path) -> None:
    place = directory / ODD
    target = place / f"{ODD}-restored"
    target.mkdir(parents=True)
    sets = Sets(place / "repository", libvirt.inside)
    disks = {
        "vda": (patterned(place / f"{ODD}.qcow2", size=MIB), "qcow2"),
        "vdb": (patterned(place / f"{ODD}.raw", "raw", size=MIB, seed=7), "raw"),
    }
    xml = domain_xml("web", *(DomainDisk(path, name, format=fmt) for name, (path, fmt) in disks.items()))
    # libvirt takes it for raw, and so do we.
    assert " type='raw'" in xml
    domain = libvirt.define("web", xml=xml.replace(" type='raw'", ""))
    sets.back_up("libvirt:web")
    domain.start("--paused")
    sets.back_up("libvirt:web", id="s2")
    wanted = {"directory": str(target), "domain": "define", "domain_name": "web02", "domain_uuid": "new"}
    succeed("backup_restore", {"repository": str(sets.path), "vm": "web", **wanted}, inside=libvirt.inside)
    for name, (path, fmt) in disks.items():
        for image in (sets.images("web")[name], sets.images("web", "s2")[name], target / f"{name}.qcow2"):
            assert identical(path, image, fmt)
    restored = Domain(libvirt, "web02")
    restored.start("--paused")
    assert restored.image("vdb") == (target / "vdb.qcow2", "qcow2")


@pytest.mark.usefixtures("domain")
def test_no_binding(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    remedy = "install the package python3-libvirt (the role vmfleet.backup.hypervisor does), and let Ansible use"
    said = fail("backup_plan", sets.arguments(vms=[], domains=["*"]), inside=sets.inside)["msg"]
    assert said.startswith("domains: qemu:///system: libvirt's Python binding cannot be imported by ")
    assert remedy in said
    action, said = reason(sets, "libvirt:web")
    assert action == "fail"
    assert remedy in said
    assert not sets.path.exists()


def test_another_uri_of_the_same_libvirt(domain: Domain, sets: Sets, disk: Path) -> None:
    domain.start("--paused")
    sets.start("libvirt:web", speed="64K")
    for job in domain.qmp("query-block-jobs"):
        domain.qmp("block-job-set-speed", device=job["device"], speed=0)
    result = sets.back_up("libvirt:web", libvirt_uri=SOCKET)
    assert result_of(result, "web")["state"] == "published"
    sets.back_up("libvirt:web", libvirt_uri=SOCKET, id="s2")
    assert sets.levels("web", "s2") == {"vda": "incremental"}
    assert identical(disk, sets.images("web", "s2")["vda"])
