# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold locks against other module processes: flock(2) on files that are never unlinked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .directory import OF_OTHERS, Directory
from .files import AT_ONCE, step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .files import DirectCalls
    from .process import Process


TIMEOUT = 120.0
"""Seconds to wait for a lock: longer than anybody holds one, since nobody waits for a job under a lock."""
RETRY_INTERVAL = 0.02
HELD = (BlockingIOError, PermissionError)
"""What is said of a lock that somebody else has; the second on SMB, whose server keeps them."""
DIRECTORY = "/run/vmfleet-locks"
"""Root's locks. No directory that somebody might make for the sockets of VMs has this name."""
SHARED = "/tmp/vmfleet"
SESSION = "/run/user"
"""Where other users' directories are, of each user one."""


class LockHeld(BackupError):
    """Somebody else has had the lock all the time."""


def lock_directory() -> str:
    """Return the directory of this user's locks. Raises BackupError where others could exchange them.

    All processes of a user have to find the same one. The one in /tmp counts where it is there already: version 0.1.0
    has made it, or a process without a session. Where somebody else has, it is in nobody's way.
    """
    user = os.geteuid()
    if user == 0:
        return _checked(DIRECTORY, user)
    shared = f"{SHARED}-{user}"
    # After su, the variable may still be that of the user before.
    sessions = (os.environ.get("XDG_RUNTIME_DIR", ""), f"{SESSION}/{user}")
    session = next((one for one in sessions if os.path.isabs(one) and not _fault(one, user)), "")
    if not session or not _fault(shared, user):
        return _checked(shared, user)
    return _checked(os.path.join(session, os.path.basename(DIRECTORY)), user)


def _fault(directory: str, user: int) -> str:
    """Return what is wrong with a directory that is to be of this user alone."""
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return f"{directory} is missing"
    if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & OF_OTHERS:
        return ""
    return f"{directory} is {stat.filemode(found.st_mode)} of user {found.st_uid}"


def _checked(directory: str, user: int) -> str:
    fault = _fault(directory, user) if os.path.lexists(directory) else ""
    if fault:
        remedy = "Move it away; it is made anew"
        if user == 0 and _is_root_by_name():
            place = os.path.dirname(directory)
            remedy = f"It is that of the machine, and this is root of a container: mount a {place} of its own there"
        raise BackupError(
            f"{fault}. It is for this collection's locks, and must be a directory of user {user} that nobody else can"
            f" write to: otherwise its locks protect nothing. {remedy}"
        )
    return directory


def _is_root_by_name() -> bool:
    """Return whether user 0 is another one outside (user_namespaces(7))."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as users:
            return users.readline().split()[:2] != ["0", "0"]
    except OSError:
        return False


@contextlib.asynccontextmanager
async def locked(
    path: str, holder_of: str, timeout: float = TIMEOUT, calls: DirectCalls = AT_ONCE
) -> AsyncIterator[int]:
    """Hold the lock at C(path), and give its file descriptor. Waits for it at most C(timeout) seconds.

    C(calls) is how its file system is called.
    """
    # Small modules look at locks, too, and it takes long to load.
    import asyncio  # noqa: PLC0415

    fd, taken = await calls.run(_open, path)
    try:
        deadline = time.monotonic() + timeout
        while not taken:
            if time.monotonic() >= deadline:
                raise LockHeld(
                    f"{holder_of}: another backup process has held {path} for more than {timeout:g} s; see"
                    f" `fuser {path}`"
                )
            await asyncio.sleep(RETRY_INTERVAL)
            taken = await calls.run(_take, fd)
        yield fd
    finally:
        calls.close(fd)


def take_at_once(path: str) -> int | None:
    """Take the lock at C(path), and return its file descriptor; None where somebody else has it."""
    fd, taken = _open(path)
    if taken:
        return fd
    os.close(fd)
    return None


def _open(path: str) -> tuple[int, bool]:
    """Open the file of a lock, and try to take it at once. Its directory is made where it is missing."""
    parent, name = os.path.split(path)
    above, own = os.path.split(parent)
    with Directory.at(above) as place:
        with contextlib.suppress(FileExistsError):
            place.make(own)
        with place.directory(own) as directory:
            fd = directory.open(name, os.O_RDWR | os.O_CREAT)
    try:
        with step(path, "its lock was taken"):
            return fd, _take(fd)
    except BaseException:
        os.close(fd)
        raise


def _take(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except HELD:
        return False
    return True


def host_lock_path(process: Process | None, address: object) -> str:
    """Return the path of the lock of one QEMU. Over TCP its process is unknown, and its address stands for it."""
    directory = lock_directory()
    if process is not None:
        return os.path.join(directory, f"{process.pid}-{process.start}.lock")
    return os.path.join(directory, str(address).replace("/", "_") + ".lock")
