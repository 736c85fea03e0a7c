# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Give back the space of clusters that an image has, and that read as zeroes: it was laid out for data that was none.

Where they stand in the file a hole takes their place. The tables stay as they are.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from typing import TYPE_CHECKING

from .._host.preallocate import punch_hole
from .image_lock import is_locked
from .qcow2 import COMPRESSED, COPIED, HARMLESS, OFFSET, ZERO, read_header
from .qemu_img import by_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_TABLES = 1 << 22
"""Entries of the longest first table that QEMU reads."""


def give_back(fd: int) -> None:
    """Make holes of the clusters of an image that read as zeroes.

    One that a QEMU has open stays as it is, for not all that its tables say need stand in the file; so does one whose
    tables cannot be understood.
    """
    if is_locked(by_descriptor(fd)):
        return
    try:
        cluster_bits, tables = _tables(fd)
    except (ValueError, struct.error):
        return
    for start, end in _runs(fd, tables, 1 << cluster_bits):
        if not punch_hole(fd, start, end - start):
            return


def _tables(fd: int) -> tuple[int, list[int]]:
    """Return the bits of the image's clusters, and where its second tables are."""
    header = read_header(fd)
    count, place = header.table
    if header.features & ~HARMLESS or header.encrypted or count > MOST_TABLES:
        raise ValueError("an image of another kind")
    entries = struct.unpack(f">{count}Q", os.pread(fd, 8 * count, place))
    return header.cluster_bits, [entry & OFFSET for entry in entries if entry & OFFSET]


def _runs(fd: int, tables: list[int], cluster: int) -> Iterator[tuple[int, int]]:
    """Return where clusters that read as zeroes begin in the file, and where they end: neighbours together."""
    start = end = 0
    for place in tables:
        for spare in _spare(os.pread(fd, cluster, place), cluster):
            if spare != end:
                if end:
                    yield start, end
                start = spare
            end = spare + cluster
    if end:
        yield start, end


def _spare(table: bytes, cluster: int) -> list[int]:
    """Return where the clusters are that a second table has, and that read as zeroes."""
    # Most tables tell of data only, or of zeroes that have no cluster.
    if len(table) < cluster or ZERO not in table[7::8] or table == ZERO.to_bytes(8, "big") * (cluster // 8):
        return []
    entries = array("Q", table)
    if sys.byteorder == "little":
        entries.byteswap()
    # All that is below a cluster's place, and what else an entry can say: zero, and used here only.
    rest = cluster - 1 | COMPRESSED | COPIED
    return [entry & OFFSET for entry in entries if entry & OFFSET and entry & rest == COPIED | ZERO]
