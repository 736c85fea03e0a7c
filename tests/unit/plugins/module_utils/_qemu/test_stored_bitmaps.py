# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bitmaps that are stored in images: they are what QEMU says of them, and what is damaged is told."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qcow2 import read_header
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.stored_bitmaps import ENTRY, read_bitmaps
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Bitmap

SIZE = 8 * MIB


def stored(image: Path) -> dict[str, Bitmap]:
    fd = os.open(image, os.O_RDONLY)
    try:
        return {bitmap.name: bitmap for bitmap in read_bitmaps(fd)}
    finally:
        os.close(fd)


def shown(image: Path) -> dict[str, dict[str, Any]]:
    """What QEMU shows of the bitmaps of an image that it opens to read."""
    node = {"driver": "qcow2", "node-name": "n0", "read-only": True, "file": {"driver": "file", "filename": str(image)}}
    commands = (
        ("qmp_capabilities", {}),
        ("blockdev-add", node),
        ("query-named-block-nodes", {"flat": True}),
        ("quit", {}),
    )
    asked = "".join(json.dumps({"execute": name, "arguments": arguments}) + "\n" for name, arguments in commands)
    command = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "chardev=m"]
    answers = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout.splitlines()
    [nodes] = [found for found in (json.loads(line).get("return") for line in answers) if isinstance(found, list)]
    [bitmaps] = [found.get("dirty-bitmaps", []) for found in nodes if found["node-name"] == "n0"]
    return {bitmap["name"]: bitmap for bitmap in bitmaps}


def made(image: Path, size: int = SIZE, cluster: int = 65536) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, str(size))
    return image


def add(image: Path, name: str, granularity: int = 65536) -> None:
    qemu_img("bitmap", "--add", "-g", str(granularity), "-f", "qcow2", image, name)


@pytest.mark.parametrize("seed", range(12))
def test_they_are_what_qemu_says(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([SIZE, SIZE + 512, 3 * MIB + 7 * 512, 512, 600 * MIB])
    image = made(tmp_path / "image", size, chance.choice([4096, 65536, 2 * MIB]))
    for number in range(chance.randint(1, 4)):
        add(image, f"b{number}-ä", 1 << chance.choice([9, 12, 16, 21]))
        for _write in range(chance.randint(0, 6)):
            start = chance.randrange(size // 512) * 512
            write(image, f"write -P 7 {start} {min(chance.choice([512, 65536, MIB]), size - start)}")
    if chance.random() < 0.3:
        qemu_img("bitmap", "--disable", image, "b0-ä")
    found = stored(image)
    assert list(found)
    assert set(found) == set(shown(image))
    for name, bitmap in shown(image).items():
        one = found[name]
        assert (one.count, one.granularity, one.recording, one.inconsistent, one.persistent) == (
            bitmap["count"],
            bitmap["granularity"],
            bitmap["recording"],
            bitmap.get("inconsistent", False),
            bitmap["persistent"],
        )


def test_all_of_a_disk_is_marked(tmp_path: Path) -> None:
    image = made(tmp_path / "image", 256 * MIB, 4096)
    add(image, "b0", 512)
    write(image, "write -z 0 256M")
    assert stored(image)["b0"].count == 256 * MIB


def test_an_image_without_bitmaps(tmp_path: Path) -> None:
    assert stored(made(tmp_path / "image")) == {}


def test_of_one_that_is_open_for_writing_nothing_is_known(tmp_path: Path) -> None:
    image = made(tmp_path / "image")
    add(image, "b0")
    with subprocess.Popen(
        ["qemu-io", "-c", "write 0 64k", "-c", "sleep 60000", image], stdout=subprocess.DEVNULL
    ) as vm:
        try:
            # For a moment, while QEMU writes the list, there is none.
            wait_until(lambda: any(bitmap.inconsistent for bitmap in stored(image).values()), "that it is opened")
            [bitmap] = stored(image).values()
        finally:
            vm.kill()
    assert (bitmap.inconsistent, bitmap.recording, bitmap.count) == (True, False, 0)
    assert shown(image)["b0"]["inconsistent"]


def test_another_program_has_written_to_it(tmp_path: Path) -> None:
    """One that knows nothing of bitmaps takes the bit away that says they are to be trusted."""
    image = made(tmp_path / "image")
    add(image, "b0")
    with image.open("r+b") as target:
        target.seek(88)
        assert target.read(8)[-1] == 1
        target.seek(88)
        target.write(bytes(8))
    assert stored(image) == {}


@pytest.fixture
def list_at(tmp_path: Path) -> tuple[Path, int]:
    """An image with two bitmaps, one of which marks something, and where their list is."""
    image = made(tmp_path / "image")
    add(image, "b0")
    write(image, "write 1M 64k")
    add(image, "b1")
    fd = os.open(image, os.O_RDONLY)
    try:
        return image, read_header(fd).bitmaps[2]
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("at", "what"),
    [
        # Where its table is, how many entries that has, its type, its granularity, the length of its name.
        (0, struct.pack(">Q", 1 << 63)),
        (0, struct.pack(">Q", 1 << 40)),
        (8, struct.pack(">I", 1 << 31)),
        (8, struct.pack(">I", 0)),
        (16, b"\x02"),
        (17, b"\x3f"),
        (18, struct.pack(">H", 65535)),
        (20, struct.pack(">I", 1 << 31)),
    ],
)
def test_a_damaged_list(list_at: tuple[Path, int], at: int, what: bytes) -> None:
    image, place = list_at
    with image.open("r+b") as target:
        target.seek(place + at)
        target.write(what)
    with pytest.raises(ValueError, match="list of its bitmaps is damaged"):
        stored(image)


def test_a_list_that_is_cut_short(list_at: tuple[Path, int]) -> None:
    image, place = list_at
    os.truncate(image, place + ENTRY.size)
    with pytest.raises(ValueError, match="list of its bitmaps is damaged"):
        stored(image)


def test_any_bytes_are_read_or_refused(list_at: tuple[Path, int]) -> None:
    image, place = list_at
    chance = random.Random(7)
    content = image.read_bytes()
    for _try in range(500):
        changed = bytearray(content)
        for _byte in range(chance.randint(1, 4)):
            at = chance.choice([place + chance.randrange(64), chance.randrange(256)])
            changed[at] = chance.randrange(256)
        image.write_bytes(changed)
        try:
            found = stored(image)
        except ValueError:
            continue
        assert all(0 <= bitmap.count <= 2 * max(SIZE, bitmap.granularity) for bitmap in found.values())
