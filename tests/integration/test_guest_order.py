# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Full images have their data in the order of the disk, and are right whatever has become of the disk meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import prepare
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import data_map, image_layout, model
from ansible_collections.vmfleet.backup.tests.harness import snapshots
from ansible_collections.vmfleet.backup.tests.harness.backup import (
    backup,
    partial,
    release,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.history import History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, qemu_img, sound, write
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.offline import NAME, OffHistory
from ansible_collections.vmfleet.backup.tests.harness.qcow2 import read_tables
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")

CLUSTER = 65536
SIZE = 600 * MIB + 3 * 512
"""More than one table, and an end within a cluster."""
RUNS = 40


def scattered(path: Path, fmt: str = "qcow2", size: int = SIZE) -> Path:
    """A disk with many pieces of data all over it, the last one at its end, each written after one behind it."""
    create(path, size, fmt)
    step = size // RUNS // CLUSTER * CLUSTER
    pieces = [f"write -P {number + 1} {number * step} {(1 + number % 5) * 300 * 1024}" for number in range(RUNS)]
    write(path, *reversed(pieces), f"write -P 99 {size - 5 * 512} {5 * 512}", fmt=fmt)
    return path


def data(path: Path) -> list[dict[str, int]]:
    """The parts of an image that have data, in the order of the disk."""
    return [extent for extent in json.loads(qemu_img("map", "--output=json", path)) if extent["data"]]


def backwards(path: Path) -> int:
    """How many parts stand in the file before the one that comes before them on the disk."""
    return sum(later["offset"] < former["offset"] for former, later in itertools.pairwise(data(path)))


def assert_in_order(path: Path) -> None:
    """No part stands before another one, and between the first and the last of them there is nothing else."""
    extents = data(path)
    assert len(extents) > RUNS // 2
    end = extents[0]["offset"]
    for extent in extents:
        assert extent["offset"] == end
        end += -(-extent["length"] // CLUSTER) * CLUSTER


def image_of(sets: Sets, set_id: str = "s1", disk: str = "drive0") -> Path:
    return sets.images(NAME, set_id)[disk]


def start(vms: Vms, directory: Path, fmt: str = "qcow2", **options: t.Any) -> Qemu:
    path = scattered(directory / f"disk.{fmt}", fmt)
    return vms.start(Disk(path, format=fmt, **options), name=NAME)


@pytest.fixture
def history(vms: Vms, sets: Sets, directory: Path) -> History:
    return History(start(vms, directory), sets, directory)


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_a_set(fmt: str, vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(start(vms, directory, fmt), sets, directory)
    history.back_up("s1")
    history.back_up("s2", level="full")
    history.check()
    images = [image_of(sets, "s1"), image_of(sets, "s2")]
    for image in images:
        assert_in_order(image)
    # The data and its place are the same. What tells of zeroes QEMU adds in any order.
    tables = [read_tables(image) for image in images]
    assert tables[0].data == tables[1].data
    begin = min(tables[0].data.values())
    length = len(tables[0].data) * CLUSTER
    contents = [image.read_bytes()[begin : begin + length] for image in images]
    assert contents[0] == contents[1]
    # Nothing is reserved any more that is not used.
    assert all(abs(image.stat().st_blocks * 512 - image.stat().st_size) < 4 * CLUSTER for image in images)


def test_it_has_the_options_of_other_images(history: History, sets: Sets, directory: Path) -> None:
    history.back_up("s1")
    other = create(directory / "other", SIZE)
    told, expected = (info(path) for path in (image_of(sets), other))
    assert told["format-specific"] == expected["format-specific"]
    assert told["virtual-size"] == expected["virtual-size"]
    assert told["cluster-size"] == expected["cluster-size"]


def test_increments_build_on_it(history: History, sets: Sets, directory: Path) -> None:
    history.back_up("s1")
    history.vm.write("drive0", 0xA1, 3 * MIB + 512, 5 * MIB)
    assert history.back_up("s2") == "incremental"
    history.vm.io("drive0", "write -z 10M 50M")
    assert history.back_up("s3") == "incremental"
    history.check()
    succeed("backup_verify", {"repository": str(sets.path), "depth": "image"})
    for set_id in ("s1", "s3"):
        target = directory / f"restored-{set_id}.qcow2"
        disks = [{"name": "drive0", "target": str(target)}]
        succeed("backup_restore", {"repository": str(sets.path), "vm": NAME, "id": set_id, "disks": disks})
        assert identical(history.copies(set_id)["drive0"], target)
    succeed("backup_prune", {"repository": str(sets.path), "keep_last": 1, "consolidate": True})
    assert sets.levels(NAME, "s3") == {"drive0": "full"}
    assert identical(history.copies("s3")["drive0"], image_of(sets, "s3"))


def test_what_qemu_has_not_flushed_comes_last(history: History, sets: Sets) -> None:
    """The map is stale: of clusters that QEMU has in its memory only, nobody else knows."""
    history.vm.write("drive0", 0xB1, 8 * MIB, 4 * MIB)
    history.vm.write("drive0", 0xB2, 500 * MIB, MIB)
    result = sets.back_up(history.vm, id="s1")
    assert result["vms"][0]["state"] == "published"
    history.freeze("s1")
    history.note("s1")
    history.check()
    assert len(data(image_of(sets))) > RUNS


@pytest.mark.parametrize("deed", ["write -P 7 0 100M", "write -z 0 300M", "write -z -u 0 300M", "discard 0 300M"])
def test_the_disk_changes_after_the_map(
    deed: str, vms: Vms, sets: Sets, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(start(vms, directory, discard=True), sets, directory)
    path = str(history.vm.disks[0].path)
    seen = model.Disk("drive0", "n0", "qcow2", filename=path, virtual_size=SIZE, actual_size=SIZE)
    stale = asyncio.run(data_map.lay_out([seen]))
    assert stale

    async def lay_out(_chain: object) -> object:
        return stale

    monkeypatch.setattr(data_map, "lay_out", lay_out)
    history.vm.io("drive0", deed)
    result = sets.back_up(history.vm, id="s1")
    assert result["vms"][0]["state"] == "published"
    history.freeze("s1")
    history.note("s1")
    history.check()
    image = image_of(sets)
    # What is zero by now takes no space.
    held = sum(extent["length"] for extent in data(image))
    assert image.stat().st_blocks * 512 < held + 2 * MIB


def test_the_guest_writes_during_the_copy(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(start(vms, directory, discard=True), sets, directory)
    history.freeze("s1")
    plan = sets.start(history.vm, id="s1")
    for number in range(20):
        history.vm.write("drive0", 0xC0 + number, (600 - 25 * number) * MIB - 300 * 1024, 200 * 1024)
    history.vm.io("drive0", "discard 100M 100M")
    history.vm.io("drive0", "write -z 300M 100M")
    release(history.vm)
    succeed("backup_set", {"plan": plan})
    history.note("s1")
    history.check()
    assert_in_order(image_of(sets))
    history.back_up("s2")
    history.check()


def test_written_zeroes_take_no_space(vms: Vms, sets: Sets, directory: Path) -> None:
    """A guest that fills its free space with zeroes has small copies."""
    path = scattered(directory / "disk.qcow2")
    write(path, "write -P 0 100M 200M")
    history = History(vms.start(Disk(path), name=NAME), sets, directory)
    history.back_up("s1")
    history.check()
    image = image_of(sets)
    held = sum(extent["length"] for extent in data(image))
    assert image.stat().st_blocks * 512 < held + 2 * MIB
    assert backwards(image) == 0


@pytest.mark.parametrize("like_libvirt", [True, False])
def test_a_disk_of_layers(like_libvirt: bool, history: History, sets: Sets, directory: Path) -> None:
    vm = history.vm
    for number in range(3):
        snapshots.take(vm, ("n0", "s0", "s1")[number], directory / f"layer{number}", f"s{number}", like_libvirt)
        vm.write("drive0", 0xD0 + number, (5 + 200 * number) * MIB, MIB)
        vm.io("drive0", f"write -z {(20 + 150 * number)}M 30M")
        vm.io("drive0", "flush")
    top = Disk(directory / "layer2")
    copy = vm.freeze(top, directory / "copy.qcow2")
    assert sets.back_up(vm, id="s1")["vms"][0]["state"] == "published"
    sets.assert_good(NAME, {"drive0": copy}, "s1")
    assert_in_order(image_of(sets))


def test_a_vm_that_is_off(vms: Vms, sets: Sets, directory: Path) -> None:
    off = OffHistory(start(vms, directory), sets, directory)
    off.vm.quit()
    assert off.make("s1")["level"] == "full"
    assert_in_order(image_of(sets))
    off.write(0xA1, MIB, 65536)
    assert off.make("s2")["level"] == "incremental"
    off.check()


def test_several_disks(vms: Vms, sets: Sets, directory: Path) -> None:
    disks = [Disk(scattered(directory / f"{n}.qcow2"), id=f"drive{n}", node=f"n{n}", format="qcow2") for n in range(2)]
    empty = Disk(create(directory / "empty.qcow2", SIZE), id="drive2", node="n2")
    full = create(directory / "full.qcow2", 16 * MIB)
    write(full, "write -P 5 0 16M")
    history = History(vms.start(*disks, empty, Disk(full, id="drive3", node="n3"), name=NAME), sets, directory)
    history.back_up("s1")
    history.check()
    for number in range(2):
        assert_in_order(image_of(sets, disk=f"drive{number}"))
    assert len(data(image_of(sets, disk="drive3"))) == 1


class TestWithoutAMap:
    """Where nothing tells which clusters there will be, QEMU chooses them, as it does in all other images."""

    def test_a_block_device(self, vms: Vms, sets: Sets, storage: Storage, directory: Path) -> None:
        device = storage.loop(64 * MIB)
        write(device, "write -P 3 1M 5M", fmt="raw")
        disk = Disk(device, format="raw", file={"driver": "host_device", "filename": str(device)})
        history = History(vms.start(disk, name=NAME), sets, directory)
        history.back_up("s1")
        history.check()
        # It is not as long as the device, of which nothing tells where it is zero.
        assert image_of(sets).stat().st_size < 8 * MIB

    @pytest.mark.parametrize("compression", ["zstd", "zlib"])
    def test_compressed(self, compression: str, history: History, sets: Sets) -> None:
        history.back_up("s1", compression=compression)
        history.check()
        assert image_of(sets).stat().st_size < 8 * MIB

    def test_too_many_parts(self, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_layout, "MOST_RUNS", RUNS // 2)
        monkeypatch.delattr(image_layout.ImageLayout, "write")
        history.back_up("s1")
        history.check()

    def test_a_file_system_without_holes(self, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such as FAT, which writes all by which a file is made longer."""
        monkeypatch.setattr(prepare, "keeps_holes", lambda *_args: False)
        monkeypatch.delattr(image_layout.ImageLayout, "write")
        history.back_up("s1")
        history.check()


class TestDriveBackup:
    def test_a_new_image(self, vms: Vms, directory: Path, target: Path) -> None:
        vm = start(vms, directory)
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        backup(vm, target)
        assert identical(copy, target)
        assert sound(target)
        assert_in_order(target)
        assert not backup(vm, target)["changed"]

    def test_written_zeroes_take_no_space(self, vms: Vms, directory: Path, target: Path) -> None:
        path = scattered(directory / "disk.qcow2")
        write(path, "write -P 0 100M 200M")
        vm = vms.start(Disk(path))
        backup(vm, target)
        assert identical(path, target)
        assert target.stat().st_blocks * 512 < 40 * MIB
        assert not backup(vm, target)["changed"]

    def test_writes_during_the_copy(self, vms: Vms, directory: Path, target: Path) -> None:
        vm = start(vms, directory)
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        start_slowly(vm, target)
        status = partial(target).stat()
        assert status.st_blocks * 512 >= status.st_size
        vm.write("drive0", 0xEE, 400 * MIB, 50 * MIB)
        release(vm)
        assert "error" not in wait_concluded(vm)
        backup(vm, target)
        assert identical(copy, target)
        assert sound(target)
        assert_in_order(target)

    def test_raw_and_compressed(self, vms: Vms, directory: Path, target: Path) -> None:
        vm = start(vms, directory)
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        backup(vm, target, compress=True)
        assert identical(copy, target)
        backup(vm, target.with_name("x.raw"), format="raw")
        assert identical(copy, target.with_name("x.raw"), other_format="raw")
