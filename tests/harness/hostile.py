# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests share that put something odd before a module: what must not be touched, and who must be served."""

from __future__ import annotations

import os
import socket
import stat
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, Library
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

BOUND = 120.0
"""Seconds for a call. None of the small ones here takes so long on any machine: what does, hangs, and is killed."""
ODD = NAME
"""The VM of which something is odd."""
NEIGHBOUR = "db01"
"""The healthy VM beside it."""


def put_socket(path: Path) -> None:
    """Put a socket somewhere that nobody listens at."""
    fd = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as made:
        # The path itself may be too long for a socket.
        made.bind(f"/proc/self/fd/{fd}/{path.name}")
    os.close(fd)


def put_zeroes(path: Path) -> None:
    """Put a device there that gives zeroes without end."""
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))


def ask(module: str, args: dict[str, t.Any], check: bool = False) -> dict[str, t.Any]:
    """Run a module to its end, whatever that is: but it has an end, which is told in words, without a traceback."""
    result = run_module(module, args, check, timeout=BOUND)
    assert "exception" not in result, result["exception"]
    assert "Traceback" not in str(result), result
    assert "internal error" not in str(result), result
    if result["rc"]:
        assert result.get("failed") is True, result
        assert result["msg"], result
    return result


def said(result: dict[str, t.Any]) -> str:
    """All that a result says, of whatever VM."""
    return str({name: value for name, value in result.items() if name != "invocation"})


class Canary:
    """A tree outside of what a module may touch, with names that it knows. Whoever follows a link gets there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for directory in (path, path / "s1", path / ".s1.staging", path / NEIGHBOUR):
            directory.mkdir()
            for name in ("manifest.json", "intent.json", "vm.json", "drive0.qcow2", "notes.txt"):
                (directory / name).write_text(f"canary {directory.name} {name}")
        for name in (".lock", ".prune.lock", "vmfleet.json", ".s1.failed.json"):
            (path / name).write_text(f"canary {name}")
            (path / name).chmod(0o640)
        self._before = self._look()

    @property
    def file(self) -> Path:
        """A file of it."""
        return self.path / "notes.txt"

    def assert_untouched(self) -> None:
        """Everything is there as it was: names, content, modes, owners and times."""
        assert self._look() == self._before

    def _look(self) -> tuple[object, ...]:
        status = os.stat(self.path)
        return snapshot(self.path), status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns


class Pair:
    """A repository with sets of two VMs: one is made odd by the test, and the other one is its neighbour."""

    def __init__(self, library: Library, vms: tuple[Qemu, ...]) -> None:
        self.library = library
        self.vms = vms
        self.odd = library.path / ODD
        self._kept = self.neighbour()

    @classmethod
    def made(cls, vms: Vms, directory: Path, sets: int = 2) -> Pair:
        """Make the sets s1, s2 and so on of two VMs, which stay up."""
        chain = Chain(vms, directory, sets)
        other = vms.start(vms.disk(2, size=SIZE), name=NEIGHBOUR)
        for number in range(1, sets + 1):
            chain.library.back_up(other, id=f"s{number}")
        return cls(chain.library, (chain.vm, other))

    def copied(self, directory: Path) -> Pair:
        """The same with a copy of the repository."""
        return Pair(self.library.copy(directory / "repository"), self.vms)

    def neighbour(self) -> dict[str, tuple[object, ...]]:
        """All about the neighbour's sets."""
        directory = self.library.path / NEIGHBOUR
        return {path: state for path, state in snapshot(directory).items() if state[-1] and "/." not in path}

    def assert_neighbour_whole(self) -> None:
        """All sets of the neighbour are as they were; there may be more."""
        assert self._kept.items() <= self.neighbour().items()

    def assert_neighbour_served(self) -> None:
        """The neighbour's sets are listed, verified, and go through a prune, whatever stands beside them."""
        self.assert_neighbour_whole()
        given = {"repository": str(self.library.path), "names": [NEIGHBOUR]}
        listed = ask("backup_info", given)
        assert not listed["rc"], listed
        assert {path.split("/")[-2] for path in self._kept} <= {one["id"] for one in listed["sets"]}
        assert not [one for one in listed["sets"] if one["broken"]]
        for module, options in (("backup_verify", {"depth": "checksum"}), ("backup_prune", {"keep_last": 9})):
            result = ask(module, {**given, **options}, check=True)
            assert not result["rc"], result
