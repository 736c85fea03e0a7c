# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""No set is begun of a domain with which libvirt is at work, and it is said with what."""

from __future__ import annotations

import contextlib
import os
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import fail
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

WEB01 = "libvirt:web01"
SAVE = "busy: libvirt is working on the domain: a save (virsh save, managedsave); wait for its end (virsh domjobinfo)"


@pytest.fixture
def domain(libvirt: Libvirt, directory: Path) -> Domain:
    return libvirt.start("web01", DomainDisk(patterned(directory / "a.qcow2", size=8 * MIB)))


@pytest.fixture
def sets(libvirt: Libvirt, directory: Path) -> Sets:
    return Sets(directory / "repository", libvirt.inside)


@contextlib.contextmanager
def being_saved(domain: Domain, directory: Path) -> t.Iterator[None]:
    """Have libvirt save a domain to where nobody reads it yet."""
    pipe = directory / "pipe"
    os.mkfifo(pipe, 0o666)
    command = domain.libvirt.inside.command("virsh", "save", "web01", pipe)
    with domain.libvirt.inside.for_children():
        save = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with save, pipe.open("rb") as end:
        wait_until(lambda: "Save" in domain.virsh("domjobinfo"), "the job of libvirt")
        yield
        while end.read(MIB):
            pass
        assert save.wait(PATIENCE) == 0


def test_while_it_is_saved(domain: Domain, sets: Sets, directory: Path) -> None:
    before = sets.plan(WEB01)["plan"]
    assert before["vms"][0]["action"] == "start"
    with being_saved(domain, directory):
        [planned] = sets.plan(WEB01)["plan"]["vms"]
        assert (planned["action"], planned["reason"]) == ("fail", SAVE)
        # Also where it has begun since the plan.
        result = fail("backup_set", {"plan": before}, inside=domain.libvirt.inside)
        assert result_of(result, "web01")["error"] == SAVE
        asked = {"monitor": WEB01, "device": "vda", "target": str(directory / "target.qcow2")}
        told = fail("drive_backup", asked, inside=domain.libvirt.inside)["msg"]
        assert told.startswith("VM web01 is busy: libvirt is working on the domain: a save (virsh save, managedsave)")
    assert not sets.directory("web01").exists() or sets.assert_absent("web01") is None
    wait_until(lambda: domain.state == "shut off", "the end of the save")
    domain.start()
    copy = domain.freeze("vda", directory / "copy")
    sets.back_up(WEB01)
    assert identical(copy, sets.images("web01")["vda"])


def test_while_libvirt_makes_a_backup(domain: Domain, sets: Sets, directory: Path) -> None:
    target = create(directory / "pushed.qcow2", 8 * MIB)
    target.chmod(0o666)
    xml = (
        "<domainbackup mode='pull'><server transport='unix' socket='{0}/pull'/><disks><disk name='vda' type='file'>"
        "<scratch file='{0}/scratch'/></disk></disks></domainbackup>"
    )
    directory.chmod(0o777)
    (directory / "backup.xml").write_text(xml.format(directory))
    domain.virsh("backup-begin", directory / "backup.xml")
    [planned] = sets.plan(WEB01)["plan"]["vms"]
    assert planned["action"] == "fail"
    assert planned["reason"].startswith("busy: ")
    assert [disk["name"] for disk in planned["disks"]] == []
    domain.virsh("domjobabort")
    sets.back_up(WEB01)
    assert sets.levels("web01") == {"vda": "full"}
