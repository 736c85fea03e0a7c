# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What qemu-img says of images."""

from __future__ import annotations

from ansible_collections.vmfleet.backup.plugins.module_utils._verify.image_check import shorten


def test_long_complaints_are_cut() -> None:
    assert shorten("one\n\ntwo") == "one / two"
    assert shorten("\n".join("abcde")) == "a / b / c and 2 more lines"
