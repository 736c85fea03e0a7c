# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the dirty bitmaps that are stored in a qcow2 image, and count what they mark: no tool of QEMU tells that.

Reference: QEMU 7.2, docs/interop/qcow2.txt, "Bitmaps extension".
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from .model import Bitmap
from .qcow2 import read_header

if TYPE_CHECKING:
    from .qcow2 import Header


ENTRY = struct.Struct(">QIIBBHI")
"""Where the table of a bitmap is, its entries, flags, type, granularity bits, length of the name, of further data."""
IN_USE = 0b1
"""Somebody has it in memory, or has died with it."""
RECORDING = 0b10
COMPATIBLE = 0b100
"""Whoever does not know the further data may go on as if they were not there."""
TRACKING = 1
"""The type of a bitmap that marks writes; there is no other."""
GRANULARITY_BITS = range(9, 32)
OFFSET = 0x00FF_FFFF_FFFF_FE00
"""The bits of a table's entry that tell where a cluster of the bitmap is."""
ALL_SET = 0b1
"""What an entry without a cluster says of all bits that would be there; they are clear otherwise."""
MOST = 65535
"""So many bitmaps QEMU stores in an image."""
LONGEST_LIST = MOST * 1024
DAMAGED = "the list of its bitmaps is damaged, or newer than this collection"


def read_bitmaps(fd: int) -> tuple[Bitmap, ...]:
    """Return the bitmaps that are stored in an open image, as QEMU would show them; ValueError for a damaged image.

    One that QEMU would not go on with is inconsistent: of an image that somebody has open for writing, all are.
    """
    header = read_header(fd)
    count, length, place = header.bitmaps
    if count > MOST or length > LONGEST_LIST:
        raise ValueError(DAMAGED)
    listed = _part(fd, length, place)
    found = []
    at = 0
    for _number in range(count):
        if at + ENTRY.size > length:
            raise ValueError(DAMAGED)
        table, entries, flags, kind, bits, name_length, more = ENTRY.unpack_from(listed, at)
        start = at + ENTRY.size + more
        at = start + name_length
        if at > length or kind != TRACKING or bits not in GRANULARITY_BITS:
            raise ValueError(DAMAGED)
        lost = bool(flags & IN_USE) or bool(more and not flags & COMPATIBLE)
        found.append(
            Bitmap(
                name=listed[start:at].decode("utf-8", "surrogateescape"),
                count=0 if lost else _marked(fd, header, table, entries, 1 << bits),
                granularity=1 << bits,
                recording=bool(flags & RECORDING) and not lost,
                busy=False,
                persistent=True,
                inconsistent=lost,
            )
        )
        at += -at % 8
    return tuple(found)


def _marked(fd: int, header: Header, table: int, entries: int, granularity: int) -> int:
    """Return how many bytes of the disk a bitmap marks, in whole pieces of its granularity."""
    cluster = 1 << header.cluster_bits
    pieces = -(-header.size // granularity)
    in_cluster = cluster * 8
    if entries != -(-pieces // in_cluster):
        raise ValueError(DAMAGED)
    marked = 0
    for number, (entry,) in enumerate(struct.iter_unpack(">Q", _part(fd, 8 * entries, table))):
        here = min(in_cluster, pieces - number * in_cluster)
        if entry & OFFSET:
            content = _part(fd, -(-here // 8), entry & OFFSET)
            marked += min(here, bin(int.from_bytes(content, "little")).count("1"))
        elif entry & ALL_SET:
            marked += here
    return marked * granularity


def _part(fd: int, length: int, place: int) -> bytes:
    """Read a part of an image; ValueError where there is none."""
    content = os.pread(fd, length, place) if place < 1 << 63 else b""
    if len(content) < length:
        raise ValueError(DAMAGED)
    return content
