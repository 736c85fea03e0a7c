# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Backup targets: made by us and never by QEMU, with their space reserved, handed over as open files, flushed by us."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import stat
import struct
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils import _qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._calls import AT_ONCE
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import BackupError, ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._files import claim, step
from ansible_collections.vmfleet.backup.plugins.module_utils._tables import held_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import IO, Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._calls import Calls
    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Bitmap, Disk

SECTOR = 512
PAGE = 4096
DIRECT_ALIGNMENT = 4096
FIRST_TABLE = 1 << 26
"""Bytes of a disk for which there is one byte in a qcow2 image's first table, full or not."""

FLOCK = "hhqqi"
"""struct flock: type, whence, start, length, pid."""

QEMU_LOCKS = (100, 200)
"""Where QEMU's locks on an image begin, and how many bytes they span at most (block/file-posix.c)."""

FALLOC_FL_KEEP_SIZE = 1
SYNC_FILE_RANGE_WRITE = 2
FS_IOC_GETVERSION = 0x80087601
FUSE = 0x65735546
"""FUSE_SUPER_MAGIC of statfs(2)."""
STATFS_SIZE = 256
"""More bytes than struct statfs has anywhere; it begins with the type of the file system."""
CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


@dataclass(frozen=True)
class Target:
    """An image that a job will write. C(size) is its virtual size and C(expected) the data to come, in bytes."""

    path: str
    format: str
    size: int
    expected: int = 0
    compress: bool = False
    block_device: bool = False
    compression_type: str = "zstd"

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is worth trying: compressed clusters are unaligned, and so can a raw image's end be."""
        aligned = self.format != "raw" or self.size % DIRECT_ALIGNMENT == 0
        return not self.compress and aligned

    def node(self, filename: str, direct: bool) -> str:
        """The C(json:) file name under which QEMU opens the image."""
        return "json:" + json.dumps(self.options(filename, direct))

    def options(self, filename: str, direct: bool) -> dict[str, Any]:
        """Return the options with which QEMU opens the image: nothing probed, no backing file opened.

        What is not said here a target gets from its source: a disk with aio=native would have no buffered target, and
        one with cache=unsafe none that is flushed.
        """
        flags = {"cache": {"direct": direct, "no-flush": False}, "read-only": False, "auto-read-only": False}
        file = {
            "driver": "host_device" if self.block_device else "file",
            "filename": filename,
            "aio": "threads",
            "locking": "auto",
            "discard": "unmap",
            **flags,
        }
        # Clusters that an existing image frees are used again, and so their space stays reserved.
        options: dict[str, Any] = {
            "driver": self.format,
            "file": file,
            "discard": "ignore",
            "detect-zeroes": "on",
            **flags,
        }
        if self.format != "raw":
            options["backing"] = None
        return options


def is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


@dataclass(frozen=True)
class Blank:
    """A new image in memory: its length in bytes, and the parts of it that are not zero, each with its offset."""

    length: int
    parts: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, path: str) -> Blank:
        with step(path, "it was read"), open(path, "rb") as image:
            content = image.read()
        pages = ((offset, content[offset : offset + PAGE]) for offset in range(0, len(content), PAGE))
        return cls(len(content), tuple((offset, page) for offset, page in pages if any(page)))

    def write(self, image: IO[bytes]) -> None:
        image.truncate(self.length)
        for offset, part in self.parts:
            image.seek(offset)
            image.write(part)


async def create(
    target: Target,
    backing: tuple[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    made: dict[tuple[str, ...], Blank] | None = None,
    calls: Calls = AT_ONCE,
) -> None:
    """Make a new image, readable by its owner only. FileExistsError where the path is taken, whatever stands there.

    C(made) remembers the images made: another one of the same kind is a copy, which spares the run of qemu-img.
    C(calls) is how the target's file system is called.
    """
    options = {"compression_type": target.compression_type} if target.format == "qcow2" and target.compress else None
    kind = tuple(_qemu_img.create_command("", target.format, target.size, options, backing))
    blank = Blank(target.size, ()) if target.format == "raw" else (made or {}).get(kind)
    await calls.run(_make_file, target.path, blank)
    if blank:
        return
    command = _qemu_img.create_command(target.path, target.format, target.size, options, backing)
    await _qemu_img.run(command, pass_fds=pass_fds)
    # Images of other formats have identifiers of their own.
    if made is not None and target.format == "qcow2":
        made[kind] = await calls.run(Blank.of, target.path)


def _make_file(path: str, blank: Blank | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with step(path, "it was made"), open(os.open(path, flags, 0o600), "wb") as image:
        if blank:
            blank.write(image)


def reserve(target: Target) -> bool:
    """Allocate the bytes that the job is expected to write, without changing the file's size.

    A guest's write fails when the copy of the old data does, whatever on-target-error says: only space that nobody
    else can take keeps a full file system from the guest. False where the file system cannot; BackupError where the
    space is not there.
    """
    return target.block_device or top_up(target.path, target.expected)


def top_up(path: str, expected: int) -> bool:
    """Reserve space for an image as reserve() does, up to C(expected) bytes, while a job may be writing it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
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


def free_bytes(path: str) -> int:
    """Bytes that are free on the file system of C(path)."""
    free = os.statvfs(path)
    return free.f_bavail * free.f_frsize


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


def open_pair(target: Target, direct: bool) -> tuple[int, int]:
    """Two fds for an fdset, one to read and one to write; raises OSError where the file system has no O_DIRECT."""
    flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    reading = os.open(target.path, os.O_RDONLY | flags)
    try:
        return reading, os.open(target.path, os.O_RDWR | flags)
    except OSError:
        os.close(reading)
        raise


def flush(path: str, held: int | None = None) -> os.stat_result:
    """Give back the space that was reserved and not used, and bring the image to stable storage.

    QEMU does not tell of every fsync that failed, and with cache=unsafe makes none: its word is not enough. C(held) is
    a file descriptor of the image from before the job, where this process has one.
    """
    with step(path, "it was brought to stable storage"):
        if held is not None:
            os.fsync(held)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                os.ftruncate(fd, status.st_size)
            os.fsync(fd)
            return os.fstat(fd)
        finally:
            os.close(fd)


class Writeback:
    """Has the kernel write out an image that grows in the page cache: else the flush at the end has all of it to do."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._thread: threading.Thread | None = None

    def nudge(self) -> None:
        """Begin to write out what is there, unless the last call is still at that."""
        if self._thread is None or not self._thread.is_alive():
            # It waits while the device has enough to do, and for ever for one that hangs: nobody is to wait for it.
            self._thread = threading.Thread(target=_write_out, args=(self._fd,), daemon=True)
            self._thread.start()


def _write_out(fd: int) -> None:
    # Without a flag that waits, no error is reported here that the flush would then not report.
    everything = (ctypes.c_int64(0), ctypes.c_int64(0))
    ctypes.CDLL(None).sync_file_range(ctypes.c_int(fd), *everything, ctypes.c_uint(SYNC_FILE_RANGE_WRITE))


def identity(path: str) -> tuple[int, int]:
    """Inode and generation of what stands at C(path), zeros for nothing.

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


def is_locked(path: str) -> bool:
    """Whether a QEMU has this image open, in whatever name space, be it to read from it only.

    QEMU says with locks on single bytes what it does with a file, and what it does not want others to do. No command
    of qemu-img asks for them without writing where the format is raw.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *QEMU_LOCKS, 0))
    finally:
        os.close(fd)
    return bool(struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK)


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


async def expected_bytes(
    disk: Disk, image_format: str, sync: str = "full", bitmap: str = "", before: int = 0, chain: Sequence[Disk] = ()
) -> int:
    """The most that a backup of C(disk) will write, in bytes.

    The larger of what qemu-img measures and what the images hold (it does not see writes that QEMU has not flushed),
    plus one percent, at most the fully allocated size. What it was C(before), if that is known, is not measured again.
    Nor is what the tables of all its layers, C(chain), tell to be no more than the images hold.
    """
    if image_format == "raw":
        return disk.virtual_size
    everything = _fully_allocated(disk.virtual_size)
    tracked = disk.bitmap(bitmap) if bitmap else None
    if sync in ("incremental", "bitmap") and tracked:
        return increment_bytes(disk, (tracked,))
    if sync == "top":
        held: int | None = disk.layer_size
    else:
        held = disk.actual_size
        measured = None if before or await _is_in(held, chain) else await _measured(disk)
        if measured and held is not None:
            # All tables are in that: QEMU gives them to the image of a full backup, however little is on the disk.
            before = min(measured["fully-allocated"], _with_spare(measured["required"]) + _metadata(0))
            everything = measured["fully-allocated"]
    if held is None:
        return everything
    return max(before, min(everything, _with_spare(held) + _metadata(disk.virtual_size)))


async def _is_in(held: int | None, chain: Sequence[Disk]) -> bool:
    """Return whether the data in a disk's layers are known to be no more than C(held)."""
    counted = await held_bytes(chain) if chain and held is not None else None
    return counted is not None and held is not None and counted <= held


def _with_spare(held: int) -> int:
    return held + held // 100


def increment_bytes(disk: Disk, records: Iterable[Bitmap]) -> int:
    """Return the most bytes that an increment of what these bitmaps of C(disk) have marked together will take."""
    # The least write that a fine bitmap marks can cost a whole cluster.
    marked = sum(bitmap.count // bitmap.granularity * max(_qemu_img.CLUSTER, bitmap.granularity) for bitmap in records)
    # Only what is written has tables, in the worst case one for each cluster.
    tables = min(_metadata(disk.virtual_size), marked + _metadata(0) + disk.virtual_size // FIRST_TABLE)
    return min(_fully_allocated(disk.virtual_size), _fully_allocated(marked) + tables)


async def _measured(disk: Disk) -> Any:
    """What qemu-img measures; None for a network disk or a json: file name, which only QEMU itself can open."""
    try:
        return await _qemu_img.run_json(_qemu_img.measure_command(disk.filename, disk.driver, "qcow2"))
    except ToolError:
        return None


def _metadata(virtual_size: int) -> int:
    """qcow2's own tables for an image of this size with nothing in it, generously."""
    return 16 * _qemu_img.CLUSTER + virtual_size // _qemu_img.CLUSTER * 8


def _fully_allocated(size: int) -> int:
    clusters = -(-size // _qemu_img.CLUSTER)
    return clusters * _qemu_img.CLUSTER + _metadata(size) + clusters * 16
