# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The checksum of a file."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.checksum import READ_SIZE, sha256

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("size", [0, 1, READ_SIZE, 2 * READ_SIZE + 1])
def test_the_whole_file_counts(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "image").write_bytes(content)
    with (tmp_path / "image").open("rb") as image:
        for _again in range(2):
            assert sha256(image.name, image.fileno()) == hashlib.sha256(content).hexdigest()
