# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Texts that others read while they are written."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._host import texts

if TYPE_CHECKING:
    from pathlib import Path


def test_a_text_that_a_killed_process_was_writing_goes_with_a_later_one(tmp_path: Path) -> None:
    path = tmp_path / "a.prom"
    old, fresh, other = (tmp_path / name for name in (".a.prom.17.new", ".a.prom.18.new", ".b.prom.17.new"))
    for file in (old, fresh, other):
        file.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    os.utime(other, (time.time() - 7200,) * 2)
    texts.write_text(str(path), "text")
    assert sorted(os.listdir(tmp_path)) == [".a.prom.18.new", ".b.prom.17.new", "a.prom"]
