# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work with files so that an error tells which one, and on file systems that lack permissions or links."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from .._common.errors import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    T = TypeVar("T")


STEP = "step"
UNFINISHED = ".new"
"""What a file's name ends with while it is written."""
NO_NAMELESS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What a file system, or a kernel, says that has no files without a name."""
NO_MODES = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems say that have no permissions of their own (vfat, SMB, some of FUSE)."""
NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What file systems say that have no hard links."""


@contextlib.contextmanager
def step(path: str, what: str) -> Iterator[None]:
    """Make an OSError tell which file it is about, and what was done: a call on an open file knows no name.

    C(what) goes on a sentence, such as C(it was flushed). Of steps within steps the innermost is told.
    """
    try:
        yield
    except OSError as error:
        if not hasattr(error, STEP):
            setattr(error, STEP, what)
            if not isinstance(error.filename, (str, bytes)):
                error.filename = path
            error.strerror = f"{error.strerror or error} while {what}"
        raise


def set_mode(path: str, mode: int, fd: int | None = None) -> None:
    """Set the permissions of a file, and warn where its file system does not keep them.

    SMB keeps of them only that a file is read-only. That stops root too, and such a file cannot be replaced in one
    step, so that it is taken back.
    """
    file = path if fd is None else fd
    try:
        with step(path, "its permissions were set"):
            os.chmod(file, mode)
            found = stat.S_IMODE(os.stat(file).st_mode)
            if found != mode and not found & stat.S_IWUSR:
                mode |= stat.S_IWUSR
                os.chmod(file, mode)
                found = stat.S_IMODE(os.stat(file).st_mode)
    except OSError as error:
        if error.errno not in NO_MODES:
            raise
        _warn_of_permissions(path, os.strerror(error.errno))
        return
    if found & ~mode:
        _warn_of_permissions(path, "they stay as they are")


def _warn_of_permissions(path: str, why: str) -> None:
    mount_point = _mount_point(path)
    warn_once(
        mount_point,
        f"{mount_point}: its file system does not keep permissions ({why}). The mount options decide who can read the"
        " files there: mount it so that nobody else can read it (vfat: umask=077; SMB: file_mode=0600,dir_mode=0700)",
    )


def _mount_point(path: str) -> str:
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def claim(source: str, name: str) -> None:
    """Give a file a name that is free: a second one, or its only one where the file system has no hard links."""
    try:
        os.link(source, name)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # Without hard links a name cannot be looked for and taken in one step.
        if os.path.lexists(name):
            raise FileExistsError(errno.EEXIST, "something has appeared there in between", name) from None
        os.rename(source, name)


def nearest_directory(path: str) -> str:
    """Return a path, or the nearest one above it where there is a directory: in that one it is going to be made."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


@contextlib.contextmanager
def scratch(directory: str, stem: str) -> Iterator[int]:
    """Open a file that nobody sees, and of which nothing is left, whatever ends this process.

    Where the file system has none without a name, it has one for a moment, of C(stem), some digits, and UNFINISHED.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC
    name = ""
    try:
        fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in NO_NAMELESS_FILES:
            raise
        name = os.path.join(directory, stem + os.urandom(16).hex() + UNFINISHED)
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


class DirectCalls:
    """Calls that are made at once, for callers who do nothing else meanwhile. C(worker) has some for what may hang."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function), and return what it returns."""
        return function(*args, **kwargs)

    def close(self, fd: int) -> None:
        """Close a file, which on NFS flushes it, after the calls that were made before."""
        os.close(fd)


AT_ONCE = DirectCalls()
