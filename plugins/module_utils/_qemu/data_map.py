# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask qemu-img where a disk has data, and lay out the image of its full copy accordingly.

It reads the images as they are on storage. What a VM has written and not flushed it does not see: that costs order.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .._common.errors import ToolError
from . import qemu_img
from .disk_file import QCOW2
from .image_commands import map_command
from .image_layout import DataMap, ImageLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .model import Disk


LONGEST_LINE = 1 << 16
"""Bytes. qemu-img says what there is to say of a part of a disk in one line."""


async def lay_out(chain: Sequence[Disk]) -> ImageLayout | None:
    """Return how the image of a full copy of a disk is laid out; None where that is left to QEMU.

    C(chain) are the layers of the disk, the top one first. It is left to QEMU where nothing tells what has data: of
    disks on the network, of what only QEMU can open, or is too long in coming, of a disk in too many parts, and of one
    that is data throughout as far as its storage can tell, which need not know of zeroes.
    """
    disk = chain[0]
    # A server of which QEMU cannot tell the size may take one client only, and would let it wait.
    if not disk.filename.startswith("/") or disk.actual_size is None:
        return None
    reader = _MapReader(DataMap(disk.virtual_size))
    try:
        await qemu_img.run_reading(map_command(disk.filename, disk.driver, shared=True), reader.take)
        reader.end()
    except (ToolError, ValueError, LookupError, TypeError):
        return None
    data = reader.data
    if not data.clusters or (data.is_whole and any(layer.driver != QCOW2 for layer in chain)):
        return None
    return ImageLayout(data)


class _MapReader:
    """Reads what C(qemu-img map) prints, as it comes: an array, with a line for each part of the disk."""

    def __init__(self, data: DataMap) -> None:
        self.data = data
        self._rest = b""

    def take(self, output: bytes) -> None:
        """Read the lines that are whole by now."""
        lines, end, self._rest = (self._rest + output).rpartition(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise ValueError("a line without an end")
        if end:
            self._read(lines)

    def end(self) -> None:
        """Read what is left."""
        self._read(self._rest)

    def _read(self, lines: bytes) -> None:
        # Each line is a part of the array: the first one begins it, and the last one ends it.
        for part in json.loads(b"[" + lines.strip(b"[], \n") + b"]"):
            if part["data"] and not part["zero"]:
                self.data.add(part["start"], part["length"])
