# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""File systems that really hang: every call on them waits in the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch, probe
from ansible_collections.vmfleet.backup.tests.harness.filesystems import DeadServer
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

AT_ONCE = 0.1
"""Seconds to wait for a file system that does not answer, however long one waits."""


def _run(*command: str | Path, **options: t.Any) -> None:
    subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, check=True, **options)


def children() -> list[int]:
    """Our children, zombies among them."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
        return [int(pid) for pid in listed.read().split()]


def state(pid: int) -> str:
    """A process's state as in ps."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return stat.read().rpartition(")")[2].split()[0]


class Frozen:
    """Writes to a frozen file system wait until it is thawed, whatever comes."""

    def __init__(self, file_system: FileSystem) -> None:
        self._path = file_system.path
        self._frozen = False

    def __enter__(self) -> t.Self:
        _run("fsfreeze", "--freeze", self._path)
        self._frozen = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.thaw()

    def thaw(self) -> None:
        if self._frozen:
            _run("fsfreeze", "--unfreeze", self._path)
            self._frozen = False


@pytest.fixture
def file_system(storage: Storage) -> t.Iterator[FileSystem]:
    """An ext4, unmounted only when no child of ours is in it any more."""
    yield storage.mount("ext4", 16 * MIB)
    wait_until(_no_children, "the end of the children that were left behind")


def _no_children() -> bool:
    for pid in children():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return not children()


@pytest.fixture
def dead_server(directory: Path) -> t.Iterator[DeadServer]:
    """A mount that hangs, whatever one wants of it."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounting FUSE needs root and the kernel's part of it")
    (directory / "mnt").mkdir()
    with DeadServer(directory / "mnt") as server:
        yield server
    wait_until(_no_children, "the end of the children that were left behind")


def test_file_system_that_hangs_on_writing(file_system: FileSystem) -> None:
    path = str(file_system.path)
    asyncio.run(probe(path, writing=True))
    with Frozen(file_system):
        asyncio.run(probe(path))
        with pytest.raises(BackupError, match=f"^repository: {path} does not answer .* its file system hangs"):
            asyncio.run(probe(path, AT_ONCE, writing=True))
        assert len(children()) == 1
    asyncio.run(probe(path, writing=True))
    wait_until(_no_children, "the end of the child that was left behind")
    # It has done what it was sent for, and tidied up.
    assert os.listdir(path) == ["lost+found"]


def test_watch_over_a_file_system_that_comes_back(file_system: FileSystem) -> None:
    async def follow() -> None:
        watch = Watch(str(file_system.path), AT_ONCE, writing=True)
        with Frozen(file_system) as frozen:
            for _round in range(3):
                assert "does not answer" in await watch.ask()
            (child,) = children()
            # Not even SIGKILL would end it.
            assert state(child) == "D"
            frozen.thaw()
            while await watch.ask():
                pass
        assert not children()

    asyncio.run(follow())


def test_server_that_is_dead(dead_server: DeadServer) -> None:
    path = str(dead_server.path)
    for writing in (False, True):
        with pytest.raises(BackupError, match=r"unmount it \(umount --force --lazy\)$"):
            asyncio.run(probe(path, AT_ONCE, writing=writing))
    assert len(children()) == 2
    dead_server.unmount()
    wait_until(_no_children, "the end of the children that were left behind")


def test_watch_over_a_server_that_is_unmounted(dead_server: DeadServer) -> None:
    async def follow() -> None:
        watch = Watch(str(dead_server.path), AT_ONCE)
        assert "does not answer" in await watch.ask()
        dead_server.unmount()
        while "does not answer" in (reason := await watch.ask()):
            pass
        assert reason == f"repository: {dead_server.path}: Transport endpoint is not connected"
        assert await watch.ask() == ""

    asyncio.run(follow())


MODULE = """
import asyncio, fcntl, os, sys
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import probe
path, lock = sys.argv[1:]
fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
try:
    asyncio.run(probe(path, 0.1))
except BackupError as error:
    print(error)
"""


def test_module_ends_though_its_child_does_not(dead_server: DeadServer, directory: Path) -> None:
    lock = directory / "lock"
    command = [sys.executable, "-c", MODULE, str(dead_server.path), str(lock)]
    # Ends when nobody holds the other end of its standard output any more, as Ansible's connection does.
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert "does not answer" in done.stdout
    assert not done.stderr
    with lock.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
