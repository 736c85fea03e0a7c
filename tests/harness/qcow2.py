# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reads the tables of a qcow2 image, one entry after the other, as docs/interop/qcow2.txt of QEMU says.

It shares no code with the collection, nor with qemu-img.
"""

from __future__ import annotations

import collections
import dataclasses
import struct
import typing as t

if t.TYPE_CHECKING:
    from pathlib import Path

HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
ZERO = 1


@dataclasses.dataclass(frozen=True)
class Tables:
    """What the tables of an image say. `data` is the place of each cluster that has one, and `zero` are those without.

    `used` is how often the image itself uses each of its clusters, `counted` what its refcounts say of that.
    """

    size: int
    cluster: int
    data: dict[int, int]
    zero: set[int]
    used: dict[int, int]
    counted: dict[int, int]


def read_tables(image: Path) -> Tables:
    """Read all tables of an image that has no snapshots and nothing compressed."""
    with image.open("rb") as file:

        def entries(offset: int, count: int, width: str = "Q") -> list[int]:
            file.seek(offset)
            return list(struct.unpack(f">{count}{width}", file.read(struct.calcsize(f">{count}{width}"))))

        fields = HEADER.unpack(file.read(HEADER.size))
        assert fields[:3] == (b"QFI\xfb", 3, 0)
        assert fields[6] == 0, "it is encrypted"
        assert fields[11:15] == (0, 0, 0, 0), "it has snapshots, or features that must be known"
        bits, size, l1_size, l1_at, refcounts, refcount_clusters = (*fields[4:6], *fields[7:11])
        cluster = 1 << bits
        used = collections.Counter([0])
        for first, count in ((refcounts, refcount_clusters), (l1_at, -(-l1_size * 8 // cluster))):
            assert first % cluster == 0
            used.update(first // cluster + number for number in range(count))
        assert fields[16] == 4
        counted: dict[int, int] = {}
        per_block = cluster // 2
        for number, block in enumerate(entries(refcounts, refcount_clusters * cluster // 8)):
            if block:
                used[block // cluster] += 1
                found = enumerate(entries(block, per_block, "H"))
                counted.update((number * per_block + at, count) for at, count in found if count)
        data, zero = {}, set()
        for number, l1_entry in enumerate(entries(l1_at, l1_size)):
            if not l1_entry:
                continue
            assert l1_entry & ~OFFSET == COPIED
            used[(l1_entry & OFFSET) // cluster] += 1
            for at, entry in enumerate(entries(l1_entry & OFFSET, cluster // 8)):
                guest = number * (cluster // 8) + at
                if entry & ZERO:
                    zero.add(guest)
                if entry & OFFSET:
                    assert entry & ~OFFSET & ~ZERO == COPIED
                    data[guest] = entry & OFFSET
                    used[(entry & OFFSET) // cluster] += 1
    return Tables(size, cluster, data, zero, used, counted)
