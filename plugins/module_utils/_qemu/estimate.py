# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Estimate how many bytes the image of a disk will take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import ToolError
from .._common.redaction import REMOVED
from . import qemu_img
from .qemu_img import CLUSTER

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .model import Bitmap, Disk


FIRST_TABLE = 1 << 26
"""Bytes of a disk for which there is one byte in a qcow2 image's first table, full or not."""


async def expected_bytes(
    disk: Disk, image_format: str, sync: str = "full", bitmap: str = "", before: int = 0, counted: int | None = None
) -> int:
    """Return the most that a backup of C(disk) will write, in bytes.

    It is the larger of what qemu-img measures and what the images hold, as qemu-img does not see writes that QEMU has
    not flushed; plus one percent, and at most the fully allocated size. What it was C(before), if that is known, is not
    measured again. Nor is one whose layers were C(counted), and hold no more by their tables than their images do.
    """
    if image_format == "raw":
        return disk.virtual_size
    everything = _fully_allocated(disk.virtual_size)
    tracked = disk.bitmap(bitmap) if bitmap else None
    if sync in ("incremental", "bitmap") and tracked:
        return increment_bytes(disk, (tracked,))
    if sync == "top":
        held: int | None = disk.layer_size
    else:
        held = disk.actual_size
        is_known = counted is not None and held is not None and counted <= held
        # Of what QEMU cannot tell the size, as on the network, the measure would be of no use; and a server that takes
        # one client only would let it wait.
        measured = None if before or is_known or held is None else await _measured(disk)
        if measured and held is not None:
            # All tables are in that: QEMU gives them to the image of a full backup, however little is on the disk.
            before = min(measured["fully-allocated"], _with_spare(measured["required"]) + _metadata(0))
            everything = measured["fully-allocated"]
    if held is None:
        return everything
    return max(before, min(everything, _with_spare(held) + _metadata(disk.virtual_size)))


def _with_spare(held: int) -> int:
    return held + held // 100


def increment_bytes(disk: Disk, records: Iterable[Bitmap]) -> int:
    """Return the most bytes that an increment of what these bitmaps of C(disk) have marked together will take."""
    # The least write that a fine bitmap marks can cost a whole cluster.
    marked = sum(bitmap.count // bitmap.granularity * max(CLUSTER, bitmap.granularity) for bitmap in records)
    # Only what is written has tables, in the worst case one for each cluster.
    tables = min(_metadata(disk.virtual_size), marked + _metadata(0) + disk.virtual_size // FIRST_TABLE)
    return min(_fully_allocated(disk.virtual_size), _fully_allocated(marked) + tables)


async def _measured(disk: Disk) -> Any:
    """Return what qemu-img measures; None for a network disk or a json: file name, which only QEMU itself can open."""
    if REMOVED in disk.filename:
        return None
    try:
        return await qemu_img.run_json(qemu_img.measure_command(disk.filename, disk.driver, "qcow2"))
    except ToolError:
        return None


def _metadata(virtual_size: int) -> int:
    """Return the most that qcow2's own tables take for an image of this size with nothing in it."""
    return 16 * CLUSTER + virtual_size // CLUSTER * 8


def _fully_allocated(size: int) -> int:
    clusters = -(-size // CLUSTER)
    return clusters * CLUSTER + _metadata(size) + clusters * 16
