# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lay out a new qcow2 image for the data that a disk has: the tables first, then the data in the order of the disk.

QEMU copies several parts of a disk at a time, and gives them the next clusters of a new image as they come. So two
images of one disk have little in common for a store that looks for equal pieces of files. Into clusters that are there
already QEMU writes in place. What they were laid out for need not be true any more: data for which there is no cluster
gets one at the end, and a cluster whose data is gone is marked as zero.

Reference: QEMU 7.2, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from .qcow2 import COPIED, MAGIC

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO


CLUSTER_BITS = 16
MOST_RUNS = 1_000_000
"""A disk with more parts is laid out by QEMU: this is 16 MiB of memory."""
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x8x")
"""Of version 3, as QEMU writes it, without names of features; a type of extension that is zero ends the header."""
HEADER_LENGTH = HEADER.size - 8
SECTOR = 512
REFCOUNT_ORDER = 4
REFCOUNT = b"\0\1"
"""How often a cluster is used, as 16 bits: each once."""
ENTRY = 8
"""Bytes of an entry of any other table."""


class TooFragmented(ValueError):
    """The data of a disk is in too many parts."""


class DataMap:
    """Which clusters of a disk have data, as runs in the order of the disk that do not touch each other."""

    def __init__(self, size: int, cluster_bits: int = CLUSTER_BITS) -> None:
        self.size = size
        self.cluster_bits = cluster_bits
        self._end = _parts(size, 1 << cluster_bits)
        self._firsts = array("Q")
        self._ends = array("Q")

    def add(self, start: int, length: int) -> None:
        """Add C(length) bytes of data, behind all that were added before or beside the last of them.

        A cluster has data where any of its bytes has. What is behind the end of the disk does not count.
        """
        first, end = start >> self.cluster_bits, _parts(start + length, 1 << self.cluster_bits)
        end = min(end, self._end)
        if self._firsts and first < self._firsts[-1]:
            raise ValueError("parts of a disk that are not in order")
        if first >= end or not length:
            return
        if self._ends and first <= self._ends[-1]:
            self._ends[-1] = max(end, self._ends[-1])
            return
        if len(self._ends) >= MOST_RUNS:
            raise TooFragmented(f"data in more than {MOST_RUNS} parts")
        self._firsts.append(first)
        self._ends.append(end)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Return the first cluster of each run, and the one behind its last."""
        return zip(self._firsts, self._ends)

    @property
    def clusters(self) -> int:
        return sum(self._ends) - sum(self._firsts)

    @property
    def is_whole(self) -> bool:
        """Return whether all of the disk has data."""
        return self.clusters == self._end


@dataclass(frozen=True)
class ImageLayout:
    """What stands where in an image: header, table and blocks of refcounts, first table, second tables, data.

    Of the second tables there are those only that tell of data. No more than one is in memory at a time.
    """

    data: DataMap

    @cached_property
    def _table_numbers(self) -> tuple[int, ...]:
        """Return the numbers of the second tables, that is, their places in the first one."""
        return tuple(number for number, _pieces in groupby(self._pieces(), itemgetter(0)))

    @property
    def _cluster(self) -> int:
        return 1 << self.data.cluster_bits

    @property
    def _entries(self) -> int:
        """Return how many entries a second table has, each for a cluster of the disk."""
        return self._cluster // ENTRY

    @property
    def _first_table_entries(self) -> int:
        return _parts(self.data.size, self._entries * self._cluster)

    @property
    def _first_table_clusters(self) -> int:
        return _parts(self._first_table_entries * ENTRY, self._cluster)

    @cached_property
    def _refcount_clusters(self) -> tuple[int, int]:
        """Return the clusters of the table of refcounts, and of the blocks of refcounts that it names."""
        others = 1 + self._first_table_clusters + len(self._table_numbers) + self.data.clusters
        table = blocks = 0
        while True:
            # They count themselves, too.
            more = _parts(others + table + blocks, self._cluster // len(REFCOUNT))
            if more == blocks:
                return table, blocks
            table, blocks = _parts(more * ENTRY, self._cluster), more

    @property
    def _first_table(self) -> int:
        """Return the cluster at which the first table begins."""
        return 1 + sum(self._refcount_clusters)

    @property
    def _second_tables(self) -> int:
        return self._first_table + self._first_table_clusters

    @property
    def _clusters(self) -> int:
        return self._second_tables + len(self._table_numbers) + self.data.clusters

    @property
    def length(self) -> int:
        """Return the bytes of the image once all of the data is in it."""
        return self._clusters * self._cluster

    def write(self, image: IO[bytes]) -> None:
        """Write this image, without its data, into an empty file."""
        image.truncate(self.length)
        image.write(self._header())
        for place, part in self._refcounts():
            image.seek(place * self._cluster)
            image.write(part)
        image.seek(self._first_table * self._cluster)
        first_table = array("Q", bytes(self._first_table_entries * ENTRY))
        for place, number in enumerate(self._table_numbers, start=self._second_tables):
            first_table[number] = place * self._cluster | COPIED
        image.write(_big_endian(first_table))
        image.seek(self._second_tables * self._cluster)
        for table in self._tables():
            image.write(table)

    def _header(self) -> bytes:
        table, _blocks = self._refcount_clusters
        sizes = _parts(self.data.size, SECTOR) * SECTOR, 0, self._first_table_entries
        places = self._first_table * self._cluster, self._cluster, table
        return HEADER.pack(
            MAGIC,
            3,
            *(0, 0),  # no backing file
            self.data.cluster_bits,
            *sizes,  # of the disk; no encryption; of the first table
            *places,  # of the first table; of the table of refcounts, and its length
            *(0, 0),  # no snapshots
            *(0, 0, 0),  # no features
            REFCOUNT_ORDER,
            HEADER_LENGTH,
            0,  # zlib, where anything is compressed
        )

    def _refcounts(self) -> Iterator[tuple[int, bytes]]:
        """Return the table of refcounts and its blocks, each with the cluster at which it begins."""
        table, blocks = self._refcount_clusters
        first = 1 + table
        yield 1, _big_endian(array("Q", range(first * self._cluster, (first + blocks) * self._cluster, self._cluster)))
        left = self._clusters
        for block in range(first, first + blocks):
            counted = min(left, self._cluster // len(REFCOUNT))
            yield block, REFCOUNT * counted
            left -= counted

    def _tables(self) -> Iterator[bytearray]:
        """Return the second tables. The clusters behind them are given to the data in its order."""
        place = (self._second_tables + len(self._table_numbers)) * self._cluster | COPIED
        for _number, pieces in groupby(self._pieces(), itemgetter(0)):
            table = bytearray(self._cluster)
            for _number, at, count in pieces:
                table[at * ENTRY : (at + count) * ENTRY] = self._in_a_row(place, count)
                place += count * self._cluster
            yield table

    def _in_a_row(self, place: int, count: int) -> bytes:
        """Return so many entries for clusters one behind the other, the first of which is at C(place)."""
        steps, ones = self._row
        # One sum of large numbers is ten times as fast as a thousand small ones. No entry gets into the next one.
        total = int.from_bytes(steps[: count * ENTRY], "big") + place * int.from_bytes(ones[: count * ENTRY], "big")
        return total.to_bytes(count * ENTRY, "big")

    @cached_property
    def _row(self) -> tuple[bytes, bytes]:
        """Return tables whose entries are those of clusters one behind the other from 0 on, and 1 throughout."""
        steps = range(0, self._entries * self._cluster, self._cluster)
        return _big_endian(array("Q", steps)), _big_endian(array("Q", [1]) * self._entries)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Return the runs in pieces: the number of the second table, the first entry in it, and how many there are."""
        entries = self._entries
        for first, end in self.data.runs():
            for number in range(first // entries, (end - 1) // entries + 1):
                begin = max(first, number * entries)
                yield number, begin % entries, min(end, (number + 1) * entries) - begin


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _big_endian(entries: array[int]) -> bytes:
    """Return the entries of a table as they stand in an image. The table given is not one any more."""
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()
