# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshots that libvirt takes, reverts to, deletes and pulls, of both kinds, between our sets and while one is made.

What libvirt can do of this depends on its version; whatever it does, each set is right.
"""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.libvirt import version
from ansible_collections.vmfleet.backup.tests.harness.story import TARGETS, Story

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

INCREMENTAL = dict.fromkeys(TARGETS, "incremental")
FULL = dict.fromkeys(TARGETS, "full")


@pytest.fixture
def story(libvirt: Libvirt, directory: Path) -> Story:
    directory.chmod(0o777)
    # It can be saved with internal snapshots.
    return Story(libvirt, directory, machine="pc")


@pytest.fixture
def is_old() -> bool:
    """Whether it is libvirt 9.0, which reverts to no external snapshot, and takes no internal one beside a job."""
    return version().startswith("9.")


def take(story: Story, name: str) -> None:
    """Take an external snapshot that libvirt remembers."""
    specs = [word for target in TARGETS for word in ("--diskspec", f"{target},file={story.directory}/{name}-{target}")]
    story.domain.virsh("snapshot-create-as", name, "--disk-only", *specs)


def test_inside(story: Story, is_old: bool) -> None:
    domain = story.domain
    plan = story.begin(1)
    if is_old:
        assert "does not support snapshots" in story.refused("snapshot-create-as", "--name", "s")
    else:
        domain.virsh("snapshot-create-as", "s")
    assert domain.state == "running"
    story.write(2)
    assert story.finish(plan)["state"] == "published"
    assert story.back_up(3) == INCREMENTAL
    domain.virsh("snapshot-create-as", "again")
    assert story.back_up(4) == INCREMENTAL
    # The domain is off then: QEMU loads none while there are bitmaps.
    assert "Device has active dirty bitmaps" in story.refused("snapshot-revert", "--snapshotname", "again")
    assert domain.state == "shut off"
    domain.start()
    # libvirt 9.0 has killed a QEMU that had the disks open.
    assert story.back_up(5) == (FULL if is_old else INCREMENTAL)
    domain.virsh("snapshot-delete", "again")
    assert story.back_up(6) == INCREMENTAL
    story.assert_good()


def test_outside(story: Story, is_old: bool) -> None:
    domain = story.domain
    assert story.back_up(1) == FULL
    take(story, "over")
    assert story.back_up(2) == INCREMENTAL
    revert(story, "over", is_old)
    # The new overlay has no bitmap.
    assert story.back_up(3) == (INCREMENTAL if is_old else FULL)
    domain.virsh("snapshot-delete", "over")
    assert story.back_up(4) == INCREMENTAL
    story.assert_good()


def revert(story: Story, name: str, is_old: bool) -> None:
    """Revert to an external snapshot, which may be refused; the domain runs on, or again."""
    if is_old:
        assert "revert to external snapshot not supported" in story.refused("snapshot-revert", "--snapshotname", name)
    else:
        story.domain.virsh("snapshot-revert", name)
        assert story.domain.state == "shut off"
        story.domain.start()
    assert story.domain.state == "running"


def test_outside_while_a_set_is_made(story: Story, is_old: bool) -> None:
    assert story.back_up(1) == FULL
    take(story, "over")
    plan = story.begin(2)
    assert "Need a root block node" in story.refused("snapshot-delete", "--snapshotname", "over")
    revert(story, "over", is_old)
    if is_old:
        assert story.finish(plan)["state"] == "published"
    else:
        # Its QEMU was ended.
        del story.frozen["s2"]
    assert story.back_up(3) == (INCREMENTAL if is_old else FULL)
    # What was refused works afterwards.
    story.domain.virsh("snapshot-delete", "over")
    assert story.back_up(4) == INCREMENTAL
    story.assert_good()


def test_pulled_and_dumped_while_a_set_is_made(story: Story, directory: Path) -> None:
    domain = story.domain
    assert story.back_up(1) == FULL
    story.snapshot("over")
    plan = story.begin(2)
    domain.virsh("dump", directory / "memory", "--memory-only")
    domain.virsh("blockpull", "vda", "--wait")
    assert [job["status"] for job in domain.qmp("query-block-jobs")] == ["running"] * len(TARGETS)
    story.write(3)
    assert story.finish(plan)["state"] == "published"
    assert story.back_up(4) == INCREMENTAL
    domain.virsh("blockpull", "sda", "--wait")
    assert story.back_up(5) == INCREMENTAL
    story.assert_good()
