# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore of an overlay where something else stands, or one that reads nothing any more."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import create, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.library import SIZE, Chain, Library
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk

if t.TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("clean")


def test_another_file_with_the_inode_of_an_overlay(chain: Chain, where: Path) -> None:
    look, other = where / "look", where / "other"
    given: dict[str, t.Any] = {"id": "s2", "method": "overlay", "disks": one_disk(look)}
    chain.library.restore(**given)
    inode = look.stat().st_ino
    base = create(where / "golden.qcow2", SIZE)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", other)
    # As a new file often gets that of one that was removed.
    look.write_bytes(other.read_bytes())
    assert look.stat().st_ino == inode
    assert "exists, and this restore has not written it" in chain.library.fail_restore(**given)


def test_an_overlay_whose_repository_has_moved(chain: Chain, where: Path) -> None:
    given: dict[str, t.Any] = {"id": "s2", "method": "overlay", "disks": one_disk(where / "look")}
    chain.library.restore(**given)
    moved = Library(chain.library.path.rename(chain.library.path.with_name("moved")))
    # Nothing can be read from it any more.
    assert "exists, and this restore has not written it" in moved.fail_restore(**given)
