# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reserve space for a file before it grows, and write it out while it grows."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading

from .._common.errors import BackupError
from .files import scratch, step
from .target_files import open_image

SECTOR = 512
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
SYNC_FILE_RANGE_WRITE = 2
HOLE = 1 << 16
"""Bytes of a hole that is made to see what becomes of it: more than what belongs to a file beside its data."""
CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


def top_up(path: str, expected: int, held: int | None = None) -> bool:
    """Reserve space for an image as reserve() does, up to C(expected) bytes, while a job may be writing it.

    C(held) is a descriptor of it to write to, where this process has one.
    """
    fd = open_image(path, os.O_RDWR) if held is None else os.dup(held)
    try:
        with step(path, "its space was reserved"):
            return allocate(fd, expected)
    except OSError as error:
        free = os.fstatvfs(fd)
        raise BackupError(
            f"target: {path}: {error.strerror}: the backup needs up to {expected} bytes there,"
            f" and {free.f_bavail * free.f_frsize} are free"
        ) from error
    finally:
        os.close(fd)


def allocate(fd: int, length: int) -> bool:
    """Allocate the first C(length) bytes of a file without changing its size; False where the file system cannot."""
    # os.posix_fallocate would change the size, and write zeroes where the file system cannot allocate.
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(fd), ctypes.c_int(FALLOC_FL_KEEP_SIZE), ctypes.c_int64(0), ctypes.c_int64(length))
    while length:
        if libc.fallocate(*arguments) == 0:
            # ZFS says so without allocating anything.
            return os.fstat(fd).st_blocks * SECTOR >= length
        code = ctypes.get_errno()
        if code in CANNOT_RESERVE:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def punch_hole(fd: int, start: int, length: int) -> bool:
    """Give back the space of a part of a file, which then reads as zeroes; False where that cannot be done."""
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    arguments = (ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(start), ctypes.c_int64(length))
    return bool(ctypes.CDLL(None).fallocate(*arguments) == 0)


def keeps_holes(directory: str, stem: str) -> bool:
    """Tell whether a file can be made longer here at no cost: some file systems fill it with zeroes, as FAT does.

    It is tried on a file of which nothing is left; C(stem) is as for scratch().
    """
    try:
        with scratch(directory, stem) as probe:
            os.ftruncate(probe, HOLE)
            return os.fstat(probe).st_blocks * SECTOR < HOLE
    except OSError:
        return False


def flush(path: str, held: int | None = None) -> os.stat_result:
    """Give back the space that was reserved and not used, and bring the image to stable storage.

    QEMU does not tell of every fsync that failed, and with cache=unsafe makes none: its word is not enough. C(held) is
    a file descriptor of the image from before the job, where this process has one.
    """
    with step(path, "it was brought to stable storage"):
        fd = open_image(path, os.O_RDWR)
    try:
        return flush_open(path, fd, held)
    finally:
        os.close(fd)


def flush_open(path: str, fd: int, held: int | None = None) -> os.stat_result:
    """Do as flush() does, with an image that is open for writing."""
    with step(path, "it was brought to stable storage"):
        if held is not None:
            os.fsync(held)
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            os.ftruncate(fd, status.st_size)
        os.fsync(fd)
        return os.fstat(fd)


class Writeback:
    """Has the kernel write out an image that grows in the page cache: else the flush at the end has all of it to do."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._thread: threading.Thread | None = None

    def nudge(self) -> None:
        """Begin to write out what is there, unless the last call is still at that."""
        if self._thread is None or not self._thread.is_alive():
            # The call waits for a busy device, and for ever for one that hangs: nobody may wait for the call.
            self._thread = threading.Thread(target=_write_out, args=(self.fd,), daemon=True)
            self._thread.start()


def _write_out(fd: int) -> None:
    # Without a flag that waits, no error is reported here, so that the flush still reports it.
    everything = (ctypes.c_int64(0), ctypes.c_int64(0))
    ctypes.CDLL(None).sync_file_range(ctypes.c_int(fd), *everything, ctypes.c_uint(SYNC_FILE_RANGE_WRITE))
