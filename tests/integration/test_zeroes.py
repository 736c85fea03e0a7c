# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Zeroes are free: what is read and done for a large disk with little in it is what its content and tables ask for."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, write
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Library
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

GIB = 1 << 30
SIZE = 512 * GIB
TABLES = SIZE // (512 * MIB)
"""One for each 512 MiB: QEMU gives the image of a full backup all of them."""
DATA = 16 * MIB

SHIM = """#!{python}
import json, os, subprocess, sys
child = subprocess.Popen(["{real}", *sys.argv[1:]], close_fds=False)
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
done = dict(line.split(": ") for line in open("/proc/%d/io" % child.pid).read().splitlines())
_pid, status, usage = os.wait4(child.pid, 0)
told = {{"command": sys.argv[1], "reads": int(done["syscr"]), "bytes": int(done["rchar"])}}
told["cpu"] = usage.ru_utime + usage.ru_stime
with open("{log}", "a") as log:
    log.write(json.dumps(told) + chr(10))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Large:
    """A thin disk of 512 GiB with 16 MiB in four places: a full set, and an increment on it."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.library = Library(directory / "repository")
        self.source = create(directory / "source.qcow2", SIZE)
        places = [number * SIZE // 4 for number in range(4)]
        write(self.source, *(f"write -P {1 + number} {at} {DATA // 4}" for number, at in enumerate(places)))
        vm = Vms(directory, stack).start(Disk(self.source, id="drive0", node="n0", format="qcow2"), name=NAME)
        self.library.back_up(vm, id="s1")
        vm.write("drive0", 9, GIB, 65536)
        self.library.back_up(vm, id="s2")
        assert self.library.levels(NAME, "s2") == {"drive0": "incremental"}
        vm.quit()


@pytest.fixture(scope="module")
def large() -> t.Iterator[Large]:
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        yield Large(Path(path), stack)


@pytest.fixture
def work(directory: Path, monkeypatch: pytest.MonkeyPatch) -> t.Callable[[], dict[str, dict[str, float]]]:
    """What each command of qemu-img has cost so far, the dearest run of each."""
    log = directory / "log"
    (directory / "bin").mkdir()
    program = directory / "bin" / "qemu-img"
    program.write_text(SHIM.format(python=sys.executable, real=shutil.which("qemu-img"), log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    def told() -> dict[str, dict[str, float]]:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return {line["command"]: line for line in sorted(lines, key=lambda line: float(line["cpu"]))}

    return told


def assert_cheap(cost: dict[str, float]) -> None:
    """The tables are read, each at once, for what there is and for the content, and the content; little more."""
    passes = 2
    # Each comes with a read of an event. By 4 KiB there were 16 times as many.
    assert cost["reads"] < 3 * passes * TABLES + DATA // 65536 + 600, cost
    assert cost["bytes"] < passes * TABLES * 65536 + DATA + 4 * MIB, cost
    # To write its zeroes took 5 seconds.
    assert cost["cpu"] < 1.5, cost


def test_verification(large: Large, work: t.Callable[[], dict[str, dict[str, float]]]) -> None:
    for set_id in ("s1", "s2"):
        succeed("backup_verify", {"repository": str(large.library.path), "id": set_id, "depth": "image"})
    assert_cheap(work()["convert"])


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_restoration(
    large: Large, directory: Path, fmt: str, work: t.Callable[[], dict[str, dict[str, float]]]
) -> None:
    target = directory / "d"
    large.library.restore(disks=[{"name": "drive0", "target": str(target), "format": fmt}])
    cost = work()
    assert identical(large.source, target, other_format=fmt)
    assert target.stat().st_blocks * 512 < 2 * DATA
    assert_cheap(cost["convert"])
    assert_cheap(cost["measure"])


def test_restoration_onto_a_device(
    large: Large, storage: Storage, work: t.Callable[[], dict[str, dict[str, float]]]
) -> None:
    device = storage.loop(SIZE)
    write(device, "write -P 7 0 1M", f"write -P 7 {5 * GIB} 1M", fmt="raw")
    disks = [{"name": "drive0", "target": str(device), "format": "raw"}]
    large.library.restore(disks=disks, overwrite=True)
    assert_cheap(work()["convert"])
    # To compare all of a device takes minutes: nothing tells where its zeroes are.
    with device.open("rb") as content:
        for at, pattern in ((0, 1), (SIZE // 4, 2), (SIZE // 2, 3), (3 * SIZE // 4, 4), (GIB, 9), (5 * GIB, 0)):
            content.seek(at)
            assert content.read(65536) == bytes([pattern]) * 65536


def test_consolidation(large: Large, directory: Path, work: t.Callable[[], dict[str, dict[str, float]]]) -> None:
    library = large.library.copy(directory / "repository")
    library.prune(keep_last=1, consolidate=True)
    assert library.levels(NAME, "s2") == {"drive0": "full"}
    cost = work()
    assert identical(large.source, library.images(NAME, "s2")["drive0"])
    assert_cheap(cost["convert"])
    assert_cheap(cost["compare"])


def test_room_for_a_thin_disk(vms: Vms, directory: Path, storage: Storage) -> None:
    """What a disk of 60 TiB takes is asked for, and not the tables that it had if it were full."""
    library = Library(directory / "repository")
    vm = vms.start(vms.disk(0, size=8 * MIB), name=NAME)
    library.back_up(vm)
    [image] = library.images(NAME).values()
    size = 60 << 40
    image.unlink()
    write(create(image, size), "write -P 3 20T 1M")
    library.rewrite(
        "s1",
        disks=[
            {**library.manifest(NAME)["disks"][0], "virtual_size": size, "sha256": None, "bytes": image.stat().st_size}
        ],
    )
    mount = storage.mount("tmpfs", 24 * MIB)
    library.restore(disks=[{"name": "drive0", "target": str(mount.path / "d"), "format": "qcow2"}], checksum=False)
    assert identical(image, mount.path / "d")


class TestNothingIsPassedOver:
    """All that is in an image is read, and all that tells where it is."""

    @pytest.fixture
    def sets(self, large: Large, directory: Path) -> Library:
        library = large.library.copy(directory / "repository")
        for set_id in ("s1", "s2"):
            disks = [{**disk, "sha256": None} for disk in library.manifest(NAME, set_id)["disks"]]
            library.rewrite(set_id, disks=disks)
        return library

    def verify(self, library: Library) -> str:
        return str(fail("backup_verify", {"repository": str(library.path), "depth": "image"})["msg"])

    def test_a_table(self, sets: Library) -> None:
        image = sets.images(NAME, "s1")["drive0"]
        with image.open("r+b") as file:
            file.seek(40)
            first = int.from_bytes(file.read(8), "big")
            # One in the middle of nothing but zeroes, of which the tables tell.
            file.seek(first + 8 * (TABLES // 2 + 7))
            file.write((1 << 63 | 3 << 50).to_bytes(8, "big"))
        assert f"image {image} is damaged" in self.verify(sets)

    def test_the_end_of_the_data(self, sets: Library) -> None:
        image = sets.images(NAME, "s2")["drive0"]
        size = image.stat().st_size
        with image.open("r+b") as file:
            file.truncate(size // 65536 * 65536 - 65536)
        disks = [{**sets.manifest(NAME, "s2")["disks"][0], "bytes": image.stat().st_size}]
        sets.rewrite("s2", disks=disks)
        assert str(image) in self.verify(sets)
