# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep the memory of drive_backup beside a target: records and receipts.

While an image grows, C(<receipt>.partial) is its record: who makes it, with which job, how far it has come. When the
image is finished, the record becomes the receipt by a rename. Both are JSON with the fields of C(Record).
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone

from .._common.errors import BackupError
from .._common.fields import (
    BELOW,
    FLAG,
    INODE,
    NAME,
    NUMBER_OF_SCHEMA,
    SECONDS,
    SIZE,
    TEXT,
    TIME,
    TOKEN,
    Document,
    Names,
    OneOf,
    Several,
    Text,
    Time,
    Whole,
    holds,
    load,
)
from .._common.formats import SCHEMA, Word, parse_time
from .._host.files import claim, step
from .._host.target_files import identity, remove, sync_directory
from .._qemu.address import Origin
from .request import JOB_ID, BitmapMode, Sync


class ReceiptPhase(Word):
    """How far a backup had come when its record was written."""

    PREPARING = "preparing"
    """The image may exist, and the job may have been started a moment ago."""
    COPYING = "copying"
    """The job has been started."""
    COPIED = "copied"
    """The image is on stable storage: a rename or two, and the record is the receipt."""
    CANCELLING = "cancelling"
    """This attempt is given up: its job and its image are to go."""
    LOST = "lost"
    """As that, and QEMU has cleared the bitmap, or part of it, whose changes the image was to hold."""


BLOCK = 4096
"""Bytes of a record's file."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Record(Document):
    """One backup of one disk to one target. Times are UTC (ISO 8601), sizes bytes, C(mtime) is in nanoseconds."""

    phase: ReceiptPhase = field(metadata=holds(OneOf(*ReceiptPhase)))
    attempt: str = field(metadata=holds(Text("the name of an attempt", pattern=TOKEN)))
    job: str = field(metadata=holds(Text("the id of a job", pattern=JOB_ID.pattern)))
    vm: str = field(metadata=TEXT)
    identity: str = field(metadata=TEXT)
    hypervisor: str = field(metadata=TEXT)
    process: tuple[int, ...] = field(metadata=holds(Several(Whole(), most=2)))
    """pid and start time of QEMU; empty over TCP."""
    device: str = field(metadata=TEXT)
    sync: Sync = field(metadata=holds(OneOf(*Sync)))
    bitmap: str = field(metadata=TEXT)
    bitmap_mode: BitmapMode = field(metadata=holds(OneOf(*BitmapMode)))
    target: str = field(metadata=NAME)
    format: str = field(metadata=TEXT)
    virtual_size: int = field(metadata=SIZE)
    started: str = field(metadata=TIME)
    guest: str = field(metadata=TEXT)
    """The VM's status at the start."""
    reserved: bool = field(metadata=FLAG)
    replaces: tuple[int, ...] = field(default=(0, 0), metadata=holds(Several(Whole(below=2 * BELOW), 2, 2)))
    """Identity (inode and generation) of the file that stood at the target when this began."""
    finished: str = field(default="", metadata=holds(Time(empty=True)))
    inode: int = field(default=0, metadata=INODE)
    """The image's, from its creation on; 0 for a block device."""
    generation: int = field(default=0, metadata=INODE)
    size: int = field(default=0, metadata=SIZE)
    mtime: int = field(default=0, metadata=SIZE)
    duration: float = field(default=0.0, metadata=SECONDS)
    boot: str = field(default="", metadata=TEXT)
    """The boot of the machine; this and all below are missing in what version 0.1.0 wrote."""
    monitor: str = field(default="", metadata=TEXT)
    spaces: dict[str, str] = field(default_factory=dict, metadata=holds(Names()))
    """The name spaces in which C(process) and C(monitor) mean what they say."""
    label: str = field(default="", metadata=TEXT)
    """The SELinux context that the image is given back when its job has ended; empty where it has kept its own."""
    node: str = field(default="", metadata=TEXT)
    """What is copied, by the name that QEMU has for it until it ends."""
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)

    def fault(self) -> str:
        """Return what does not go together."""
        return "process: half of it is missing" if len(self.process) == 1 else ""

    @property
    def whole(self) -> bool:
        """Whether the image that it speaks of is finished."""
        return self.phase == ReceiptPhase.COPIED

    @property
    def origin(self) -> Origin:
        """Which QEMU it was begun with."""
        return Origin(self.identity, self.monitor, self.process, self.spaces)

    @property
    def elapsed(self) -> float:
        """Return the seconds since its start; 0 where the clock was set back since then."""
        return max(0.0, (datetime.now(timezone.utc) - parse_time(self.started)).total_seconds())

    @property
    def consumes_bitmap(self) -> bool:
        """Whether QEMU clears the bitmap when the copy ends well: nothing else knows those changes then."""
        clears = self.bitmap_mode in (BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS)
        return bool(self.bitmap) and (self.sync == Sync.INCREMENTAL or clears)

    def wrote(self, path: str) -> bool:
        """Return whether the file at C(path) is the one that the job was given."""
        return not self.inode or identity(os.path.realpath(path)) == (self.inode, self.generation)

    def matches(self, status: os.stat_result, is_device: bool) -> bool:
        """Return whether the file that was finished is still there, and untouched. A device has no such marks."""
        return is_device or (self.inode, self.size, self.mtime) == (status.st_ino, status.st_size, status.st_mtime_ns)

    def copied(self, status: os.stat_result, finished: str, duration: float) -> Record:
        """Return this record as it is when its image is on stable storage."""
        return replace(
            self,
            phase=ReceiptPhase.COPIED,
            finished=finished,
            duration=duration,
            inode=status.st_ino,
            size=status.st_size,
            mtime=status.st_mtime_ns,
        )


def record_path(receipt: str) -> str:
    """Return where the record of a growing image lies."""
    return receipt + ".partial"


def read(path: str) -> Record | None:
    """Read a record or receipt; None where there is none. Raises BackupError where it is not one of ours."""
    try:
        # A named pipe may stand there: nobody is waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as source:
            return Record.parse(load(source.read(Record.MOST + 1)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: str, reason: str) -> BackupError:
    return BackupError(f"receipt: {path} is not a receipt of vmfleet.backup: {reason}; move it away, or name another")


def create(path: str, record: Record) -> None:
    """Write a record where there is none; FileExistsError where somebody else was first."""
    if os.path.lexists(path):
        raise FileExistsError(path)
    spare = _spare(path)
    remove(spare)
    try:
        inode = _write(spare, record)
        claim(spare, path)
        if os.stat(path).st_ino != inode:
            raise FileExistsError(path)
    finally:
        remove(spare)
    try:
        # By this the record can be renewed when the file system is full: that is when it must be.
        _write(spare, record)
    except OSError:
        discard(path)
        raise
    sync_directory(os.path.dirname(path))


def update(path: str, record: Record) -> None:
    """Replace a record, also on a full file system: its spare has the space."""
    spare = _spare(path)
    if os.path.lexists(spare) and os.lstat(spare).st_nlink > 1:
        # A process was killed while it claimed the name: this is still the record itself.
        os.unlink(spare)
    _write(spare, record)
    try:
        _exchange(spare, path)
    except OSError:
        # Not every file system can (NFS): the spare is used up then.
        os.replace(spare, path)
    sync_directory(os.path.dirname(path))


def set_phase(path: str, record: Record | None, phase: ReceiptPhase) -> None:
    """Write down how far a backup has come; nothing where it is not remembered."""
    if path and record:
        update(path, replace(record, phase=phase))


def sweep(path: str) -> None:
    """Remove what is left where a process was killed before it had claimed the record's name, or after it let it go."""
    if not os.path.lexists(path):
        remove(_spare(path))


def discard(path: str) -> None:
    """Remove a record or receipt, for good."""
    found = remove(path)
    if remove(_spare(path)) or found:
        sync_directory(os.path.dirname(path))


def finish(path: str, receipt: str) -> None:
    """Turn the record at C(path) into the receipt."""
    os.replace(path, receipt)
    remove(_spare(path))
    sync_directory(os.path.dirname(receipt))


def _write(spare: str, record: Record) -> int:
    """Write a record into the spare file, over what is there, onto stable storage; returns its inode."""
    text = json.dumps(asdict(record), indent=1, sort_keys=True)
    fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Always of one size, so that the next one fits into the same blocks.
        content = text.encode("utf-8", "surrogateescape").ljust(BLOCK - 1) + b"\n"
        with step(spare, "the record of the backup was written"):
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
            os.fsync(fd)
            return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _exchange(one: str, other: str) -> None:
    """Swap two files' names at once (renameat2(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), other)


def _spare(path: str) -> str:
    # One fixed name: what a killed process has left there is used or removed by the next one.
    return path + ".tmp"
