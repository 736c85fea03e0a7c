# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks opened with every combination of flags: drive-backup hands them to the target, where they must not matter.

The flags are those of -drive, which QEMU keeps with the disk's node. Each VM has many small disks of the same content.
"""

from __future__ import annotations

import itertools
import os
import shutil
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.harness.backup import arguments, partial, release
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, write
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from collections.abc import Sequence

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms

pytestmark = pytest.mark.usefixtures("clean")

SIZE = 4 * MIB
DATA = 2 * MIB
# A job of such a disk runs until the test takes the brake off.
SLOW = 64 << 10

CACHES = ["none", "writeback", "writethrough", "unsafe", "directsync"]
# The other modes have no O_DIRECT, without which QEMU refuses aio=native.
ACCESSES = [
    *(f"cache={cache},aio={aio}" for cache in CACHES for aio in ("threads", "io_uring")),
    *(f"cache={cache},aio=native" for cache in ("none", "directsync")),
]
ZEROES = [
    *(f"discard={discard},detect-zeroes={detect}" for discard in ("ignore", "unmap") for detect in ("off", "on")),
    "discard=unmap,detect-zeroes=unmap",
]
LOCKING = ["file.locking=auto", "file.locking=off"]
OTHERS = ["readonly=on", "auto-read-only=on", "copy-on-read=on", "media=cdrom"]


@pytest.fixture
def content(directory: Path) -> Path:
    """A disk with data, with zeroes that were written, and with a hole."""
    path = create(directory / "content.qcow2", SIZE)
    write(path, f"write -P 1 0 {MIB}", f"write -P 0 {MIB} {MIB}", f"write -P 2 {2 * MIB} {MIB}")
    return path


@pytest.fixture(scope="module")
def io_uring(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether QEMU can use io_uring here: containers often forbid it."""
    path = create(tmp_path_factory.mktemp("io_uring") / "disk.qcow2", SIZE)
    try:
        with Qemu(extra=["-drive", f"if=none,id=drive0,file={path},aio=io_uring"]):
            return True
    except AssertionError as error:
        if "uring" in str(error):
            return False
        raise


@pytest.fixture
def accesses(io_uring: bool) -> list[str]:
    """The ways to a disk that QEMU has here."""
    return [access for access in ACCESSES if io_uring or "io_uring" not in access]


def disks(directory: Path, content: Path, flags: Sequence[str]) -> list[str]:
    """QEMU's arguments for disks `disk<n>` of this content, each with its flags."""
    options = []
    for number, each in enumerate(flags):
        path = directory / f"disk{number}.qcow2"
        shutil.copyfile(content, path)
        options += ["-drive", f"if=none,id=disk{number},format=qcow2,file={path},{each}"]
    return options


def target_nodes(vm: Qemu) -> list[dict[str, t.Any]]:
    """The nodes of all targets: QEMU knows them by the file descriptors that it was passed."""
    nodes: list[dict[str, t.Any]] = vm.qmp.execute("query-named-block-nodes", flat=True)
    return [node for node in nodes if "/dev/fdset/" in node["file"] and node["drv"] != "copy-before-write"]


def identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return os.major(status.st_dev), os.minor(status.st_dev), status.st_ino


def locked_files() -> set[tuple[int, int, int]]:
    """Devices and inodes of all files that have a lock of the kind that QEMU takes."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    places = [line[5].split(":") for line in lines if line[1] == "OFDLCK"]
    return {(int(major, 16), int(minor, 16), int(inode)) for major, minor, inode in places}


def assert_flags(vm: Qemu, targets: Sequence[Path], fmt: str, protocol: str, direct: bool) -> None:
    """The targets are open as we want them, both the images and the files that they are in."""
    nodes = target_nodes(vm)
    assert sorted(node["drv"] for node in nodes) == sorted([fmt, protocol] * len(targets))
    for node in nodes:
        assert node["cache"] == {"direct": direct, "no-flush": False, "writeback": True}, node
        assert node["ro"] is False, node
        assert node["drv"] == protocol or node["detect_zeroes"] in ("on", "unmap"), node
    locked = locked_files()
    for target in targets:
        assert identity(target) in locked


class Kind(t.NamedTuple):
    """A kind of target, and whether it is open past the page cache."""

    format: str
    compress: bool
    direct: bool


KINDS = {
    "plain": Kind("qcow2", False, True),
    "buffered": Kind("qcow2", False, False),
    "compressed": Kind("qcow2", True, False),
    "raw": Kind("raw", False, True),
    "buffered raw": Kind("raw", False, False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snapshot", first(1, ["off", "on"]))
def test_flags_of_the_source(
    vms: Vms,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    content: Path,
    accesses: list[str],
    snapshot: str,
    kind: str,
) -> None:
    fmt, compress, direct = KINDS[kind]
    if not direct:
        # As on a file system without O_DIRECT, which has no stand-in here.
        monkeypatch.setattr(Target, "direct", False)
    combined = itertools.product(accesses, ZEROES)
    flags = [f"{','.join(each)},{locking}" for each, locking in zip(combined, itertools.cycle(LOCKING))]
    flags = [f"{each},snapshot={snapshot}" for each in flags] + OTHERS
    vm = vms.start(extra=disks(directory, content, flags))
    mount = storage.mount("ext4", (len(flags) + 1) * 5 * MIB + 32 * MIB)
    targets = [mount.path / f"target{number}" for number in range(len(flags))]
    drives = [{"device": f"disk{number}", "target": str(target)} for number, target in enumerate(targets)]
    given = arguments(vm, drives=drives, format=fmt, compress=compress)
    succeed("drive_backup", {**given, "state": "started", "speed": SLOW})
    assert_flags(vm, [partial(target) for target in targets], fmt, "file", direct)
    release(vm)
    succeed("drive_backup", given)
    for target, each in zip(targets, flags, strict=True):
        assert identical(content, target, other_format=fmt), each
        # The zeroes that were written take no space.
        assert fmt == "raw" or target.stat().st_blocks * 512 < DATA + MIB // 2, each


@pytest.mark.parametrize("kind", ["plain", "compressed", "raw"])
def test_block_device(
    vms: Vms, storage: Storage, directory: Path, content: Path, accesses: list[str], kind: str
) -> None:
    fmt, compress, direct = KINDS[kind]
    device = storage.loop(SIZE if fmt == "raw" else 2 * SIZE)
    vm = vms.start(extra=disks(directory, content, accesses))
    options = {"mode": "existing", "format": fmt, "overwrite": True, "compress": compress}
    for number, each in enumerate(accesses):
        if fmt == "raw":
            # What the backup does not write is to be seen.
            write(device, f"write -P 99 0 {SIZE}", fmt=fmt)
        else:
            # QEMU cannot write compressed data where an image has data.
            create(device, SIZE)
        given = arguments(vm, device, device=f"disk{number}", **options)
        succeed("drive_backup", {**given, "state": "started", "speed": SLOW})
        assert_flags(vm, [device], fmt, "host_device", direct)
        release(vm)
        succeed("drive_backup", given)
        assert identical(content, device, other_format=fmt), each


@pytest.mark.parametrize("compression", first(1, ["zstd", "none"]))
def test_set(vms: Vms, directory: Path, content: Path, accesses: list[str], compression: str) -> None:
    flags = [*accesses, *(f"{each},discard=unmap,detect-zeroes=unmap" for each in accesses)]
    vm = vms.start(vms.disk(), extra=disks(directory, content, flags))
    sets = Sets(directory / "repository")
    names = [f"disk{number}" for number in range(len(flags))]
    chosen = {"monitor": str(vm.monitor), "include_disks": names}
    sets.back_up(vms=[chosen], compression=compression)
    sets.assert_good("vm", dict.fromkeys(names, content))
    for name in names:
        vm.write(name, 3, 0, MIB)
    copies = {name: vm.freeze(Disk(directory / f"{name}.qcow2", id=name), directory / f"{name}.copy") for name in names}
    sets.back_up(vms=[chosen], compression=compression, id="s2", level="incremental")
    sets.assert_good("vm", copies, "s2", dict.fromkeys(names, "incremental"))
