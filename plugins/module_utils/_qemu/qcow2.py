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
FIXED = struct.Struct(">4sIQIIQIIQ24xQ20xI")
"""Magic, version, where the backing file's name is, its length, cluster bits, size, encryption, length of the first
table, where it is; and of version 3, what a program has to know to read the image, and the header's own length."""
CLUSTER_BITS = range(9, 22)
LONGEST_NAME = 1023
OLD_LENGTH = 72
"""Bytes of a header of version 2."""
HARMLESS = 0b1001
"""Not closed properly (its own counters may be wrong), and another compression than zlib: the tables are as ever."""
DATA_FILE = 0b100
"""The data are in another file."""
EXTENSION = struct.Struct(">II")
BACKING_FORMAT_NAME = 0xE2792ACA
DATA_FILE_NAME = 0x44415441
DAMAGED = "its header is damaged, or newer than this collection"


@dataclass(frozen=True)
class Header:
    """What an image says of itself. C(size) is the disk's, in bytes; C(table) is the length and place of its first one.

    C(features) are those that a program has to know. A name is None where the header has none.
    """

    cluster_bits: int
    size: int
    encrypted: bool
    features: int
    table: tuple[int, int]
    backing: str | None
    backing_format: str | None
    data_file: str | None


def read_header(fd: int) -> Header:
    """Read the header of an open image; ValueError where it is none of qcow2, or a damaged one."""
    fixed = os.pread(fd, FIXED.size, 0)
    if len(fixed) < FIXED.size or fixed[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin as a qcow2 image does")
    version, at, name_length, bits, size, encryption, count, table, features, length = FIXED.unpack(fixed)[1:]
    if version == 2:
        features, length = 0, OLD_LENGTH
    if version not in (2, 3) or bits not in CLUSTER_BITS or name_length > LONGEST_NAME:
        raise ValueError(DAMAGED)
    end = at or 1 << bits
    if not OLD_LENGTH <= length <= end <= 1 << bits:
        raise ValueError(DAMAGED)
    names = _extensions(os.pread(fd, end - length, length))
    return Header(
        cluster_bits=bits,
        size=size,
        encrypted=bool(encryption),
        features=features,
        table=(count, table),
        backing=_name(os.pread(fd, name_length, at)) if at and name_length else None,
        backing_format=names.get(BACKING_FORMAT_NAME),
        data_file=names.get(DATA_FILE_NAME, "" if features & DATA_FILE else None),
    )


def _extensions(area: bytes) -> dict[int, str]:
    """Return the content of each extension of a header, by type; the area ends with them, or with one of type zero."""
    found: dict[int, str] = {}
    at = 0
    while at + EXTENSION.size <= len(area):
        kind, length = EXTENSION.unpack_from(area, at)
        at += EXTENSION.size
        if kind == 0:
            break
        if length > len(area) - at:
            raise ValueError(DAMAGED)
        found[kind] = _name(area[at : at + length])
        at += -(-length // 8) * 8
    return found


def _name(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
