# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Calls of backup_restore, backup_prune and backup_info, and a chain of sets for them to work on."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, sound
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pytest

NAME = "web01"
LOCKS = (".lock", ".prune.lock")


class Library(Sets):
    """A repository of which sets are restored, listed and removed."""

    def assert_tidy(self, name: str) -> None:
        assert [path.name for path in (self.path / name).glob(".*") if path.name not in LOCKS] == []

    def restore(self, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
        """Run backup_restore, which has to succeed."""
        return succeed("backup_restore", self.restoration(**options), check=check, diff=True)

    def fail_restore(self, check: bool = False, **options: t.Any) -> str:
        """Run backup_restore, which has to fail; returns what it says."""
        return str(fail("backup_restore", self.restoration(**options), check=check)["msg"])

    def restoration(self, **options: t.Any) -> dict[str, t.Any]:
        """Arguments of backup_restore."""
        return {"repository": str(self.path), "vm": NAME, **options}

    def prune(self, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
        """Run backup_prune, which has to succeed."""
        return succeed("backup_prune", {"repository": str(self.path), **options}, check=check, diff=True)

    def fail_prune(self, **options: t.Any) -> dict[str, t.Any]:
        """Run backup_prune, which has to fail."""
        return fail("backup_prune", {"repository": str(self.path), **options})

    def info(self, **options: t.Any) -> dict[str, t.Any]:
        """Run backup_info, which has to succeed."""
        return succeed("backup_info", {"repository": str(self.path), **options})

    def listed(self, name: str = NAME) -> list[str]:
        """The ids of a VM's sets, newest first."""
        return [one["id"] for one in self.info(names=[name])["sets"]]

    def content(self, but: tuple[str, ...] = ()) -> dict[str, tuple[object, ...]]:
        """All about the files of the repository, without those of the sets `but`."""
        skipped = tuple(str(self.path / NAME / set_id) + "/" for set_id in but)
        found = snapshot(self.path)
        return {path: state for path, state in found.items() if state[-1] and not path.startswith(skipped)}

    def rewrite(self, set_id: str, **fields: t.Any) -> None:
        """Change what a set's manifest says."""
        path = self.path / NAME / set_id / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def detach(self, set_id: str) -> None:
        """Have a set's manifest say that all its images are full ones, so that no other set is kept for it."""
        disks = [{**disk, "level": "full", "parent": None} for disk in self.manifest(NAME, set_id)["disks"]]
        self.rewrite(set_id, level="full", disks=disks)

    def copy(self, path: Path) -> Library:
        """The same repository at another place, as far as a file system can tell."""
        shutil.copytree(self.path, path)
        return Library(path)


class Chain(History):
    """The sets s1, s2 and s3 of a VM with the disks drive0 and drive1: a full and two increments."""

    def __init__(self, vms: Vms, directory: Path, sets: int = 3, **options: t.Any) -> None:
        self.library = Library(directory / "repository")
        vm = vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name=NAME)
        super().__init__(vm, self.library, directory, NAME)
        for number in range(1, sets + 1):
            self.go_on(number, **options)

    def copied(self, directory: Path) -> Chain:
        """The same with a copy of the repository, without its VM."""
        other = copy.copy(self)
        other.library = other.sets = self.library.copy(directory / "repository")
        return other

    def go_on(self, number: int, **options: t.Any) -> str:
        """Let the guest write, zero and discard, and make the next set; returns its level."""
        if number > 1:
            for disk in ("drive0", "drive1"):
                self.vm.write(disk, 0xA0 + number, number * MIB, 128 << 10)
                self.vm.write(disk, 0xB0 + number, (number << 16) + 4096, 512)
            self.vm.io("drive0", f"write -z -u {number << 19} 128k")
            self.vm.io("drive1", f"discard {number << 19} 128k")
        return self.back_up(f"s{number}", **options)

    def assert_restored(self, set_id: str, paths: Mapping[str, Path], fmt: str = "qcow2") -> None:
        """These files hold what the disks held then, and nothing beside them is left of their making."""
        for disk, path in paths.items():
            assert identical(self.copies(set_id)[disk], path, other_format=fmt), f"{disk} of {set_id}"
            if fmt == "qcow2":
                assert sound(path)
            assert not path.with_name(path.name + ".partial").exists()

    def assert_all_restore(self, library: Library, where: Path, levels: Mapping[str, str] | None = None) -> None:
        """Every set that is listed has still the content that it had when it was made."""
        for set_id in library.listed():
            shutil.rmtree(where, ignore_errors=True)
            where.mkdir()
            library.restore(id=set_id, directory=str(where))
            self.assert_restored(set_id, restored_to(where))
            if levels:
                assert library.manifest(NAME, set_id)["level"] == levels[set_id]


@contextlib.contextmanager
def prepared(sets: int = 3, **options: t.Any) -> Iterator[Chain]:
    """A chain whose VM is off, for many tests to take copies of."""
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        chain = Chain(Vms(Path(path), stack), Path(path), sets, **options)
        chain.vm.quit()
        yield chain


def restored_to(where: Path) -> dict[str, Path]:
    """The files of both disks in a directory."""
    return {disk: where / f"{disk}.qcow2" for disk in ("drive0", "drive1")}


def before_converting(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have something happen right before each copy that a module makes with qemu-img."""
    real = shutil.which("qemu-img")
    (directory / "bin").mkdir()
    program = directory / "bin" / "qemu-img"
    program.write_text(f'#!/bin/sh\n[ "$1" = convert ] && {{ {script}\n}}\nexec {real} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def gate(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Have each copy wait for the second of these files, and make the first one when it does."""
    begun, go = directory / "begun", directory / "go"
    before_converting(directory, monkeypatch, f"touch {begun}; while [ ! -e {go} ]; do sleep 0.01; done")
    return begun, go
