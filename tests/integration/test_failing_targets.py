# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Targets that fail for a moment while the guest writes: a copy is right, or it fails with its reason.

What a guest overwrites is copied first. Where that fails, its write must fail too: a later copy of the place would hold
what the guest has written after the backup's moment, and no error would tell. Everything here is drawn at random, from
seeds: 5 tries of each, or as many as VMFLEET_TRIES says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import time
import typing as t
from collections import Counter

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.harness.backup import arguments, assert_absent, assert_good, release
from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

TRIES = int(os.environ.get("VMFLEET_TRIES", "5"))

SIZE = 16 * MIB
CLUSTER = 64 << 10
# QEMU copies one MiB at once, and then nothing before the test takes the brake off.
SPEED = 64 << 10
COPIED = MIB
# Where a new qcow2 image of this size has its first data.
FIRST_DATA = 5 * CLUSTER

ERRORS = "No space left on device|Input/output error"
REASONS = f"{ERRORS}|only .* are left"


@pytest.fixture
def content(directory: Path) -> Path:
    """A disk that is half full of random data: no two clusters are alike, and none can be compressed."""
    raw = directory / "content.raw"
    with raw.open("wb") as file:
        for start in range(0, SIZE, 2 * MIB):
            file.seek(start)
            file.write(random.randbytes(MIB))
        file.truncate(SIZE)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, directory / "content.qcow2")
    return directory / "content.qcow2"


@pytest.fixture
def mount(storage: Storage) -> FileSystem:
    """A file system that cannot reserve space."""
    return storage.mount("ext2", 24 * MIB)


class One:
    """A backup that drive_backup makes."""

    def __init__(self, vm: Qemu, directory: Path, chance: random.Random) -> None:
        self.format = chance.choice(["qcow2", "compressed", "raw"])
        self._fmt = "raw" if self.format == "raw" else "qcow2"
        self._target = directory / "target"
        options = {"format": self._fmt, "compress": self.format == "compressed"}
        self._arguments = arguments(vm, self._target, **options)

    def start(self) -> None:
        """Start the copy, which then waits until the test takes the brake off."""
        succeed("drive_backup", {**self._arguments, "state": "started", "speed": SPEED})

    def call(self) -> tuple[str, dict[str, t.Any]]:
        """What brings the backup to its end: a module, and its arguments."""
        return "drive_backup", self._arguments

    @property
    def published(self) -> bool:
        """Whether there is an image."""
        return self._target.exists()

    def check(self, copy: Path) -> None:
        """The image is whole, described, and has the content of the copy; or there is no trace of one."""
        if self.published:
            assert_good(self._target, copy, self._fmt)
        else:
            assert_absent(self._target)


class Set:
    """A set, full or an increment."""

    def __init__(self, vm: Qemu, directory: Path, chance: random.Random) -> None:
        self.format = chance.choice(["qcow2", "compressed"])
        self._vm = vm
        self._sets = Sets(directory)
        self._options = {"compression": "zstd" if self.format == "compressed" else "none"}
        self._id, self._level = "s1", "full"
        if chance.random() < 0.5:
            self._sets.back_up(vm, **self._options)
            self._id, self._level = "s2", "incremental"
            for start in range(0, SIZE, 2 * MIB):
                vm.write("drive0", chance.randrange(1, 255), start, MIB)
        self._plan: dict[str, t.Any] = {}

    def start(self) -> None:
        options = {"id": self._id, "level": self._level, "speed": str(SPEED), **self._options}
        self._plan = self._sets.plan(self._vm, **options)["plan"]
        # Without this it would not be left alone on a file system that cannot reserve space.
        succeed("backup_set", {"plan": self._plan, "state": "started", "unattended": True})

    def call(self) -> tuple[str, dict[str, t.Any]]:
        return "backup_set", {"plan": self._plan}

    @property
    def published(self) -> bool:
        return (self._sets.path / "vm" / self._id).exists()

    def check(self, copy: Path) -> None:
        if self.published:
            self._sets.assert_good("vm", {"drive0": copy}, self._id, {"drive0": self._level})
        else:
            left = {path.name for path in (self._sets.path / "vm").iterdir()}
            assert left <= {"s1", ".lock", f".{self._id}.failed.json"} - {self._id}


def write_somewhere(vm: Qemu, chance: random.Random) -> bool:
    """A guest's write into what the job has yet to copy, mostly; returns whether it succeeded."""
    length = chance.randrange(512, 4 * CLUSTER, 512)
    offset = chance.randrange(COPIED, SIZE - length, 512)
    said = vm.io("drive0", f"write -P {chance.randrange(1, 255)} {offset} {length}")
    assert said.startswith(f"wrote {length}/{length}") or re.search(ERRORS, said), said
    return said.startswith("wrote")


Trouble = contextlib.AbstractContextManager[None]
NO_TROUBLE = contextlib.nullcontext()


@dataclasses.dataclass
class Tries:
    """Makes backups, and counts how they end."""

    kind: type[One | Set]
    content: Path
    mount: FileSystem
    tally: Counter[str] = dataclasses.field(default_factory=Counter)

    def make(self, seed: int, start: Trouble = NO_TROUBLE, copy: Trouble = NO_TROUBLE) -> None:
        """One backup, with trouble while it is started, or for a while as it copies and the guest writes."""
        chance = random.Random(seed)
        source = shutil.copyfile(self.content, self.content.with_name("source.qcow2"))
        directory = self.mount.path / "try"
        directory.mkdir()
        with Qemu(Disk(source)) as vm:
            work = self.kind(vm, directory, chance)
            frozen = vm.freeze(vm.disks[0], source.with_name("frozen.qcow2"))
            with start:
                work.start()
            watched = ModuleProcess(*work.call()) if chance.random() < 0.3 else None
            with copy:
                felt = [write_somewhere(vm, chance) for _number in range(chance.randint(4, 8))].count(False)
                if chance.random() < 0.2:
                    release(vm)
                    time.sleep(chance.random() / 20)
            write_somewhere(vm, chance)
            release(vm)
            result = watched.result() if watched else run_module(*work.call())
            end = f"try {seed}: {work.format} {'watched' if watched else 'alone'}: {result.get('msg', 'completed')}"
            work.check(frozen)
            assert work.published != bool(result.get("failed")), end
            assert work.published or re.search(REASONS, result["msg"]), end
            # Nothing stands in the guest's way any more.
            assert vm.status == "running", end
            assert not leftovers(vm, directory), end
            vm.write("drive0", 0x11, COPIED, SIZE - COPIED)
        self.tally.update({"right" if work.published else "failed": 1, "writes of guests that failed": felt})
        shutil.rmtree(directory)


@pytest.fixture(params=[One, Set], ids=["drive_backup", "backup_set"])
def tries(
    request: pytest.FixtureRequest,
    content: Path,
    mount: FileSystem,
    record_property: t.Callable[[str, object], None],
) -> Iterator[Tries]:
    """What makes backups; at the end it tells how they went, which `-rP` shows and the result file keeps."""
    tries = Tries(request.param, content, mount)
    yield tries
    record_property("tally", dict(tries.tally))
    print(f"{request.node.name}: {TRIES} tries: {dict(tries.tally)}")
    # Else nothing was tried.
    assert tries.tally["writes of guests that failed"]
    assert tries.tally["right"]


@contextlib.contextmanager
def full(mount: FileSystem, leave: int) -> Iterator[None]:
    """Somebody else fills the file system, but for some bytes, and goes."""
    mount.fill(leave)
    yield
    mount.clear()


def test_full_for_a_moment(tries: Tries, mount: FileSystem) -> None:
    for seed in range(TRIES):
        leave = random.Random(seed).choice([0, 0, CLUSTER, 4 * CLUSTER])
        tries.make(seed, copy=full(mount, leave))


@contextlib.contextmanager
def one_error(number: int, error: int) -> Iterator[None]:
    """Targets have a layer of QEMU's own below the image, in which one write fails, the `number`th."""
    states = [{"event": "pwritev", "state": state, "new_state": state + 1} for state in range(1, number)]
    fault = {"event": "pwritev", "state": number, "iotype": "write", "errno": error, "once": True}
    node = Target.node

    def with_fault(target: Target, filename: str, direct: bool) -> str:
        options = json.loads(node(target, filename, direct)[len("json:") :])
        layer = {"driver": "blkdebug", "image": options["file"], "set-state": states, "inject-error": [fault]}
        return "json:" + json.dumps({**options, "file": layer})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "node", with_fault)
        yield


def test_one_error(tries: Tries) -> None:
    """No device is at hand that fails for one write alone, so that the product's targets get a layer which does."""
    for seed in range(TRIES):
        chance = random.Random(seed)
        tries.make(seed, start=one_error(chance.randint(2, 6), chance.choice([errno.EIO, errno.ENOSPC])))
