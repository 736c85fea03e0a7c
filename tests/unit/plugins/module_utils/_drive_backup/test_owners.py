# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The owners of the jobs of a VM, which are kept in the file of its lock."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.owners import read_owners, write_owners

if TYPE_CHECKING:
    from pathlib import Path


def test_owners_of_a_vm_that_nobody_has_locked(tmp_path: Path) -> None:
    assert read_owners(str(tmp_path / "lock")) == {}


def test_owners_of_a_vm_without_jobs_of_ours(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert read_owners(str(tmp_path / "lock")) == {}


def test_owners_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for owners in ({"a": "me", "bä": "you"}, {"a": "me"}, {}):
        # A shorter text leaves nothing of the longer one before.
        write_owners(fd, owners)
        assert read_owners(str(path)) == owners
    os.close(fd)
