# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files and devices that users name as targets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files

if TYPE_CHECKING:
    from pathlib import Path


def test_files_and_what_is_missing_are_no_block_devices(tmp_path: Path) -> None:
    image = tmp_path / "x"
    image.touch()
    assert not target_files.is_block_device(str(image))
    assert not target_files.is_block_device(str(image) + ".missing")


def test_a_name_is_too_long_with_what_has_to_stand_beside_it(tmp_path: Path) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = str(tmp_path / ("n" * (most - 4)))
    target_files.check_length("target", path)
    target_files.check_length("target", path, ".new", ".x")
    with pytest.raises(errors.Refused, match=r"^target: .*name is 4 bytes too long\. nnnnnnnn\.\.\.\.partial has"):
        target_files.check_length("target", path, ".new", ".partial")
    with pytest.raises(errors.Refused, match=rf"the name is 1 bytes too long\. a name may have {most} bytes there"):
        target_files.check_length("target", str(tmp_path / ("n" * (most + 1))))


def test_a_device_that_nobody_has_claimed_may_be_used() -> None:
    # Whether one is claimed is looked at with a real device in the integration tests.
    assert target_files.unusable_device("/dev/null") == ""
    assert target_files.unusable_device("/dev/nowhere") == "cannot be written to: No such file or directory"


def test_remove(tmp_path: Path) -> None:
    image = tmp_path / "x"
    image.touch()
    assert target_files.remove(str(image))
    assert not image.exists()
    assert not target_files.remove(str(image))


def test_an_image_is_a_file(tmp_path: Path) -> None:
    image = tmp_path / "x"
    image.write_bytes(b"content")
    (tmp_path / "link").symlink_to("x")
    for path in (image, tmp_path / "link"):
        fd = target_files.open_image(str(path), os.O_RDONLY)
        assert os.read(fd, 7) == b"content"
        os.close(fd)
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a directory")):
        # Nobody waits for who would write into a pipe.
        with pytest.raises(errors.BackupError, match=f"^{path} is {kind}, and not an image; .*move it away"):
            target_files.open_image(str(path), os.O_RDONLY)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        target_files.open_image(str(tmp_path / "missing"), os.O_RDONLY)
