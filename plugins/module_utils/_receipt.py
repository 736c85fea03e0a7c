# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""The memory that drive_backup keeps beside a target.

While an image grows, C(<receipt>.partial) is its record: who makes it, with which job, how far it has come. When the
image is finished, the record becomes the receipt by a rename. Both are JSON with the fields of C(Record).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._target import remove, sync_directory

if TYPE_CHECKING:
    from typing import Any

SCHEMA = 1

PREPARING = "preparing"
"""The record was written; the image may exist, and the job may have been started a moment ago."""
COPYING = "copying"
"""The job has been started."""
COPIED = "copied"
"""The job ended well and the image is on stable storage: only renames are missing."""
CANCELLING = "cancelling"
"""This attempt is given up: its job and its image are to go."""
COMPLETED = "completed"
"""The image stands under its own name."""

OVERWRITING_BITMAP_MODES = ("on-success", "always")


@dataclass(frozen=True)
class Record:
    """One backup of one disk to one target. Times are UTC (ISO 8601), sizes bytes, C(mtime) is in nanoseconds."""

    phase: str
    attempt: str
    job: str
    vm: str
    identity: str
    hypervisor: str
    process: list[int]
    """pid and start time of QEMU; empty over TCP."""
    device: str
    sync: str
    bitmap: str
    bitmap_mode: str
    target: str
    format: str
    virtual_size: int
    started: str
    guest: str
    """The VM's status at the start."""
    reserved: bool
    finished: str = ""
    inode: int = 0
    size: int = 0
    mtime: int = 0
    duration: float = 0.0
    schema: int = field(default=SCHEMA)

    @property
    def consumes_bitmap(self) -> bool:
        """Whether QEMU clears the bitmap when the copy ends well: nothing else knows those changes then."""
        return bool(self.bitmap) and (self.sync == "incremental" or self.bitmap_mode in OVERWRITING_BITMAP_MODES)

    def matches(self, status: os.stat_result, is_device: bool) -> bool:
        """Whether the file that was finished is still there, and untouched. A device has no such marks."""
        return is_device or (self.inode, self.size, self.mtime) == (status.st_ino, status.st_size, status.st_mtime_ns)

    def completed(self, status: os.stat_result, finished: str, duration: float) -> Record:
        """This record when its image is on stable storage."""
        return replace(
            self,
            phase=COPIED,
            finished=finished,
            duration=duration,
            inode=status.st_ino,
            size=status.st_size,
            mtime=status.st_mtime_ns,
        )


def record_path(receipt: str) -> str:
    """Where the record of a growing image lies."""
    return receipt + ".partial"


def read(path: str) -> Record | None:
    """The record or receipt at C(path); None where there is none. Raises BackupError where it is not one of ours."""
    try:
        with open(path, encoding="utf-8") as source:
            found = json.load(source)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    return _parse(path, found)


def _parse(path: str, found: Any) -> Record:
    names = {entry.name for entry in fields(Record)}
    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        raise _unreadable(path, "it has no schema number")
    if found["schema"] > SCHEMA:
        raise _unreadable(path, f"its schema {found['schema']} is newer than this collection; update vmfleet.backup")
    try:
        return Record(**{name: value for name, value in found.items() if name in names})
    except TypeError as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: str, reason: str) -> BackupError:
    return BackupError(f"receipt: {path} is not a receipt of vmfleet.backup: {reason}; move it away, or name another")


def create(path: str, record: Record) -> None:
    """Write a record where there is none; FileExistsError where somebody else was first."""
    temporary = _write(path, record)
    try:
        os.link(temporary, path)
        os.unlink(temporary)
    except PermissionError:
        # The file system has no hard links (exFAT, some network mounts), and so nothing that claims a name at once.
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(temporary, path)
    sync_directory(os.path.dirname(path))


def update(path: str, record: Record) -> None:
    """Replace a record."""
    os.replace(_write(path, record), path)
    sync_directory(os.path.dirname(path))


def sweep(receipt: str) -> None:
    """Remove what a process has left that was killed while it wrote a record."""
    if receipt:
        remove(_temporary(record_path(receipt)))


def discard(path: str) -> None:
    """Remove a record or receipt, for good."""
    remove(_temporary(path))
    if remove(path):
        sync_directory(os.path.dirname(path))


def finish(path: str, receipt: str, record: Record) -> None:
    """Turn the record at C(path) into the receipt."""
    update(path, replace(record, phase=COMPLETED))
    os.replace(path, receipt)
    sync_directory(os.path.dirname(receipt))


def _write(path: str, record: Record) -> str:
    """Write a record beside its place, onto stable storage; returns the temporary file's name."""
    temporary = _temporary(path)
    remove(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as sink:
        json.dump(asdict(record), sink, indent=1, sort_keys=True)
        sink.write("\n")
        sink.flush()
        os.fsync(sink.fileno())
    return temporary


def _temporary(path: str) -> str:
    # One fixed name: what a killed process has left there is replaced by the next one.
    return path + ".tmp"
