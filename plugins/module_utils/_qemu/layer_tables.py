# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Count what the layers of a disk hold, by the tables of their images.

C(qemu-img measure) tells more, and opens each layer with all that QEMU has for an image: for a disk with many snapshots
that takes longer than all else that is done to plan its backup. What is counted here is never less: clusters below
others that are zero are counted, and those that are holes in the image's file. Neither sees what QEMU has not flushed:
whoever asks compares with the size of the files, which grow before.

Reference: QEMU 7.2, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import threading
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from .._host.threads import within
from .qcow2 import HARMLESS, OFFSET, read_header
from .qemu_img import CLUSTER, TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .model import Disk


CLUSTER_BITS = 16
ENTRIES = CLUSTER // 8
"""Entries of a second table. Each is for one cluster of the disk."""
MOST_TABLES = 1 << 15
"""Entries of the first table of a disk of 16 TiB; larger ones are for qemu-img, which reads them faster."""
_one_at_a_time = threading.Lock()
"""Each count has all layers of a disk open, of which there may be hundreds."""
_hangs = threading.Event()
"""Set once a count has not ended in time. The others would wait as long behind it, one after the other."""


@dataclass(frozen=True)
class _Layer:
    """An open image, and where its second tables are, by number."""

    fd: int
    tables: dict[int, int]

    def held(self, number: int) -> int:
        """Return the bytes of C(ENTRIES) entries as one integer: not zero for each cluster that the layer holds."""
        if number not in self.tables:
            return 0
        table = os.pread(self.fd, CLUSTER, self.tables[number])
        if len(table) < CLUSTER:
            raise ValueError(f"table {number} is cut short")
        # Where the data are, and whether they are compressed. The last two bytes tell of a cluster that is zero.
        return reduce(or_, (int.from_bytes(table[place::8], "big") for place in range(6)))


async def held_bytes(chain: Sequence[Disk]) -> int | None:
    """Return the bytes of a disk for which any layer of C(chain) has data, counted in whole clusters.

    The top layer comes first. None where it cannot be told: for images that are not qcow2 with clusters as QEMU makes
    them if nobody asks for others, or that are not to be read here, or not now.
    """
    is_plain = all(layer.driver == "qcow2" and layer.filename.startswith("/") for layer in chain)
    if not is_plain or chain[-1].backing_file or _hangs.is_set():
        return None
    images = [(layer.filename, layer.virtual_size) for layer in chain]
    try:
        return await within(TIMEOUT, _count, images)
    except asyncio.TimeoutError:
        _hangs.set()
        return None


def _count(images: Sequence[tuple[str, int]]) -> int | None:
    """Return the bytes that these images hold together, each given as its path and the size of its disk."""
    with _one_at_a_time, contextlib.ExitStack() as stack:
        try:
            layers = [_open(stack, path, size) for path, size in images]
            # A layer can be larger than those above it, and hold the state of a VM beyond its own end.
            end = -(-images[0][1] // (ENTRIES * CLUSTER))
            numbers = {number for layer in layers for number in layer.tables if number < end}
            return CLUSTER * sum(_clusters(layers, number) for number in numbers)
        except (OSError, OverflowError, ValueError, struct.error):
            return None


def _open(stack: contextlib.ExitStack, path: str, size: int) -> _Layer:
    """Open an image; ValueError for one that is not of the plain kind, or not the one that QEMU has open."""
    # The path may lead to something else here than where QEMU runs: nothing waits for the other end of a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, fd)
    header = read_header(fd)
    count, start = header.table
    strange = header.features & ~HARMLESS or header.encrypted or header.cluster_bits != CLUSTER_BITS
    if strange or header.size != size or count > MOST_TABLES:
        raise ValueError(path)
    entries = struct.unpack(f">{count}Q", os.pread(fd, 8 * count, start))
    return _Layer(fd, {number: entry & OFFSET for number, entry in enumerate(entries) if entry & OFFSET})


def _clusters(layers: Sequence[_Layer], number: int) -> int:
    """Return how many of the clusters are held for which the second tables of this number are."""
    held = reduce(or_, (layer.held(number) for layer in layers))
    return ENTRIES - held.to_bytes(ENTRIES, "big").count(0)
