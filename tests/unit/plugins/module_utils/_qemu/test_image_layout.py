# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images that are laid out: their tables, read by others than who has written them, and by the real qemu-img."""

from __future__ import annotations

import json
import typing as t

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_layout
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.image_layout import (
    DataMap,
    ImageLayout,
    TooFragmented,
)
from ansible_collections.vmfleet.backup.tests.harness.fuzzing import examples
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, info, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qcow2 import read_tables

if t.TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

GIB = 1 << 30
TIB = 1 << 40
CLUSTER = 65536
SMALL_BITS = 9
"""Clusters of 512 bytes: a few MiB have what takes more than 16 TiB with those of 64 KiB."""
Ranges = list[tuple[int, int]]


def mapped(size: int, ranges: Iterable[tuple[int, int]], bits: int = 16) -> DataMap:
    """A map of data, given as where it begins and how long it is."""
    data = DataMap(size, bits)
    for start, length in ranges:
        data.add(start, length)
    return data


def make(path: Path, data: DataMap) -> ImageLayout:
    """Write an image that is laid out for this data."""
    layout = ImageLayout(data)
    with path.open("wb") as image:
        layout.write(image)
    return layout


def assert_right(path: Path, layout: ImageLayout) -> None:
    """Its data stands behind its tables in the order of the disk, and all is used once, and counted once."""
    tables = read_tables(path)
    clusters = [number for first, end in layout.data.runs() for number in range(first, end)]
    assert list(tables.data) == clusters
    assert not tables.zero
    length = path.stat().st_size
    assert length == layout.length
    begin = length - len(clusters) * tables.cluster
    assert list(tables.data.values()) == list(range(begin, length, tables.cluster))
    assert set(tables.used) == set(range(length // tables.cluster))
    assert set(tables.used.values()) == {1}
    assert tables.counted == tables.used


def assert_sound(path: Path) -> None:
    """qemu-img finds nothing wrong, and no data that is not in order."""
    checked = json.loads(qemu_img("check", "--output=json", path))
    assert checked["check-errors"] == 0
    assert not checked.keys() & {"leaks", "corruptions", "fragmented-clusters"}
    assert checked["image-end-offset"] == path.stat().st_size


def extents(path: Path) -> Iterator[tuple[int, int]]:
    """The data of an image as qemu-img sees it, each part given as where it begins and ends on the disk."""
    for extent in json.loads(qemu_img("map", "--output=json", path)):
        if extent["data"]:
            yield extent["start"], extent["start"] + extent["length"]


@st.composite
def disks(draw: st.DrawFn, most: int, cluster: int) -> tuple[int, Ranges]:
    """A size in sectors, and parts of the disk with data, in order and apart, or beside each other."""
    size = 512 * draw(st.integers(1, most // 512))
    places = sorted(draw(st.lists(st.integers(0, size), max_size=40)))
    near = st.sampled_from((-1, 0, 1))
    bounds = [max(0, place // cluster * cluster + draw(near)) if draw(st.booleans()) else place for place in places]
    ranges: Ranges = []
    end = 0
    for first, last in zip(bounds[::2], bounds[1::2], strict=False):
        begin = max(first, end)
        end = max(begin, last)
        ranges.append((begin, end - begin))
    return size, ranges


@examples(60)
@given(disks(4 * MIB, 1 << SMALL_BITS))
def test_tables_of_any_data(tmp_path: Path, disk: tuple[int, Ranges]) -> None:
    size, ranges = disk
    path = tmp_path / "x"
    layout = make(path, mapped(size, ranges, SMALL_BITS))
    assert_right(path, layout)
    covered = set()
    for start, length in ranges:
        covered |= set(range(start >> SMALL_BITS, (start + length - 1 >> SMALL_BITS) + 1)) if length else set()
    assert set(read_tables(path).data) == {number for number in covered if number << SMALL_BITS < size}
    assert_sound(path)


@pytest.mark.parametrize(
    ("size", "ranges"),
    [
        (512, [(0, 512)]),
        (CLUSTER, [(0, 1)]),
        (64 * MIB, [(0, 64 * MIB)]),
        (512 * MIB, [(0, 512 * MIB)]),
        (512 * MIB + 512, [(0, 512 * MIB + 512)]),
        (512 * MIB - 512, [(CLUSTER - 1, 2), (512 * MIB - 513, 1)]),
        (3 * 512 * MIB, [(512 * MIB - 1, 2)]),
        (3 * 512 * MIB + 3 * 512, [(0, 1), (512 * MIB, 1), (3 * 512 * MIB, 3 * 512)]),
        (2 * GIB + 300 * MIB, [(0, 2 * GIB + 300 * MIB)]),
        (5 * GIB, [(number * 2 * CLUSTER, CLUSTER) for number in range(5 * GIB // CLUSTER // 2)]),
        (TIB, [(number * 8 * GIB, MIB) for number in range(128)]),
        (16 * TIB, [(3 * TIB, GIB), (16 * TIB - 1, 1)]),
        (64 * TIB, [(0, 512), (63 * TIB, 5 * GIB)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else str(len(value)),
)
def test_clusters_as_they_are_made(size: int, ranges: Ranges, tmp_path: Path) -> None:
    """The end of the disk within a sector, a cluster, a table; all data; more than one block of refcounts."""
    path = tmp_path / "x"
    layout = make(path, mapped(size, ranges))
    assert_sound(path)
    assert info(path)["virtual-size"] == size
    runs = [(first * CLUSTER, min(end * CLUSTER, size)) for first, end in layout.data.runs()]
    assert list(extents(path)) == runs
    assert path.stat().st_blocks * 512 < 40 * MIB
    if size <= 5 * GIB:
        assert_right(path, layout)


@pytest.mark.parametrize("size", [1 * MIB, 8 * MIB, 16 * MIB, 24 * MIB + 512, 40 * MIB])
@pytest.mark.parametrize("share", [1, 3])
def test_long_tables_of_refcounts(size: int, share: int, tmp_path: Path) -> None:
    """More than one block, and more than one cluster of the table that names them."""
    path = tmp_path / "x"
    step = 100 * 512
    layout = make(path, mapped(size, ((start, step // share) for start in range(0, size, step)), SMALL_BITS))
    assert_right(path, layout)
    assert_sound(path)


def test_it_is_an_image_as_qemu_img_makes_it(tmp_path: Path) -> None:
    """Whoever works with the sets of others finds the same options, whichever way an image was made."""
    paths = [create(tmp_path / "qemu", 64 * MIB), tmp_path / "ours"]
    make(paths[1], mapped(64 * MIB, [(0, MIB)]))
    told = [info(path) for path in paths]
    for entry in told:
        assert entry.pop("filename")
        assert entry.pop("actual-size")
        # Since QEMU 10.0: the layer below, with its own name and sizes.
        entry.pop("children", None)
    assert told[0] == told[1]
    head = [path.read_bytes()[:24] for path in paths]
    assert head[0] == head[1]


def test_a_size_within_a_sector_is_rounded_as_qemu_img_does(tmp_path: Path) -> None:
    make(tmp_path / "x", mapped(1000, [(0, 1000)]))
    assert info(tmp_path / "x")["virtual-size"] == info(create(tmp_path / "y", 1000))["virtual-size"] == 1024


class TestDataMap:
    def test_parts_of_clusters_count_as_whole_and_meet(self) -> None:
        data = mapped(10 * CLUSTER, [(1, 1), (CLUSTER - 1, 1), (CLUSTER, 1), (3 * CLUSTER, 2 * CLUSTER)])
        assert list(data.runs()) == [(0, 2), (3, 5)]
        assert (data.clusters, data.is_whole) == (4, False)

    def test_gaps_within_a_cluster_are_none(self) -> None:
        ranges = [(number * 8192, 4096) for number in range(MIB // 8192)]
        assert list(mapped(MIB, ranges).runs()) == [(0, 16)]

    def test_nothing_is_behind_the_end(self) -> None:
        data = mapped(CLUSTER + 512, [(0, 100 * CLUSTER), (200 * CLUSTER, CLUSTER)])
        assert list(data.runs()) == [(0, 2)]
        assert data.is_whole

    def test_nothing_has_no_length(self) -> None:
        assert mapped(MIB, [(5, 0)]).clusters == 0

    def test_parts_have_to_be_in_order(self) -> None:
        data = mapped(MIB, [(5 * CLUSTER, CLUSTER)])
        with pytest.raises(ValueError, match="not in order"):
            data.add(0, CLUSTER)

    def test_too_many_parts_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_layout, "MOST_RUNS", 3)
        data = mapped(GIB, [(number * 2 * CLUSTER, 1) for number in range(3)])
        # One that is no new part is none too many.
        data.add(4 * CLUSTER, 2 * CLUSTER)
        with pytest.raises(TooFragmented):
            data.add(8 * CLUSTER, 1)
