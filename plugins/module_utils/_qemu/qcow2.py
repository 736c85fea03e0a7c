# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the header of a qcow2 image, and follow nothing that it names.

Reference: QEMU 7.2, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"
FIXED = struct.Struct(">4sIQIIQIIQ24xQ8xQ4xI")
"""Magic, version, where the backing file's name is, its length, cluster bits, size, encryption, length of the first
table, where it is; and of version 3, what a program has to know to read the image, which extensions it is to be trusted
about, and the header's own length."""
CLUSTER_BITS = range(9, 22)
LONGEST_NAME = 1023
OLD_LENGTH = 72
"""Bytes of a header of version 2."""
HARMLESS = 0b1001
"""Not closed properly (its own counters may be wrong), and another compression than zlib: the tables are as ever."""
DATA_FILE = 0b100
"""The data are in another file."""
TRUSTED_BITMAPS = 0b1
"""Whoever has written to the image last knew of its bitmaps. A program that did not has taken this bit away."""
EXTENSION = struct.Struct(">II")
BITMAPS = 0x23852875
BITMAP_DIRECTORY = struct.Struct(">I4xQQ")
"""How many bitmaps there are; length and place of the list that names them."""
BACKING_FORMAT_NAME = 0xE2792ACA
DATA_FILE_NAME = 0x44415441
OFFSET = 0x00FF_FFFF_FFFF_FE00
"""The bits of an entry of a table that tell where the next table is, or the data."""
COPIED = 1 << 63
"""Nothing else uses what is there: it is written in place."""
COMPRESSED = 1 << 62
"""The entry is of another kind, which tells of compressed data."""
ZERO = 1
"""The cluster reads as zeroes, whatever is there."""
DAMAGED = "its header is damaged, or newer than this collection"


@dataclass(frozen=True)
class Header:
    """What an image says of itself. C(size) is the disk's, in bytes; C(table) is the length and place of its first one.

    C(features) are those that a program has to know. A name is None where the header has none. C(bitmaps) is how many
    are stored that can be trusted, and the length and place of their list.
    """

    cluster_bits: int
    size: int
    encrypted: bool
    features: int
    table: tuple[int, int]
    backing: str | None
    backing_format: str | None
    data_file: str | None
    bitmaps: tuple[int, int, int] = (0, 0, 0)


def read_header(fd: int) -> Header:
    """Read the header of an open image; ValueError where it is none of qcow2, or a damaged one."""
    fixed = os.pread(fd, FIXED.size, 0)
    if len(fixed) < FIXED.size or fixed[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin as a qcow2 image does")
    version, at, name_length, bits, size, encryption, count, table, features, trusted, length = FIXED.unpack(fixed)[1:]
    if version == 2:
        features, trusted, length = 0, 0, OLD_LENGTH
    if version not in (2, 3) or bits not in CLUSTER_BITS or name_length > LONGEST_NAME:
        raise ValueError(DAMAGED)
    end = at or 1 << bits
    if not OLD_LENGTH <= length <= end <= 1 << bits:
        raise ValueError(DAMAGED)
    found = _extensions(os.pread(fd, end - length, length))
    names = {kind: _name(content) for kind, content in found.items()}
    bitmaps = found.get(BITMAPS, b"") if trusted & TRUSTED_BITMAPS else b""
    return Header(
        cluster_bits=bits,
        size=size,
        encrypted=bool(encryption),
        features=features,
        table=(count, table),
        backing=_name(os.pread(fd, name_length, at)) if at and name_length else None,
        backing_format=names.get(BACKING_FORMAT_NAME),
        data_file=names.get(DATA_FILE_NAME, "" if features & DATA_FILE else None),
        bitmaps=BITMAP_DIRECTORY.unpack(bitmaps) if len(bitmaps) == BITMAP_DIRECTORY.size else (0, 0, 0),
    )


def _extensions(area: bytes) -> dict[int, bytes]:
    """Return the content of each extension of a header, by type; the area ends with them, or with one of type zero."""
    found: dict[int, bytes] = {}
    at = 0
    while at + EXTENSION.size <= len(area):
        kind, length = EXTENSION.unpack_from(area, at)
        at += EXTENSION.size
        if kind == 0:
            break
        if length > len(area) - at:
            raise ValueError(DAMAGED)
        found[kind] = area[at : at + length]
        at += -(-length // 8) * 8
    return found


def _name(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
