# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How an image is brought to stable storage, without QEMU."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.finish import finish_image
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import WrongEntry
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import begin, intent

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent, StagedDisk
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

CONTENT = b"abc" * 1000


class Growing:
    """A set whose one image is written."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        made = intent()
        begin(repository, made)
        self.path = Path(repository.image_path(made, made.disks[0].image.image))
        self.path.write_bytes(CONTENT)
        self.intent = replace(made, disks=(replace(made.disks[0], inode=os.stat(self.path).st_ino),))

    @property
    def disk(self) -> StagedDisk:
        return self.intent.disks[0]

    @property
    def unchecked(self) -> Intent:
        """The same without checksums."""
        return replace(self.intent, checksum=False)


@pytest.fixture
def growing(repository: Repository) -> Growing:
    return Growing(repository)


def test_a_finished_image_is_flushed_and_summed(growing: Growing) -> None:
    done = finish_image(growing.repository, growing.intent, growing.disk)
    assert (done.bytes, done.sha256) == (3000, hashlib.sha256(CONTENT).hexdigest())
    assert finish_image(growing.repository, growing.unchecked, growing.disk).sha256 is None


def test_an_image_that_was_replaced_is_not_ours(growing: Growing) -> None:
    with pytest.raises(BackupError, match=f"{growing.path} is not the file"):
        finish_image(growing.repository, growing.intent, replace(growing.disk, inode=growing.disk.inode + 1))


@pytest.mark.parametrize("place", [".", "..", "drive"])
def test_no_link_is_followed_to_an_image(growing: Growing, tmp_path: Path, place: str) -> None:
    """Not even to the image itself, which somebody may have moved."""
    moved = growing.path if place == "drive" else (growing.path.parent / place).resolve()
    moved.rename(tmp_path / "moved")
    moved.symlink_to(tmp_path / "moved")
    assert growing.path.read_bytes() == CONTENT
    with pytest.raises(WrongEntry, match=f"{moved} is a symbolic link"):
        finish_image(growing.repository, growing.intent, growing.disk)


def test_without_an_fd_from_before_the_job_the_image_is_read_back(
    growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(found: str, _fd: int) -> str:
        raise OSError(5, "Input/output error", found)

    monkeypatch.setattr(finish, "sha256", fail)
    with growing.path.open("rb+") as held:
        assert finish_image(growing.repository, growing.unchecked, growing.disk, held.fileno()).sha256 is None
    with pytest.raises(OSError, match="Input/output"):
        finish_image(growing.repository, growing.unchecked, growing.disk)
