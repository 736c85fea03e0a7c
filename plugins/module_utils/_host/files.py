# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work with files so that an error tells which one, and on file systems that lack permissions or links."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import stat
import sys
import time
from typing import TYPE_CHECKING

from .._common.errors import Refused, warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    T = TypeVar("T")


STEP = "step"
UNFINISHED = ".new"
NO_NAMELESS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What a file system, or a kernel, says that has no files without a name."""
FORGOTTEN = 3600.0
"""Seconds after which nobody is writing a text any more: its process was killed."""
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
    """Set the permissions of a file, and warn where its file system does not keep them."""
    try:
        with step(path, "its permissions were set"):
            os.chmod(path if fd is None else fd, mode)
    except OSError as error:
        if error.errno not in NO_MODES:
            raise
        _warn_of_permissions(path, os.strerror(error.errno))
        return
    if stat.S_IMODE(os.stat(path if fd is None else fd).st_mode) & ~mode:
        _warn_of_permissions(path, "they stay as they are")


def _warn_of_permissions(path: str, why: str) -> None:
    mount_point = _mount_point(path)
    warn_once(
        mount_point,
        f"{mount_point}: its file system does not keep permissions ({why}). What is written there can be as open to"
        " others as the mount makes it: mount it so that nobody else can read it (vfat: umask=077; SMB: file_mode=0600,"
        "dir_mode=0700)",
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


def read_text(path: str) -> str:
    """Return the content of a text file; empty where there is none."""
    try:
        with step(path, "it was read"), open(path, encoding="utf-8", errors="replace") as source:
            return source.read()
    except FileNotFoundError:
        return ""


def write_text(path: str, text: str) -> None:
    """Write a file for everybody to read, onto stable storage, whole or not at all.

    Who reads it meanwhile sees the old one or the new one.
    """
    # Collectors look for the ends of file names, and pass over this one.
    beginning = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.")
    _remove_forgotten(f"{glob.escape(beginning)}*{UNFINISHED}")
    temporary = f"{beginning}{os.getpid()}{UNFINISHED}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with step(path, "it was written"), os.fdopen(fd, "w", encoding="utf-8", errors="replace", newline="\n") as sink:
            sink.write(text)
            sink.flush()
            set_mode(temporary, 0o644, sink.fileno())
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def scratch(directory: str, stem: str) -> Iterator[int]:
    """Open a file that nobody sees, and of which nothing is left, whatever ends this process.

    Where the file system has none without a name, it has one for a moment, of C(stem) and some digits.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC
    name = ""
    try:
        fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in NO_NAMELESS_FILES:
            raise
        name = os.path.join(directory, stem + os.urandom(16).hex())
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _remove_forgotten(pattern: str) -> None:
    for path in glob.glob(pattern):
        # Another process may remove or rename it at this moment.
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_mtime < time.time() - FORGOTTEN:
                os.unlink(path)


FS_IOC_GETVERSION = 0x80087601
FUSE = 0x65735546
"""FUSE_SUPER_MAGIC of statfs(2)."""
STATFS_SIZE = 256
"""More bytes than struct statfs has anywhere; it begins with the type of the file system."""


def is_block_device(path: str) -> bool:
    """Return whether there is a block device at C(path)."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def unusable_device(path: str) -> str:
    """Return why a block device must not be written to; empty where it may. The kernel knows who has claimed it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        use = "is in use (mounted, or part of a volume)" if error.errno == errno.EBUSY else "cannot be written to"
        return f"{use}: {error.strerror}"
    return ""


def check_length(option: str, path: str, *ends: str) -> None:
    """Refuse a file whose name would be too long with one of these ends; its directory is there."""
    longest = max(ends, key=len, default="")
    most = os.pathconf(os.path.dirname(path), "PC_NAME_MAX")
    surplus = len(os.fsencode(os.path.basename(path) + longest)) - most
    if surplus > 0:
        beside = f" {os.path.basename(path)[:8]}...{longest} has to stand beside it, and" if longest else ""
        raise Refused(
            option,
            f"{path}: the name is {surplus} bytes too long.{beside} a name may have {most} bytes there",
        )


def free_bytes(path: str) -> int:
    """Return the bytes that are free on the file system of C(path)."""
    free = os.statvfs(path)
    return free.f_bavail * free.f_frsize


def identity(path: str) -> tuple[int, int]:
    """Return the inode and the generation of what stands at C(path), zeros for nothing.

    A new file often gets the inode that was freed last, but another generation (FS_IOC_GETVERSION); that is 0 where the
    file system has none, as on tmpfs, and on FUSE, whose servers answer with what their memory happens to hold.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0, 0
    generation = bytearray(8)
    if stat.S_ISREG(found.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not _is_fuse(fd):
                with contextlib.suppress(OSError):
                    fcntl.ioctl(fd, FS_IOC_GETVERSION, generation)
        finally:
            os.close(fd)
    return found.st_ino, int.from_bytes(generation, sys.byteorder)


def _is_fuse(fd: int) -> bool:
    status = ctypes.create_string_buffer(STATFS_SIZE)
    told = ctypes.CDLL(None).fstatfs(ctypes.c_int(fd), status) == 0
    return told and ctypes.c_long.from_buffer(status).value == FUSE


def take_name(image: str, path: str, replaces: tuple[int, int]) -> None:
    """Give an image its final name. Only the file with the identity C(replaces) may be in its way: it goes."""
    if replaces[0] and identity(path) == replaces:
        os.replace(image, path)
    else:
        try:
            claim(image, path)
        except FileExistsError:
            if identity(path) != identity(image):
                raise FileExistsError(errno.EEXIST, "something has appeared there in between", path) from None
        remove(image)
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Make the renames in a directory last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with step(path, "its entries were brought to stable storage"):
            os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: str) -> bool:
    """Unlink a file; False where there was none."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


class DirectCalls:
    """Calls that are made at once, for callers who do nothing else meanwhile. C(worker) has some for what may hang."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function), and return what it returns."""
        return function(*args, **kwargs)

    def close(self, fd: int) -> None:
        """Close a file, which on NFS flushes it, after the calls that were made before."""
        os.close(fd)


AT_ONCE = DirectCalls()
