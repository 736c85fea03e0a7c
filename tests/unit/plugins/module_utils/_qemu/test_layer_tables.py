# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the layers of a disk hold, against what qemu-img measures of the same images."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import layer_tables
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.layer_tables import held_bytes
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, info, patterned, qemu_img, write

if t.TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 * MIB
LARGE = 3 << 29
"""Bytes of a disk with three second tables."""


def chain(*images: Path) -> list[Disk]:
    """The layers as QEMU tells them, the top one first."""
    layers = []
    for image in images:
        told = info(image)
        disk = Disk(
            image.name,
            image.name,
            told["format"],
            filename=str(image),
            virtual_size=told["virtual-size"],
            backing_file=told.get("full-backing-filename", ""),
        )
        layers.append(disk)
    return layers


def held(*images: Path) -> int | None:
    return asyncio.run(held_bytes(chain(*images)))


def measured(image: Path) -> int:
    """The data of which qemu-img knows: what it measures without the tables."""
    told = json.loads(qemu_img("measure", "-O", "qcow2", "--output=json", image))
    return int(told["required"]) - (int(told["fully-allocated"]) - int(info(image)["virtual-size"]))


def overlay(below: Path, *commands: str) -> Path:
    """Return an image on top of another, of its size, with something written."""
    path = below.with_name(f"{below.name}+")
    create(path, info(below)["virtual-size"], backing=below)
    if commands:
        write(path, *commands)
    return path


def patch(image: Path, at: int, what: bytes) -> None:
    content = image.read_bytes()
    image.write_bytes(content[:at] + what + content[at + len(what) :])


def second_table(image: Path) -> int:
    """Return where the first of the second tables is."""
    content = image.read_bytes()
    first = int.from_bytes(content[40:48], "big")
    return int.from_bytes(content[first : first + 8], "big") & layer_tables.OFFSET


@pytest.fixture(autouse=True)
def in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test see that the count of another one has not ended."""
    monkeypatch.setattr(layer_tables, "_hangs", threading.Event())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return patterned(tmp_path / "base", size=SIZE)


class TestHeldBytes:
    def test_of_one_image(self, base: Path) -> None:
        assert held(base) == measured(base) == SIZE // 2

    def test_of_nothing(self, tmp_path: Path) -> None:
        assert held(create(tmp_path / "empty", SIZE)) == 0

    def test_each_cluster_is_counted_once_in_whichever_layer(self, base: Path) -> None:
        middle = overlay(base, "write 0 1M", "write 4M 100k")
        top = overlay(middle, "write 4M 1k", "write 12M 1k", f"write {SIZE - 512} 512")
        assert held(top, middle, base) == measured(top) == SIZE // 2 + 4 * 65536

    def test_what_lies_below_zeroes_is_counted_too(self, base: Path) -> None:
        top = overlay(base, "write -z 0 4M", "write -z 60M 4M")
        assert measured(top) == SIZE // 2 - 4 * MIB
        assert held(top, base) == SIZE // 2

    def test_clusters_without_data_in_the_file_are_counted_too(self, tmp_path: Path) -> None:
        image = tmp_path / "preallocated"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, str(SIZE))
        assert measured(image) < MIB
        assert held(image) == SIZE

    def test_compressed_clusters_count_in_full(self, base: Path) -> None:
        for kind in ("zlib", "zstd"):
            path = base.with_name(kind)
            qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", base, path)
            top = overlay(path, "write 4M 64k")
            assert path.stat().st_size < MIB
            assert held(top, path) == measured(top) == SIZE // 2 + 65536

    def test_clusters_of_a_snapshot_count_as_well(self, base: Path) -> None:
        qemu_img("snapshot", "-c", "one", base)
        write(base, "write 0 64k")
        assert held(base) == measured(base) == SIZE // 2

    def test_of_the_older_version(self, tmp_path: Path) -> None:
        image = tmp_path / "old"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", image, str(SIZE))
        write(image, "write 1M 1M")
        assert held(image) == measured(image) == MIB

    def test_of_a_large_disk(self, tmp_path: Path) -> None:
        below = create(tmp_path / "large", LARGE)
        write(below, "write 0 64k", f"write {LARGE - 65536} 64k")
        top = overlay(below, f"write {LARGE // 2} 1M")
        assert held(top, below) == measured(top) == MIB + 2 * 65536

    def test_of_a_disk_that_has_grown_and_shrunk(self, tmp_path: Path) -> None:
        below = create(tmp_path / "below", LARGE)
        write(below, "write 0 1M", f"write {LARGE - MIB} 1M")
        top = tmp_path / "top"
        qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", top, str(SIZE))
        assert held(top, below) == measured(top) == MIB
        qemu_img("resize", "-q", top, str(2 * LARGE))
        write(top, f"write {2 * LARGE - MIB} 1M")
        assert held(top, below) == 3 * MIB


class TestIsNotTold:
    @pytest.mark.parametrize(
        "option", ["cluster_size=4096", "cluster_size=2M", "extended_l2=on", "data_file={}/data", "preallocation=off"]
    )
    def test_of_images_of_another_kind(self, tmp_path: Path, option: str) -> None:
        image = tmp_path / "image"
        qemu_img("create", "-q", "-f", "qcow2", "-o", option.format(tmp_path), image, str(SIZE))
        write(image, "write 0 1M")
        # The last one is how QEMU makes images anyway.
        assert held(image) == (MIB if option == "preallocation=off" else None)

    def test_of_another_format(self, tmp_path: Path) -> None:
        below = create(tmp_path / "raw", SIZE, "raw")
        top = tmp_path / "top"
        qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "raw", top)
        as_raw = Disk("raw", "raw", "raw", filename=str(below), virtual_size=SIZE)
        assert asyncio.run(held_bytes([*chain(top), as_raw])) is None
        # What claims to be qcow2 is looked at.
        assert asyncio.run(held_bytes([Disk("raw", "raw", "qcow2", filename=str(below), virtual_size=SIZE)])) is None

    def test_where_the_lowest_layer_is_not_known(self, base: Path) -> None:
        assert held(overlay(base)) is None

    def test_of_an_encrypted_image(self, tmp_path: Path) -> None:
        image = tmp_path / "encrypted"
        options = "encrypt.format=aes,encrypt.key-secret=s"
        qemu_img("create", "-q", "--object", "secret,id=s,data=abc", "-f", "qcow2", "-o", options, image, str(SIZE))
        assert held(image) is None

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda image: os.truncate(image, 60),
            lambda image: os.truncate(image, 120),
            lambda image: os.truncate(image, 0),
            lambda image: image.unlink(),
            lambda image: (image.unlink(), os.mkfifo(image)),
            lambda image: patch(image, 36, b"\x7f"),
            lambda image: patch(image, 40, b"\xff"),
            lambda image: os.truncate(image, second_table(image) + 4096),
        ],
        ids=[
            "cut in the header",
            "cut behind it",
            "empty",
            "gone",
            "a pipe",
            "first table endless",
            "out of reach",
            "second table cut short",
        ],
    )
    def test_of_what_is_no_image(self, base: Path, spoil: t.Callable[[Path], object]) -> None:
        layers = chain(base)
        spoil(base)
        assert asyncio.run(held_bytes(layers)) is None

    def test_of_another_image_than_the_one_in_use(self, base: Path) -> None:
        layers = chain(base)
        qemu_img("resize", "-q", base, str(2 * SIZE))
        assert asyncio.run(held_bytes(layers)) is None

    def test_of_a_name_that_is_no_path(self, base: Path) -> None:
        for name in (f"json:{{}}{base}", base.name, "nbd://host/x"):
            assert asyncio.run(held_bytes([Disk("vda", "vda", "qcow2", filename=name, virtual_size=SIZE)])) is None

    def test_where_it_takes_too_long_and_for_all_others_then(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layers = chain(base)

        async def ask_twice() -> float:
            assert await held_bytes(layers) is None
            begun = time.monotonic()
            assert await held_bytes(layers) is None
            return time.monotonic() - begun

        monkeypatch.setattr(layer_tables, "TIMEOUT", 0.5)
        # As if the count of another disk never ended.
        with layer_tables._one_at_a_time:
            assert asyncio.run(ask_twice()) < 0.25
