# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The space of clusters that read as zeroes is given back, and nothing else."""

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.image_layout import DataMap, ImageLayout
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.spare_clusters import give_back
from ansible_collections.vmfleet.backup.tests.harness.images import (
    MIB,
    assert_pattern,
    create,
    identical,
    qemu_img,
    sound,
    write,
)
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu

if t.TYPE_CHECKING:
    from pathlib import Path

SIZE = 600 * MIB

CLUSTER = 65536


def apply(path: Path) -> int:
    """Give back what is spare; return how many bytes that were, in whole clusters.

    A file system may need a block of its own to write down where the holes are (ext4, once an inode has no room for
    more extents), so that the file's blocks shrink by a little less.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        before = os.fstat(fd)
        give_back(fd)
        after = os.fstat(fd)
    finally:
        os.close(fd)
    assert after.st_size == before.st_size
    return round((before.st_blocks - after.st_blocks) * 512 / CLUSTER) * CLUSTER


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Laid out for 16 MiB, in two tables, with all of its space reserved."""
    path = tmp_path / "x"
    data = DataMap(SIZE)
    data.add(0, 8 * MIB)
    data.add(592 * MIB, 8 * MIB)
    with path.open("wb") as file:
        layout = ImageLayout(data)
        layout.write(file)
        assert preallocate.allocate(file.fileno(), layout.length)
    return path


def test_zeroes_take_no_space(image: Path, tmp_path: Path) -> None:
    commands = [
        *("write -P 1 0 1M", "write -z 1M 2M", "write -P 3 3M 4M", "write -z 7M 64k", "write -P 4 7232k 960k"),
        *("write -z 100M 100M", "write -z 592M 3M", "write -P 5 595M 5M"),
    ]
    write(image, *commands)
    # A second write clears the mark.
    write(image, "write -P 9 1M 64k")
    other = create(tmp_path / "other", SIZE)
    write(other, *commands, "write -P 9 1M 64k")
    assert apply(image) == 5 * MIB
    assert identical(other, image)
    assert sound(image)
    assert_pattern(image, "qcow2", 9, MIB, 65536)
    assert_pattern(image, "qcow2", 0, MIB + 65536, 2 * MIB - 65536)
    assert apply(image) == 0
    # They can be used again.
    write(image, "write -P 7 2M 64k")
    assert_pattern(image, "qcow2", 7, 2 * MIB, 65536)
    assert sound(image)


def test_nothing_is_taken_from_what_has_no_zeroes(image: Path) -> None:
    write(image, "write -P 1 0 8M", "write -P 2 592M 8M")
    content = image.read_bytes()
    assert apply(image) == 0
    assert image.read_bytes() == content


@pytest.mark.parametrize("options", [{}, {"compress": True}, {"size": "2M"}, {"old": True}], ids=str)
def test_images_of_qemu_stay_as_they_are(options: dict[str, t.Any], tmp_path: Path) -> None:
    source = create(tmp_path / "source", 64 * MIB)
    write(source, "write -P 1 0 5M", "write -P 0 5M 5M", "write -P 2 20M 3M")
    path = tmp_path / "x"
    given = ["-c"] if "compress" in options else []
    given += ["-o", f"cluster_size={options['size']}"] if "size" in options else []
    given += ["-o", "compat=0.10"] if "old" in options else []
    qemu_img("convert", "-O", "qcow2", *given, source, path)
    content = path.read_bytes()
    apply(path)
    assert path.read_bytes() == content


def test_an_image_that_a_qemu_has_open_stays_as_it_is(image: Path) -> None:
    write(image, "write -z 0 8M")
    with Qemu(Disk(image)) as vm:
        vm.write("drive0", 7, 0, 65536)
        assert apply(image) == 0
        vm.quit()
    assert_pattern(image, "qcow2", 7, 0, 65536)
    assert apply(image) == 8 * MIB - 65536
    assert_pattern(image, "qcow2", 7, 0, 65536)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"not an image" * 100], ids=["empty", "short", "other"])
def test_what_cannot_be_understood_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    apply(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "entry",
    [
        1 << 63 | 1 << 62 | 8 << 16 | 1,
        8 << 16 | 1,
        1 << 63 | 8 << 16 | 512 | 1,
        1 << 63 | 8 << 16,
    ],
    ids=["compressed", "used elsewhere too", "within a cluster", "data"],
)
def test_only_entries_that_say_just_that(entry: int, image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(40)
        first = int.from_bytes(file.read(8), "big")
        file.seek(first)
        table = int.from_bytes(file.read(8), "big") & 0x00FF_FFFF_FFFF_FE00
        file.seek(table)
        file.write(entry.to_bytes(8, "big"))
    assert apply(image) == 0
    with image.open("r+b") as file:
        file.seek(table)
        file.write((1 << 63 | 8 << 16 | 1).to_bytes(8, "big"))
    assert apply(image) == 65536


def test_tables_that_lead_nowhere(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(40)
        first = int.from_bytes(file.read(8), "big")
        file.seek(first)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    content = image.read_bytes()
    apply(image)
    assert image.read_bytes() == content
    os.truncate(image, first)
    apply(image)
    assert image.read_bytes() == content[:first]
