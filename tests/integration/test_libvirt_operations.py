# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What libvirt itself does with a domain, between our sets and while one is made: each set is right, and libvirt's work
is done, or refused by QEMU without harm."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.story import TARGETS, WEB01, Story

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt


@pytest.fixture
def story(libvirt: Libvirt, directory: Path) -> Story:
    directory.chmod(0o777)
    return Story(libvirt, directory)


def test_between_sets(story: Story, directory: Path) -> None:
    domain = story.domain
    incremental = dict.fromkeys(TARGETS, "incremental")
    assert story.back_up(1) == dict.fromkeys(TARGETS, "full")
    # What leaves the disks alone, and libvirt's own ways to back up.
    domain.virsh("checkpoint-create-as", "--name", "c1")
    (directory / "backup.xml").write_text(
        "<domainbackup><disks>"
        + "".join(f"<disk name='{one}' type='file'><target file='{directory}/pushed-{one}'/></disk>" for one in TARGETS)
        + "</disks></domainbackup>"
    )
    domain.virsh("backup-begin", directory / "backup.xml")
    wait_until(lambda: "Completed" in domain.virsh("domjobinfo", "--completed"), "the backup by libvirt")
    domain.virsh("checkpoint-delete", "--checkpointname", "c1")
    domain.virsh("suspend")
    domain.virsh("blkdeviotune", "vda", "--total-bytes-sec", "100000000")
    assert story.back_up(2) == incremental
    domain.virsh("resume")
    # What changes the layers of a disk.
    story.snapshot("over")
    assert story.back_up(3) == incremental
    domain.virsh("blockcommit", "vda", "--active")
    wait_until(lambda: domain.disk("vda").find("mirror[@ready='yes']") is not None, "the commit")
    [planned] = story.sets.plan(WEB01, id="s4")["plan"]["vms"]
    assert (planned["action"], planned["reason"][:9]) == ("fail", "busy: job")
    domain.virsh("blockjob", "vda", "--pivot")
    domain.virsh("blockpull", "sda", "--wait")
    assert story.back_up(4) == incremental
    domain.virsh("blockcopy", "vda", directory / "moved.qcow2", "--pivot", "--wait", "--transient-job")
    assert story.back_up(5) == incremental
    domain.virsh("blockresize", "vda", "12M")
    assert story.back_up(6) == {"vda": "full", "sda": "incremental"}
    # What ends QEMU, and what only seems to.
    domain.virsh("managedsave")
    domain.start()
    assert story.back_up(7) == incremental
    domain.virsh("save", directory / "state")
    domain.libvirt.virsh("restore", directory / "state")
    definition = domain.virsh("dumpxml", "--inactive")
    domain.virsh("undefine")
    assert story.back_up(8) == incremental
    domain.libvirt.virsh("define", "/dev/stdin", stdin=definition)
    domain.destroy()
    domain.start()
    assert story.back_up(9) == incremental
    story.assert_good()


def test_while_a_set_is_made(story: Story, directory: Path) -> None:
    domain = story.domain
    plan = story.begin(1)
    # libvirt sees no job, and QEMU keeps its own.
    assert "Need a root block node" in story.refused("blockcopy", "vda", directory / "moved.qcow2", "--transient-job")
    assert "resize" in story.refused("blockresize", "vda", "12M")
    story.refused("managedsave")
    assert domain.state == "running"
    story.snapshot("over", but="sda")
    assert "Need a root block node" in story.refused("blockcommit", "vda", "--active", "--pivot", "--wait")
    domain.virsh("checkpoint-create-as", "--name", "c1")
    domain.virsh("checkpoint-delete", "--checkpointname", "c1")
    definition = domain.virsh("dumpxml", "--inactive")
    for command in ("suspend", "resume", "undefine"):
        domain.virsh(command)
    domain.libvirt.virsh("define", "/dev/stdin", stdin=definition)
    story.write(2)
    assert story.finish(plan)["state"] == "published"
    # What was refused works afterwards.
    domain.virsh("blockcommit", "vda", "--active", "--pivot", "--wait")
    assert story.back_up(3) == dict.fromkeys(TARGETS, "incremental")
    # The end of QEMU ends a set, and costs the next one nothing.
    story.begin(4)
    del story.frozen["s4"]
    domain.destroy()
    domain.start()
    assert story.back_up(5) == dict.fromkeys(TARGETS, "incremental")
    story.assert_good()
    found = [node.get("dirty-bitmaps", ()) for node in domain.qmp("query-named-block-nodes", flat=True)]
    assert sum(len(bitmaps) for bitmaps in found) == len(TARGETS)


def test_a_disk_is_detached_while_it_is_copied(story: Story, directory: Path) -> None:
    """libvirt cannot close its image then, and never tries again."""
    domain = story.domain
    story.snapshot("over", but="vda")
    vda = {name for name in story.nodes if name.startswith("libvirt-2-")}
    for number, state in enumerate(("completed", "cancelled"), 1):
        plan = story.begin(number)
        domain.virsh("detach-disk", "sda", "--live")
        assert len(story.nodes) == 6
        told = story.finish(plan, state)
        assert (told["state"], told["warnings"]) == ({"completed": "published"}.get(state, state), [])
        assert story.nodes == vda
        story.attach()
    del story.frozen["s2"]
    # drive_backup finds its copy again, too.
    inside = domain.libvirt.inside
    for state in ("completed", "cancelled"):
        copy, target = domain.freeze("sda", directory / f"{state}-frozen"), directory / f"{state}.qcow2"
        asked = {"monitor": WEB01, "device": "sda", "target": str(target), "speed": "1M"}
        succeed("drive_backup", {**asked, "state": "started"}, inside=inside)
        domain.virsh("detach-disk", "sda", "--live")
        if state == "completed":
            story.release()
        succeed("drive_backup", {**asked, "state": state}, inside=inside)
        assert identical(copy, target) if state == "completed" else not target.exists()
        assert story.nodes == vda
        story.attach()
    assert story.back_up(3) == dict.fromkeys(TARGETS, "incremental")
    story.assert_good()
