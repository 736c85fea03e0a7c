# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains of another libvirt than the default, for which a call gives the repository and their names only."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of
from ansible_collections.vmfleet.backup.tests.harness.turns import Turns

if t.TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

SOCKET = "/run/libvirt/other-sock"
URI = f"qemu+unix:///system?socket={SOCKET}"


@pytest.fixture
def turns(libvirt: Libvirt, directory: Path) -> Iterator[Turns]:
    """A domain that runs. Nobody listens where the default libvirt is expected."""
    found = Turns(libvirt, directory)
    found.domain.start()
    default, other = (libvirt.seen_here(path) for path in ("/run/libvirt/libvirt-sock", SOCKET))
    default.rename(other)
    yield found
    other.rename(default)


def named(turns: Turns, state: str) -> dict[str, t.Any]:
    """Arguments of backup_set for what the repository knows of the domain."""
    return {"repository": str(turns.sets.path), "names": ["web"], "state": state}


@pytest.mark.parametrize("off", [False, True], ids=["running", "off"])
def test_cancelled(turns: Turns, off: bool) -> None:
    if off:
        turns.domain.libvirt.virsh("-c", URI, "destroy", "web")
    plan = turns.plan("s1", speed="64K", libvirt_uri=URI)
    succeed("backup_set", {"plan": plan, "state": "started"}, inside=turns.inside)
    said = succeed("backup_set", named(turns, "cancelled"), inside=turns.inside)
    assert result_of(said, "web")["state"] == "cancelled"
    assert not list(turns.sets.directory("web").glob(".*.staging"))
    turns.assert_released()
    # Nothing of it is in the way of the next one.
    made = turns.make(turns.plan("s2", libvirt_uri=URI))
    assert not result_of(made, "web")["warnings"]


def test_untracked(turns: Turns) -> None:
    turns.make(turns.plan("s1", libvirt_uri=URI))
    said = result_of(succeed("backup_set", named(turns, "untracked"), inside=turns.inside), "web")
    assert said["reason"] == "2 bitmaps removed; the next set is a full one"
    turns.make(turns.plan("s2", libvirt_uri=URI))
    assert turns.sets.levels("web", "s2") == dict.fromkeys(turns.disks, "full")


def test_untracked_of_a_set_that_does_not_tell_its_libvirt(turns: Turns) -> None:
    turns.make(turns.plan("s1", libvirt_uri=URI))
    path = turns.sets.directory("web") / "s1" / "manifest.json"
    path.write_text(path.read_text().replace(URI, ""))
    said = fail("backup_set", named(turns, "untracked"), inside=turns.inside)["msg"]
    assert "give a plan instead of names, which backup_plan has made with libvirt_uri" in said
    plan = turns.plan("s2", libvirt_uri=URI)
    said = result_of(succeed("backup_set", {"plan": plan, "state": "untracked"}, inside=turns.inside), "web")
    assert "2 bitmaps removed" in said["reason"]
