# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check images with qemu-img."""

from __future__ import annotations

import json

COMPLAINTS = 3
"""Lines of qemu-img check that are told; there may be one for each cluster."""


# All commands ignore locks (-U): nobody writes to a published image, but the QEMU that has made it may still have it
# open. While its VM is paused, it does.


def check_command(path: str, image_format: str) -> list[str]:
    """Check one image. What it builds on is not opened: that has its own look."""
    image = {"driver": image_format, "backing": None, "file": {"driver": "file", "filename": path}}
    return ["qemu-img", "check", "-q", "-U", "--", "json:" + json.dumps(image)]


def shorten(text: str) -> str:
    lines = [line for line in text.splitlines() if line]
    more = len(lines) - COMPLAINTS
    return " / ".join(lines[:COMPLAINTS]) + (f" and {more} more lines" if more > 0 else "")
