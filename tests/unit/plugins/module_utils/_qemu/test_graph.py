# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What QEMU's nodes are made of. How they are put together, the tests of what is read from them show."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import graph


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("/b/x.raw", False),
        ('json:{"driver": "raw", "file": {"driver": "rbd", "pool": "p", "image": "i"}}', False),
        ('json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/b/x"}}', True),
        # QEMU cuts a name of 4096 bytes short.
        ('json:{"driver": "raw", "file": {"driver": "rbd", "server": [{"ho...', True),
    ],
)
def test_whether_a_raw_node_shows_a_part_of_its_file(name: str, window: bool) -> None:
    assert graph._is_window({"drv": "raw", "image": {"filename": name}}) is window
