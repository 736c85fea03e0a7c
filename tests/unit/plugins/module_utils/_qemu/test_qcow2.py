# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The headers of real images, as QEMU writes them, and of damaged ones."""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qcow2 import Header, read_header
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, info, qemu_img
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import qcow2

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 8 * MIB


def header(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd)
    finally:
        os.close(fd)


def made(path: Path, *options: str) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, str(SIZE))
    return path


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [4096, 65536, 2 * MIB])
@pytest.mark.parametrize("backing", [None, "../s1/vda.qcow2", "../ä/" + "x" * 400])
def test_an_image_as_qemu_makes_it(tmp_path: Path, compat: str, cluster: int, backing: str | None) -> None:
    below = ("-u", "-b", backing, "-F", "qcow2") if backing else ()
    image = made(tmp_path / "image", "-o", f"compat={compat},cluster_size={cluster}", *below)
    found = header(image)
    assert (1 << found.cluster_bits, found.size, found.encrypted, found.features) == (cluster, SIZE, False, 0)
    assert (found.backing, found.backing_format) == (backing, "qcow2" if backing else None)
    assert found.data_file is None
    assert info(image)["virtual-size"] == SIZE


def test_what_else_an_image_can_say(tmp_path: Path) -> None:
    assert header(made(tmp_path / "zstd", "-o", "compression_type=zstd")).features == 0b1000
    assert header(made(tmp_path / "extended", "-o", "extended_l2=on")).features == 0b10000
    outside = header(made(tmp_path / "outside", "-o", f"data_file={tmp_path}/data"))
    assert (outside.features, outside.data_file) == (0b100, f"{tmp_path}/data")
    secret = ("--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s")
    assert header(made(tmp_path / "encrypted", *secret)).encrypted


def put(image: Path, at: int, what: bytes) -> None:
    with image.open("r+b") as target:
        target.seek(at)
        target.write(what)


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (0, b"QFI\0"),
        (4, struct.pack(">I", 1)),
        (4, struct.pack(">I", 4)),
        # The backing file's name: outside of the first cluster, within the header, too long.
        (8, struct.pack(">Q", 65537)),
        (8, struct.pack(">Q", 1 << 63)),
        (8, struct.pack(">Q", 60)),
        (16, struct.pack(">I", 1024)),
        # The size of a cluster.
        (20, struct.pack(">I", 8)),
        (20, struct.pack(">I", 22)),
        # The header's own length, and that of an extension.
        (100, struct.pack(">I", 64)),
        (100, struct.pack(">I", 1 << 31)),
        (116, struct.pack(">I", 1 << 31)),
    ],
)
def test_a_damaged_header(tmp_path: Path, at: int, what: bytes) -> None:
    image = made(tmp_path / "image", "-u", "-b", "../s1/vda.qcow2", "-F", "qcow2")
    assert header(image).backing == "../s1/vda.qcow2"
    put(image, at, what)
    with pytest.raises(ValueError, match=r"its header is damaged|does not begin as a qcow2 image"):
        header(image)


@pytest.mark.parametrize("length", [0, 3, 71, 103])
def test_what_is_too_short_to_be_an_image(tmp_path: Path, length: int) -> None:
    image = made(tmp_path / "image")
    os.truncate(image, length)
    with pytest.raises(ValueError, match="does not begin as a qcow2 image"):
        header(image)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "-u", "-b", "../s1/vda.qcow2", "-F", "qcow2")
    put(image, image.read_bytes().index(b"../s1"), b"\xff\x1b\n")
    assert header(image).backing == "\udcff\x1b\ns1/vda.qcow2"


def test_whatever_a_header_holds() -> None:
    """It is a header, or an error that tells so; nothing else ever comes out of it."""
    chance = random.Random(1)
    ends: Counter[str] = Counter()
    fd = os.memfd_create("image")
    for _again in range(2000):
        content = bytearray(qcow2("../s1/vda.qcow2"))
        for _change in range(chance.randint(1, 4)):
            at = chance.choice((chance.randrange(len(content)), chance.choice(range(4, 128, 4))))
            what = chance.choice((chance.randbytes(4), struct.pack(">I", chance.randrange(1 << 16)), b"\xff\xff"))
            content[at : at + len(what)] = what
        length = chance.choice((len(content), chance.randrange(len(content))))
        os.truncate(fd, os.pwrite(fd, content[:length], 0))
        try:
            read_header(fd)
            ends["header"] += 1
        except ValueError as error:
            ends[str(error)] += 1
    os.close(fd)
    assert len(ends) == 3
    assert min(ends.values()) > 100
