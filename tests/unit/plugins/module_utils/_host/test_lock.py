# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Locks between processes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import lock
from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import LockHeld, host_lock_path, locked
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address

if TYPE_CHECKING:
    from pathlib import Path


def test_sockets_of_vms_and_locks_do_not_meet() -> None:
    """Whoever owns the sockets' directory may write to it, and could exchange a lock in it."""
    assert lock.DIRECTORY not in ("/run/vmfleet", "/run/qemu", "/run/vmfleet-monitors")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What root's directory of locks is for this test; it is not there yet."""
    monkeypatch.setattr(lock, "DIRECTORY", str(tmp_path / "locks"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path / "locks"


def test_a_directory_of_ones_own(directory: Path) -> None:
    assert lock.lock_directory() == str(directory)
    assert not directory.exists()
    directory.mkdir(mode=0o755)
    if os.getuid() == 0:
        assert lock.lock_directory() == str(directory)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_directory_that_others_can_write_to_is_refused(mode: int, directory: Path) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(BackupError, match=rf"^{directory} is d[rwxt-]+ of user .* is for .* nobody else can write to"):
        host_lock_path(None, Address(path="/run/qemu/web01.qmp"))


def test_directory_of_somebody_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that libvirt's QEMUs make their sockets in: owned by their user."""
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(os, "lstat", lambda _path: SimpleNamespace(st_uid=64055, st_mode=stat.S_IFDIR | 0o700))
    with pytest.raises(BackupError, match=r"is drwx------ of user 64055\. .* otherwise its locks protect nothing"):
        host_lock_path(None, Address(path="/run/qemu/web01.qmp"))


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_directory_is_refused(kind: str, directory: Path, tmp_path: Path) -> None:
    if kind == "link":
        directory.symlink_to(tmp_path)
    else:
        directory.touch(mode=0o600)
    with pytest.raises(BackupError, match="Move it away; it is made anew"):
        host_lock_path(None, Address(path="/run/qemu/web01.qmp"))


class TestOfAnotherUser:
    """The directory of a user who is not root. There may be one of the session, and one in /tmp."""

    @pytest.fixture
    def shared(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """What stands for the one in /tmp, and is not there yet."""
        monkeypatch.setattr(lock, "SHARED", str(tmp_path / "shared"))
        monkeypatch.setattr(lock, "SESSION", str(tmp_path / "run"))
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        # Whoever runs this test owns what it makes.
        lstat = os.lstat

        def as_user(path: str) -> SimpleNamespace:
            found = lstat(path)
            return SimpleNamespace(st_uid=1000 if found.st_uid == os.getuid() else found.st_uid, st_mode=found.st_mode)

        monkeypatch.setattr(os, "lstat", as_user)
        return tmp_path / "shared-1000"

    @pytest.fixture
    def session(self, tmp_path: Path, shared: Path) -> Path:
        assert not shared.exists()
        path = tmp_path / "run" / "1000"
        path.mkdir(mode=0o700, parents=True)
        return path

    def test_without_a_session(self, shared: Path) -> None:
        assert lock.lock_directory() == str(shared)

    def test_in_a_session(self, session: Path) -> None:
        assert lock.lock_directory() == f"{session}/vmfleet-locks"

    def test_where_the_session_says(self, session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = tmp_path / "other"
        other.mkdir(mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(other))
        assert lock.lock_directory() == f"{other}/vmfleet-locks"
        # As after su: it is that of the user before. Or it is nonsense.
        other.chmod(0o777)
        assert lock.lock_directory() == f"{session}/vmfleet-locks"
        monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
        assert lock.lock_directory() == f"{session}/vmfleet-locks"

    @pytest.mark.usefixtures("session")
    def test_one_that_is_in_use_stays_in_use(self, shared: Path) -> None:
        """By a process of version 0.1.0, or by one without a session."""
        shared.mkdir(mode=0o700)
        assert lock.lock_directory() == str(shared)

    def test_somebody_else_has_taken_the_name(self, session: Path, shared: Path) -> None:
        shared.mkdir()
        shared.chmod(0o1777)
        assert lock.lock_directory() == f"{session}/vmfleet-locks"

    def test_somebody_else_has_taken_the_name_and_there_is_no_session(self, shared: Path) -> None:
        shared.mkdir()
        shared.chmod(0o1777)
        with pytest.raises(BackupError, match=rf"^{shared} is drwxrwxrwt of user 1000\. .* Move it away"):
            lock.lock_directory()


async def take(path: Path, timeout: float = 0.0) -> None:
    async with locked(str(path), "web01", timeout):
        pass


def test_lock_excludes_and_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "1.lock"

    async def hold() -> None:
        async with locked(str(path), "web01"):
            with pytest.raises(BackupError) as refused:
                await take(path)
            assert str(refused.value).startswith(f"web01: another backup process has held {path} for more than 0 s")
        await take(path)

    asyncio.run(hold())
    # Never unlinked: else two could hold a lock of the same name.
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_lock_that_a_server_of_smb_has_given_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make confined` has a real one."""

    def refuse(*_arguments: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LockHeld, match="another backup process has held"):
        asyncio.run(take(tmp_path / "1.lock"))


def test_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "1.lock"

    async def hold() -> None:
        with open(path, "w", encoding="ascii") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            waiting = asyncio.ensure_future(take(path, timeout=30))
            await asyncio.sleep(0.1)
            assert not waiting.done()
        await waiting

    asyncio.run(hold())


def test_lock_is_freed_by_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "1.lock"

    async def fail() -> None:
        async with locked(str(path), "web01"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(fail())
    asyncio.run(take(path))


def test_lock_lasts_as_long_as_a_child_that_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "1.lock"

    async def hand_over() -> subprocess.Popen[bytes]:
        async with locked(str(path), "web01") as fd:
            return subprocess.Popen(["sleep", "60"], pass_fds=(fd,))

    child = asyncio.run(hand_over())
    try:
        with pytest.raises(BackupError):
            asyncio.run(take(path))
    finally:
        child.kill()
        child.wait()
    asyncio.run(take(path, timeout=10))


def test_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "1.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(BackupError, match="symbolic link"):
        asyncio.run(take(tmp_path / "1.lock"))
    assert not (tmp_path / "victim").exists()
