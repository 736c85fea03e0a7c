# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a disk has data, as the real qemu-img tells it, and disks of which nothing tells that."""

from __future__ import annotations

import asyncio
import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import data_map, image_layout, qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.data_map import lay_out
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.image_layout import DataMap
from ansible_collections.vmfleet.backup.tests.harness import images
from ansible_collections.vmfleet.backup.tests.harness.images import create, patterned, write
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, SIZE, disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk

CLUSTER = 65536


def disk_of(path: Path, driver: str = "qcow2", size: int = SIZE, **values: t.Any) -> Disk:
    return disk(filename=str(path), driver=driver, virtual_size=size, **values)


def runs(*chain: Disk) -> list[tuple[int, int]] | None:
    """The runs of clusters that an image is laid out for; None where it is not."""
    layout = asyncio.run(lay_out(chain))
    return None if layout is None else list(layout.data.runs())


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked."""
    monkeypatch.delattr(qemu_img, "run_reading")


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_data_and_holes(fmt: str, tmp_path: Path) -> None:
    eighth, sixteenth = SIZE // 8 // CLUSTER, SIZE // 16 // CLUSTER
    path = patterned(tmp_path / "x", fmt, SIZE)
    assert runs(disk_of(path, fmt)) == [(at * eighth, at * eighth + sixteenth) for at in range(8)]


def test_what_is_trimmed_or_zero_is_no_data(tmp_path: Path) -> None:
    path = create(tmp_path / "x", SIZE)
    write(path, "write 0 4M", "write -z 1M 1M", "write -z -u 2M 1M")
    assert runs(disk_of(path)) == [(0, 16), (48, 64)]


def test_all_layers_count(tmp_path: Path) -> None:
    base = create(tmp_path / "base", SIZE)
    write(base, "write 0 1M", "write 8M 1M")
    top = create(tmp_path / "top", SIZE, backing=base)
    write(top, "write 4M 1k", "write -z 8M 512k")
    assert runs(disk_of(top), disk_of(base)) == [(0, 16), (64, 65), (136, 144)]


def test_pieces_smaller_than_a_cluster_are_rounded(tmp_path: Path) -> None:
    path = create(tmp_path / "x", SIZE, "raw")
    write(path, *(f"write {place} 4k" for place in range(MIB, 2 * MIB, 8192)), "write 5000k 4k", fmt="raw")
    # The first block of a raw file is always there: qemu-img writes it.
    assert runs(disk_of(path, "raw")) == [(0, 1), (16, 32), (78, 79)]


def test_a_disk_that_has_grown_or_shrunk_meanwhile(tmp_path: Path) -> None:
    path = create(tmp_path / "x", SIZE)
    write(path, f"write {SIZE - MIB} 1M")
    assert runs(disk_of(path, size=2 * SIZE)) == [(240, 256)]
    assert runs(disk_of(path, size=SIZE - MIB // 2)) == [(240, 248)]
    assert runs(disk_of(path, size=SIZE // 2)) is None


def test_nothing_to_lay_out(tmp_path: Path) -> None:
    assert runs(disk_of(create(tmp_path / "x", SIZE))) is None


@pytest.mark.parametrize("layers", [0, 1])
def test_storage_that_knows_of_no_holes_tells_nothing(layers: int, tmp_path: Path) -> None:
    """A block device, or a file that was written to its end: it may be full of zeroes."""
    base = create(tmp_path / "base", SIZE, "raw")
    write(base, f"write -P 0 0 {SIZE}", fmt="raw")
    chain = [disk_of(base, "raw")]
    if layers:
        images.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "top")
        chain.insert(0, disk_of(tmp_path / "top"))
    assert runs(*chain) is None
    if not layers:
        return
    write(tmp_path / "top", "write -z 0 1M")
    assert runs(*chain) == [(16, 256)]


def test_a_full_image_is_one_run(tmp_path: Path) -> None:
    path = create(tmp_path / "x", SIZE + 512)
    write(path, f"write 0 {SIZE + 512}")
    assert runs(disk_of(path, size=SIZE + 512)) == [(0, SIZE // CLUSTER + 1)]


@pytest.mark.usefixtures("no_program")
@pytest.mark.parametrize(
    "values",
    [
        {"filename": "nbd://server/x"},
        {"filename": 'json:{"driver": "raw", "file": {"driver": "rbd"}}'},
        {"filename": "images/relative"},
        {"filename": ""},
        {"actual_size": None},
    ],
    ids=str,
)
def test_disks_that_only_qemu_can_open_are_left_alone(values: dict[str, t.Any], tmp_path: Path) -> None:
    path = patterned(tmp_path / "x", size=SIZE)
    assert runs(disk(**{"filename": str(path), **values})) is None


def test_disks_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(disk_of(tmp_path / "missing")) is None
    path = patterned(tmp_path / "x", size=SIZE)
    assert runs(disk_of(path, "vmdk")) is None
    with path.open("r+b") as image:
        image.write(b"spoiled")
    assert runs(disk_of(path)) is None
    monkeypatch.setenv("PATH", "")
    assert runs(disk_of(path)) is None


def test_too_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = patterned(tmp_path / "x", size=SIZE)
    monkeypatch.setattr(image_layout, "MOST_RUNS", 7)
    assert runs(disk_of(path)) is None
    monkeypatch.setattr(image_layout, "MOST_RUNS", 8)
    assert len(runs(disk_of(path)) or ()) == 8


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Another program by the name of qemu-img."""
    program = tmp_path / "bin" / "qemu-img"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.mark.parametrize(
    "printed",
    [
        "no json",
        '[{"start": 0, "length": 65536',
        '[{"start": 0, "length": 65536, "zero": false}]',
        '[{"start": "0", "length": 65536, "zero": false, "data": true}]',
        json.dumps([{"start": at, "length": 65536, "zero": False, "data": True} for at in (65536, 0)]),
        '["data"]',
        "7",
    ],
)
def test_answers_that_make_no_sense(printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, f"cat <<'END'\n{printed}\nEND")
    assert runs(disk_of(tmp_path / "x")) is None


@pytest.mark.parametrize("script", ["exec cat /dev/zero", "exec yes '[{'", "exec sleep 60"], ids=str)
def test_a_program_without_an_end(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; {script}")
    run = qemu_img.run_reading

    async def run_shortly(command: list[str], take: t.Callable[[bytes], None]) -> None:
        await run(command, take, timeout=0.5)

    monkeypatch.setattr(qemu_img, "run_reading", run_shortly)
    assert runs(disk_of(tmp_path / "x")) is None


@pytest.mark.parametrize("piece", [1, 7, 100, 100_000])
def test_output_is_read_as_it_comes(piece: int) -> None:
    parts = [{"start": n * CLUSTER, "length": CLUSTER, "zero": n % 3 == 1, "data": n % 2 == 0} for n in range(200)]
    output = ("[" + ",\n".join(map(json.dumps, parts)) + "]\n").encode()
    reader = data_map._MapReader(DataMap(200 * CLUSTER))
    for at in range(0, len(output), piece):
        reader.take(output[at : at + piece])
    reader.end()
    found = [number for first, end in reader.data.runs() for number in range(first, end)]
    assert found == [number for number in range(200) if number % 2 == 0 and number % 3 != 1]
