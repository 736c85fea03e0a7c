# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Chains of real images are read as their manifests have them; one that says anything else is refused."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import WrongEntry
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_commands
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import qemu_img as commands
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.image_chain import ImageRefused, Layer, open_chain
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, qemu_img, write

if t.TYPE_CHECKING:
    from pathlib import Path

SIZE = 8 * MIB


def image(path: Path, backing: str | None = None, *, cluster: int = 65536) -> Path:
    path.parent.mkdir(exist_ok=True)
    below = ("-u", "-b", backing, "-F", "qcow2") if backing else ()
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", *below, path, str(SIZE))
    return path


@pytest.fixture
def layers(tmp_path: Path) -> list[Layer]:
    """Three images, as a repository has them."""
    first = image(tmp_path / "s1" / "vda.qcow2", cluster=2 * MIB)
    second = image(tmp_path / "s2" / "vda.qcow2", "../s1/vda.qcow2", cluster=4096)
    third = image(tmp_path / "s3" / "vda.qcow2", "../s2/vda.qcow2")
    for number, path in enumerate((first, second, third), start=1):
        write(path, f"write -P {number} {number}M 1M")
    return [
        Layer((str(tmp_path), "s3", "vda.qcow2"), SIZE, "../s2/vda.qcow2"),
        Layer((str(tmp_path), "s2", "vda.qcow2"), SIZE, "../s1/vda.qcow2"),
        Layer((str(tmp_path), "s1", "vda.qcow2"), SIZE, None),
    ]


def copied(layers: list[Layer], target: Path) -> Path:
    with open_chain(layers) as chain:
        asyncio.run(commands.run(image_commands.convert_command(chain.name, str(target), "raw"), pass_fds=chain.fds))
    return target


def test_a_chain_reads_as_qemu_reads_it(layers: list[Layer], tmp_path: Path) -> None:
    path = tmp_path / "s3" / "vda.qcow2"
    assert identical(path, copied(layers, tmp_path / "copy"), other_format="raw")
    # What is read is what was opened, whatever has these names by then.
    with open_chain(layers) as chain:
        wanted = (tmp_path / "copy").read_bytes()
        for layer in layers:
            os.unlink(layer.path)
            create(tmp_path / "other", SIZE).rename(layer.path)
        command = image_commands.convert_command(chain.name, str(tmp_path / "again"), "raw")
        asyncio.run(commands.run_long(command, chain.fds))
    assert (tmp_path / "again").read_bytes() == wanted


def test_every_layer_is_given_and_its_tables_are_read_whole(layers: list[Layer]) -> None:
    with open_chain(layers) as chain:
        node = json.loads(chain.name[len("json:") :])
        for fd, entries in zip(chain.fds, (65536, 4096, 65536), strict=True):
            assert (node["driver"], node["l2-cache-entry-size"]) == ("qcow2", entries)
            assert node["file"] == {"driver": "file", "filename": f"/proc/self/fd/{fd}"}
            node = node["backing"]
        assert node is None


def test_one_image_alone_is_read_without_what_it_builds_on(layers: list[Layer], tmp_path: Path) -> None:
    copied(layers[1:2], tmp_path / "copy")
    content = (tmp_path / "copy").read_bytes()
    assert content == bytes(2 * MIB) + b"\2" * MIB + bytes(SIZE - 3 * MIB)


def test_nothing_is_left_open(layers: list[Layer]) -> None:
    before = os.listdir("/proc/self/fd")
    with open_chain(layers):
        assert len(os.listdir("/proc/self/fd")) == len(before) + 3
    os.truncate(layers[2].path, 10)
    with pytest.raises(ImageRefused), open_chain(layers):
        pass
    os.unlink(layers[2].path)
    with pytest.raises(FileNotFoundError), open_chain(layers):
        pass
    assert os.listdir("/proc/self/fd") == before


def test_more_images_than_a_process_may_have_open_by_itself(layers: list[Layer]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    try:
        with open_chain(layers[2:] * 50) as chain:
            assert len(chain.fds) == 50
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("options", "changed", "reason"),
    [
        ([], {"size": SIZE + 512}, f"it has {SIZE} bytes, and the disk had {SIZE + 512}"),
        ([], {"backing": "../s1/a.qcow2"}, "it builds on nothing, but must build on '../s1/a.qcow2'"),
        (["-u", "-b", "/srv/x", "-F", "qcow2"], {}, "it builds on '/srv/x', but must build on nothing"),
        (["-u", "-b", "../s2/a", "-F", "qcow2"], {"backing": "../s1/a"}, "it builds on '../s2/a', but must build on"),
        (["-u", "-b", "../s1/a", "-F", "raw"], {"backing": "../s1/a"}, "it builds on '../s1/a' as 'raw', but must"),
        (["-o", "data_file={}/data"], {}, "its data is in another file ('{}/data')"),
        (
            ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s"],
            {},
            "it is encrypted",
        ),
    ],
)
def test_what_a_header_says_has_to_fit(
    tmp_path: Path, options: list[str], changed: dict[str, t.Any], reason: str
) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", *(word.format(tmp_path) for word in options), path, str(SIZE))
    layer = Layer((str(tmp_path), "image"), SIZE, None)._replace(**changed)
    with pytest.raises(ImageRefused) as refused, open_chain([layer]):
        pass
    assert str(refused.value).startswith(f"image {path} is that of another disk or set, or was changed: ")
    assert reason.format(tmp_path) in str(refused.value)


def test_a_raw_image_is_never_taken_for_another(tmp_path: Path) -> None:
    path = create(tmp_path / "image", SIZE, "raw")
    reason = f"image {path} is damaged: it does not begin as a qcow2 image does"
    with pytest.raises(ImageRefused, match=reason), open_chain([Layer((str(tmp_path), "image"), SIZE, None)]):
        pass


def test_links_and_pipes_are_not_opened(layers: list[Layer], tmp_path: Path) -> None:
    """Neither as an image, nor as the directory of one."""
    (tmp_path / "link").symlink_to(layers[2].path)
    (tmp_path / "s9").symlink_to(tmp_path / "s1")
    os.mkfifo(tmp_path / "pipe")
    for place, kind in (
        (("link",), "a symbolic link"),
        (("s9", "vda.qcow2"), "a symbolic link"),
        (("pipe",), "a named"),
    ):
        strange = layers[2]._replace(place=(str(tmp_path), *place))
        with pytest.raises(WrongEntry, match=f"{place[0]} is {kind}"), open_chain([strange]):
            pass
