# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The header of an image says something that the manifest does not. Whoever wrote it has signed the manifest anew.

Nothing but the collection ever looks at such an image: no file that is named is opened, and nobody is connected to.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.booting import boot
from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.headers import BACKING_FORMAT, DATA_FILE_NAME, put, rewrite, sign
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE
from ansible_collections.vmfleet.backup.tests.harness.hostile import NEIGHBOUR, ODD, Canary, Pair, ask

Change = t.Callable[[Path, "World"], None]
OTHER = "is that of another disk or set, or was changed: "
DAMAGED = "is damaged: "


class World:
    """What an image can name: a file outside, and somebody who listens, and hears nothing."""

    def __init__(self, canary: Canary, port: int) -> None:
        self.canary = canary
        self.port = port


def header(backing: str | None = "", **changes: t.Any) -> Change:
    """A change of some fields. A name may have the canary's and the listener's in it."""

    def change(image: Path, world: World) -> None:
        name = backing and backing.format(canary=world.canary.file, port=world.port)
        rewrite(image, backing=name, **changes)

    return change


def data_file(name: str, features: int = 0b100) -> Change:
    """An image whose data are somewhere else."""

    def change(image: Path, world: World) -> None:
        where = name.format(canary=world.canary.file, port=world.port).encode()
        rewrite(
            image,
            features=features,
            extensions={BACKING_FORMAT: b"qcow2", **({DATA_FILE_NAME: where} if where else {})},
        )

    return change


def begin(content: bytes) -> Change:
    """A file that begins like something else."""
    return lambda image, _world: put(image, content.ljust(image.stat().st_size, b"\0"))


BUILDS = f"{OTHER}it builds on "
ELSEWHERE = f"{OTHER}its data is in another file"
BROKEN = f"{DAMAGED}its header is damaged"
CASES: dict[str, tuple[Change, str]] = {
    "file outside": (header("{canary}"), BUILDS),
    "file outside by a relative path": (
        header("../../../outside/notes.txt"),
        f"{BUILDS}'../../../outside/notes.txt', but",
    ),
    "file outside by a URL": (header("file:{canary}"), f"{BUILDS}'file:"),
    "file outside by JSON": (header('json:{{"driver": "file", "filename": "{canary}"}}'), f"{BUILDS}'json:"),
    "device": (header("/dev/null"), f"{BUILDS}'/dev/null', but"),
    "NBD server": (header("nbd://127.0.0.1:{port}/x"), f"{BUILDS}'nbd://127.0.0.1:"),
    "NBD server, old form": (header("nbd:127.0.0.1:{port}:exportname=x"), f"{BUILDS}'nbd:127.0.0.1:"),
    "NBD server by JSON": (
        header('json:{{"driver": "nbd", "server": {{"type": "inet", "host": "127.0.0.1", "port": "{port}"}}}}'),
        f"{BUILDS}'json:",
    ),
    "web server": (header("http://127.0.0.1:{port}/x"), f"{BUILDS}'http://127.0.0.1:"),
    "SSH server": (header("ssh://nobody@127.0.0.1:{port}/x"), f"{BUILDS}'ssh://nobody@127.0.0.1:"),
    "image of another disk": (header("../s1/drive1.qcow2"), f"{BUILDS}'../s1/drive1.qcow2', but must build on "),
    "image of another VM": (header(f"../../{NEIGHBOUR}/s1/drive0.qcow2"), f"{BUILDS}'../../db01/"),
    "image of a set that is not there": (header("../s0/drive0.qcow2"), f"{BUILDS}'../s0/"),
    "the right one by its path": (header("file:../s1/drive0.qcow2"), f"{BUILDS}'file:../s1/"),
    "the right one and more": (header("../s1/drive0.qcow2\0x"), f"{BUILDS}'../s1/drive0.qcow2\\x00x'"),
    "nothing": (header(None), f"{BUILDS}nothing, but must build on '../s1/drive0.qcow2'"),
    "what would move a cursor": (header("\x1b[2J\x07\u202e\x9b"), BUILDS + repr("\x1b[2J\x07\u202e\x9b")),
    "what is no text": (header("\udcff\udcfe"), f"{BUILDS}'\\udcff\\udcfe'"),
    "as another format": (
        header(extensions={BACKING_FORMAT: b"raw"}),
        f"{OTHER}it builds on '../s1/drive0.qcow2' as 'raw'",
    ),
    "as a format that is none": (
        header(extensions={BACKING_FORMAT: b"\x1b[1m"}),
        "as '\\x1b[1m', but must do so as qcow2",
    ),
    "data in a file outside": (data_file("{canary}"), f"{ELSEWHERE} ('"),
    "data in a file beside": (data_file("drive1.qcow2"), f"{ELSEWHERE} ('drive1.qcow2')"),
    "data on an NBD server": (data_file("nbd://127.0.0.1:{port}/x"), f"{ELSEWHERE} ('nbd://127.0.0.1:"),
    "data in a file by JSON": (data_file('json:{{"driver": "file", "filename": "{canary}"}}'), f"{ELSEWHERE} ('json:"),
    "data in a file without a name": (data_file(""), f"{ELSEWHERE} (nothing)"),
    "a data file that is not used": (data_file("{canary}", features=0), f"{ELSEWHERE} ('"),
    "larger": (header(size=2 * SIZE), f"{OTHER}it has {2 * SIZE} bytes, and the disk had {SIZE}"),
    "smaller": (header(size=SIZE // 2), f"{OTHER}it has {SIZE // 2} bytes"),
    "empty": (header(size=0), f"{OTHER}it has 0 bytes"),
    "endless": (header(size=(1 << 64) - 512), f"{OTHER}it has 18446744073709551104 bytes"),
    "encrypted": (header(encryption=1), f"{OTHER}it is encrypted"),
    "encrypted with LUKS": (header(encryption=2), f"{OTHER}it is encrypted"),
    "encrypted with something": (header(encryption=99), f"{OTHER}it is encrypted"),
    "of a first version": (header(version=1), BROKEN),
    "of a later version": (header(version=4), BROKEN),
    "small clusters": (header(cluster_bits=8), BROKEN),
    "huge clusters": (header(cluster_bits=22), BROKEN),
    "clusters of any size": (header(cluster_bits=0xFFFFFFFF), BROKEN),
    "short": (header(length=64), BROKEN),
    "long": (header(length=1 << 31), BROKEN),
    "a name beyond the header": (header(name_at=65537), BROKEN),
    "a name beyond the file": (header(name_at=1 << 63), BROKEN),
    "a name within the header": (header(name_at=16), BROKEN),
    "a name that is too long": (header("x" * 1024), BROKEN),
    "an extension that is too long": (header(extensions={BACKING_FORMAT: b"qcow2", 0x7FFFFFFF: b"x" * 4000}), BROKEN),
    "raw": (begin(b""), f"{DAMAGED}it does not begin as a qcow2 image does"),
    "raw with a boot sector": (begin(b"\xfa".ljust(510, b"\0") + b"\x55\xaa"), f"{DAMAGED}it does not begin"),
    "VMDK": (begin(b'# Disk DescriptorFile\nRW 16384 FLAT "/etc/hostname" 0\n'), f"{DAMAGED}it does not begin"),
    "LUKS": (begin(b"LUKS\xba\xbe\x00\x01"), f"{DAMAGED}it does not begin"),
    "QED": (begin(b"QED\0" + struct.pack("<II", 65536, 4)), f"{DAMAGED}it does not begin"),
    "half a magic": (begin(b"QFI"), f"{DAMAGED}it does not begin"),
}
"""What is done to drive0 of the increment s2, and what is said of that image."""


def vm_of(case: str) -> str:
    return "vm-" + "".join(letter if letter.isalnum() else "-" for letter in case)


class Zoo:
    """A repository with one VM for each case, beside their healthy neighbour."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        pair = Pair.made(Vms(path, stack), path)
        self.pair = pair
        self.path = pair.library.path
        self.canary = Canary(path / "outside")
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.setblocking(False)
        # What is run by the collection to look at images is noted.
        self.log = path / "commands"
        (path / "bin").mkdir()
        for program in ("qemu-img", "qemu-io", "qemu-system-x86_64"):
            real = shutil.which(program)
            script = path / "bin" / program
            script.write_text(f'#!/bin/sh\necho "{program} $*" >>{self.log}\nexec {real} "$@"\n')
            script.chmod(0o755)
        # The VM of the neighbour stays as it is; of the other one, the names are in the way.
        self.world = World(self.canary, self.listener.getsockname()[1])
        for case, (change, _said) in CASES.items():
            self.add(vm_of(case), change, "s2")
        self.add("vm-full", header("{canary}"), "s1")
        shutil.rmtree(self.path / ODD)
        self.before = snapshot(self.path)

    def add(self, name: str, change: Change, set_id: str) -> None:
        directory = self.path / name
        shutil.copytree(self.path / ODD, directory)
        change(directory / set_id / "drive0.qcow2", self.world)
        sign(directory, name)

    def ran(self) -> list[str]:
        """What was run since the last time."""
        found = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return found

    def image(self, name: str, set_id: str = "s2") -> Path:
        return self.path / name / set_id / "drive0.qcow2"

    def assert_nobody_was_touched(self) -> None:
        """Nobody outside was written to or talked to."""
        self.canary.assert_untouched()
        with pytest.raises(BlockingIOError):
            self.listener.accept()

    def assert_whole(self) -> None:
        """All images are as they were."""
        after = snapshot(self.path)
        assert {path: state for path, state in self.before.items() if path.endswith(".qcow2")}.items() <= after.items()
        self.pair.assert_neighbour_whole()


@pytest.fixture(scope="module")
def made() -> t.Iterator[Zoo]:
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        found = Zoo(Path(path), stack)
        yield found
        found.assert_whole()


@pytest.fixture
def zoo(made: Zoo, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Zoo]:
    monkeypatch.setenv("PATH", str(made.log.parent / "bin"), prepend=":")
    made.ran()
    yield made
    made.assert_nobody_was_touched()


def assert_told(message: str, zoo: Zoo, name: str, reason: str, set_id: str = "s2") -> None:
    """The image is named, and what is odd about it, in letters that a terminal only shows."""
    whole = reason if not reason.startswith("is ") else f"image {zoo.image(name, set_id)} {reason}"
    assert whole in message
    assert str(zoo.image(name, set_id)) in message
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize("depth", ["checksum", "image", "boot"])
def test_verified_with_all_others(zoo: Zoo, depth: str, directory: Path) -> None:
    """Each of them is found at every depth, by itself, and nothing is run to look at it."""
    options = boot(directory, boot_pattern="never", boot_timeout=1) if depth == "boot" else {"depth": depth}
    names = [vm_of(case) for case in CASES]
    result = ask("backup_verify", {"repository": str(zoo.path), "names": [*names, NEIGHBOUR], **options})
    found = {(one["vm"], one["disk"]): one for one in result["results"]}
    for case, (_change, reason) in CASES.items():
        one = found[vm_of(case), "drive0"]
        assert (one["ok"], one["depth"]) == (False, "checksum"), case
        assert_told(one["error"], zoo, vm_of(case), reason)
    assert found[NEIGHBOUR, "drive2"]["ok"]
    # Only the neighbour's disk, and the other disk of each, were given to anybody.
    ran = [line.split()[:2] for line in zoo.ran()]
    assert ran.count(["qemu-img", "check"]) == (0 if depth == "checksum" else 2 * (len(CASES) + 1))
    assert ran.count(["qemu-img", "convert"]) == (0 if depth == "checksum" else len(CASES) + 1)
    assert [line[0] for line in ran].count("qemu-system-x86_64") == (depth == "boot")


@pytest.mark.parametrize("case", CASES)
def test_restored(zoo: Zoo, case: str, directory: Path) -> None:
    """Refused before the first byte, with the checksums and without, as a copy and as an overlay."""
    name, reason = vm_of(case), CASES[case][1]
    method = {"method": "overlay", "checksum": False} if len(case) % 2 else {"checksum": len(case) % 4 == 0}
    disks = [{"name": "drive0", "target": str(directory / "disk")}]
    result = ask("backup_restore", {"repository": str(zoo.path), "vm": name, "disks": disks, **method})
    assert result["rc"] == 1
    assert_told(result["msg"], zoo, name, reason)
    assert f"VM {name}, set s2, disk drive0: " in result["msg"]
    assert "Nothing was restored" in result["msg"]
    assert zoo.ran() == []
    assert os.listdir(directory) == []
    # What the image of the set before says is all right.
    if case == "nothing":
        ask("backup_restore", {"repository": str(zoo.path), "vm": name, "id": "s1", "directory": str(directory)})
        assert "drive0.qcow2" in os.listdir(directory)


def test_restored_from_one_below(zoo: Zoo, directory: Path) -> None:
    """The full image at the bottom of a chain names a file that it builds on."""
    for method in ("copy", "overlay"):
        given = {"repository": str(zoo.path), "vm": "vm-full", "directory": str(directory), "method": method}
        result = ask("backup_restore", given, check=method == "copy")
        assert_told(result["msg"], zoo, "vm-full", f"{BUILDS}'{zoo.canary.file}', but must build on nothing", "s1")
        assert zoo.ran() == []
        assert os.listdir(directory) == []


def test_made_full(zoo: Zoo) -> None:
    """Each increment is to become a full image; none does, and what it builds on stays."""
    # Those that are known to be broken are left alone.
    for path in zoo.path.glob("vm-*/.*.verified.json"):
        path.unlink()
    names = [vm_of(case) for case in CASES]
    result = ask("backup_prune", {"repository": str(zoo.path), "names": names, "keep_last": 1, "consolidate": True})
    assert result["rc"] == 1
    assert result["removed"] == []
    for case, (_change, reason) in CASES.items():
        assert_told(result["msg"], zoo, vm_of(case), reason)
    kept = {(one["vm"], one["id"]) for one in result["kept"]}
    assert kept >= {(name, set_id) for name in names for set_id in ("s1", "s2")}
    assert not [line for line in zoo.ran() if " convert " in line or " compare " in line]


def test_honest_images_are_read(zoo: Zoo, directory: Path) -> None:
    zoo.pair.assert_neighbour_served()
    given = {"repository": str(zoo.path), "vm": NEIGHBOUR, "directory": str(directory)}
    assert not ask("backup_restore", given)["rc"]
    assert json.loads((directory / "drive2.qcow2.restored.json").read_text())["vm"] == NEIGHBOUR
