# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How an image is brought to stable storage, without QEMU."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.finish import finish_image
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import StagedDisk
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = image()


def test_a_finished_image_is_flushed_and_summed(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"abc" * 1000)
    disk = StagedDisk(IMAGE, "job0", 1, os.stat(path).st_ino)
    done = finish_image(str(path), disk, checksum=True)
    assert (done.bytes, done.sha256) == (3000, hashlib.sha256(b"abc" * 1000).hexdigest())
    assert finish_image(str(path), disk, checksum=False).sha256 is None


def test_an_image_that_was_replaced_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"abc")
    with pytest.raises(BackupError, match="not the file"):
        finish_image(str(path), StagedDisk(IMAGE, "job0", 1, os.stat(path).st_ino + 1), checksum=True)


def test_without_an_fd_from_before_the_job_the_image_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"abc")
    disk = StagedDisk(IMAGE, "job0", 1, os.stat(path).st_ino)

    def fail(found: str, _fd: int) -> str:
        raise OSError(5, "Input/output error", found)

    monkeypatch.setattr(finish, "sha256", fail)
    with path.open("rb+") as held:
        assert finish_image(str(path), disk, False, held.fileno()).sha256 is None
    with pytest.raises(OSError, match="Input/output"):
        finish_image(str(path), disk, checksum=False)
