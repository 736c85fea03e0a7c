# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at files and devices that users have named as targets, remove what stands there, and name a finished image."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import sys

from .._common.errors import Refused
from .directory import KINDS, WrongEntry
from .files import claim, step

FS_IOC_GETVERSION = 0x80087601
FUSE = 0x65735546
"""FUSE_SUPER_MAGIC of statfs(2)."""
SMB = frozenset({0xFF534D42, 0xFE534D42})
"""CIFS_SUPER_MAGIC and SMB2_SUPER_MAGIC."""
STATFS_SIZE = 256
"""More bytes than struct statfs has anywhere; it begins with the type of the file system."""


def is_block_device(path: str) -> bool:
    """Return whether there is a block device at C(path)."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def open_image(path: str, flags: int) -> int:
    """Open an image file or a block device, and return its descriptor. WrongEntry where another thing stands there.

    What stood there a moment ago counts for nothing: nobody waits for a named pipe here, or hands it to a QEMU.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(place).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = KINDS.get(stat.S_IFMT(mode), "something unknown")
            raise WrongEntry(f"{path} is {kind}, and not an image; it does not belong there: move it away")
        try:
            return os.open(f"/proc/self/fd/{place}", flags | os.O_CLOEXEC)
        except OSError as error:
            error.filename = path
            raise
    finally:
        os.close(place)


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
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0, 0
    try:
        found = os.fstat(place)
        generation = _generation(f"/proc/self/fd/{place}") if stat.S_ISREG(found.st_mode) else 0
    finally:
        os.close(place)
    return found.st_ino, generation


def _generation(path: str) -> int:
    generation = bytearray(8)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _file_system(fd) != FUSE:
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, FS_IOC_GETVERSION, generation)
    finally:
        os.close(fd)
    return int.from_bytes(generation, sys.byteorder)


def is_smb(fd: int) -> bool:
    """Return whether an open file or directory is on a server of SMB."""
    return _file_system(fd) in SMB


def _file_system(fd: int) -> int:
    """Return the magic number of a file system; 0 where nobody tells."""
    status = ctypes.create_string_buffer(STATFS_SIZE)
    told = ctypes.CDLL(None).fstatfs(ctypes.c_int(fd), status) == 0
    return ctypes.c_long.from_buffer(status).value if told else 0


def remove(path: str) -> bool:
    """Unlink a file; False where there was none."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def sync_directory(path: str) -> None:
    """Make the renames in a directory last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with step(path, "its entries were brought to stable storage"):
            os.fsync(fd)
    finally:
        os.close(fd)


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
