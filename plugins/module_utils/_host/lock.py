# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold locks against other module processes: flock(2) on files that are never unlinked."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .files import AT_ONCE, step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .files import DirectCalls


TIMEOUT = 120.0
"""Seconds to wait for a lock: longer than anybody holds one, since nobody waits for a job under a lock."""
RETRY_INTERVAL = 0.02
DIRECTORY = "/run/vmfleet-locks"
"""Root's locks. No directory that somebody might make for the sockets of VMs has this name."""
OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class LockHeld(BackupError):
    """Somebody else has had the lock all the time."""


def lock_directory() -> str:
    """Return the directory of this user's locks. Raises BackupError where others could exchange them."""
    user = os.geteuid()
    directory = DIRECTORY if user == 0 else os.path.join("/tmp", f"vmfleet-{user}")
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return directory
    if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & OF_OTHERS:
        return directory
    raise BackupError(
        f"{directory} is for this collection's locks. It has to be a directory of user {user} that nobody else can"
        f" write to, and is {stat.filemode(found.st_mode)} of user {found.st_uid}: a lock in it would hold nobody off."
        " Move it away; it is made anew"
    )


@asynccontextmanager
async def locked(
    path: str, holder_of: str, timeout: float = TIMEOUT, calls: DirectCalls = AT_ONCE
) -> AsyncIterator[int]:
    """Hold the lock at C(path), and give its file descriptor. Waits for it at most C(timeout) seconds.

    C(calls) is how its file system is called.
    """
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


def _open(path: str) -> tuple[int, bool]:
    """Open the file of a lock, and try to take it at once."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with step(path, "its lock was taken"):
            return fd, _take(fd)
    except BaseException:
        os.close(fd)
        raise


def _take(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
