# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe what drive_backup is asked for, and refuse what can be seen to be wrong with it without asking QEMU."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._common.formats import Word
from .._common.options import check_path, check_text
from .._host.target_files import check_length, is_block_device
from .._qemu.model import EncryptedSource
from .._repository.names import refuse_inside

if TYPE_CHECKING:
    from typing import Any

    from .._qemu.address import Address


NO_KEY = (
    "this module cannot give QEMU the key of an encrypted target. Use a target without encryption, on encrypted storage"
)
JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{,254}")


class TargetMode(Word):
    """Whether the target's image is made. The words are those of QEMU."""

    ABSOLUTE_PATHS = "absolute-paths"
    """The image is new."""
    EXISTING = "existing"


class Sync(Word):
    """What of a disk is copied. The words are those of QEMU."""

    FULL = "full"
    TOP = "top"
    """What its top image holds."""
    INCREMENTAL = "incremental"
    """What its bitmap has recorded, which is cleared by that."""
    BITMAP = "bitmap"


class BitmapMode(Word):
    """When the bitmap of a copy is cleared. The words are those of QEMU."""

    OF_SYNC = ""
    """There is none, or the sync has but one way."""
    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


class RequestedState(Word):
    """How far a call brings its copies."""

    COMPLETED = "completed"
    STARTED = "started"
    CANCELLED = "cancelled"


class CompletionMode(Word):
    """Whether one failed copy takes the others of its call along. The words are those of QEMU."""

    GROUPED = "grouped"
    INDIVIDUAL = "individual"


class OnTimeout(Word):
    """What becomes of a job for which nobody waits any longer."""

    CANCEL = "cancel"
    LEAVE = "leave"


@dataclass(frozen=True)
class Drive:
    """What is asked for one disk. The names are those of QEMU's drive-backup."""

    device: str
    target: str
    format: str = ""
    mode: TargetMode = TargetMode.ABSOLUTE_PATHS
    speed: int = 0
    on_source_error: str = "report"
    on_target_error: str = "report"
    sync: Sync = Sync.FULL
    bitmap: str = ""
    bitmap_mode: BitmapMode = BitmapMode.OF_SYNC
    compress: bool = False
    job_id: str = ""
    receipt: str = ""

    @property
    def existing(self) -> bool:
        return self.mode == TargetMode.EXISTING

    @property
    def receipt_path(self) -> str:
        """Where the copy is remembered; empty where it cannot be: a block device has no room beside it."""
        if self.receipt:
            return self.receipt
        return "" if is_block_device(self.target) else self.target + ".receipt.json"

    def names_beside(self, path: str) -> tuple[str, ...]:
        """Return what is put after the name of the target or of the receipt to name what stands there for a time."""
        if path == self.receipt_path:
            return (".partial.tmp",)
        return () if self.existing else (".partial",)

    @property
    def image_path(self) -> str:
        """The file that QEMU writes."""
        return self.target if self.existing else self.target + ".partial"

    @property
    def is_laid_out(self) -> bool:
        """Return whether it makes a new image of all of a disk, the clusters of which can be known before the copy."""
        is_plain = (self.format or "qcow2") == "qcow2" and not self.compress
        return is_plain and not self.existing and self.sync == Sync.FULL

    def arguments(self) -> dict[str, Any]:
        """Return QEMU's arguments, as far as they do not depend on how the target is handed over."""
        arguments: dict[str, Any] = {
            "sync": self.sync,
            "speed": self.speed,
            "on-source-error": self.on_source_error,
            "on-target-error": self.on_target_error,
        }
        if self.bitmap:
            arguments["bitmap"] = self.bitmap
        if self.bitmap_mode:
            arguments["bitmap-mode"] = self.bitmap_mode
        if self.compress:
            arguments["compress"] = True
        return arguments


@dataclass(frozen=True)
class DriveBackupRequest:
    """What is asked of one VM. Times are seconds; 0 waits without end."""

    address: Address
    drives: tuple[Drive, ...]
    state: RequestedState = RequestedState.COMPLETED
    completion_mode: CompletionMode = CompletionMode.GROUPED
    overwrite: bool = False
    timeout: float = 0
    stall_timeout: float = 600
    on_timeout: OnTimeout = OnTimeout.CANCEL
    encrypted_source: EncryptedSource = EncryptedSource.WARN
    selinux_label: bool = True
    check_mode: bool = False

    @property
    def grouped(self) -> bool:
        """Whether its images belong together, and to one point in time."""
        return self.completion_mode == CompletionMode.GROUPED


def check_drives(drives: tuple[Drive, ...]) -> None:
    """Refuse what can be seen to be wrong without asking QEMU."""
    for drive in drives:
        _check_names(drive)
        _check_bitmap_options(drive)
        _check_place(drive)
        if drive.speed < 0:
            raise Refused("speed", f"{drive.speed} is negative; give bytes per second, 0 is unlimited")
        if drive.format == "luks":
            raise Refused("format", f"luks: {NO_KEY}")
        if drive.compress and drive.format == "raw":
            raise Refused("compress", "a raw image cannot be compressed; use format qcow2")
    _refuse_twice("target", [plain_path(drive.target) for drive in drives])
    _refuse_twice("receipt", [plain_path(drive.receipt_path) for drive in drives if drive.receipt_path])
    _refuse_twice("job_id", [drive.job_id for drive in drives if drive.job_id])


def plain_path(path: str) -> str:
    """Return the one spelling of a place; its last part may be a link, and is left as it is."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _refuse_twice(option: str, given: list[str]) -> None:
    for value in given:
        if given.count(value) > 1:
            raise Refused(option, f"{value} is given for more than one drive")


def _check_names(drive: Drive) -> None:
    if not drive.target.startswith("/"):
        raise Refused(
            "target",
            f"{drive.target!r} is not an absolute path; relative, json: and protocol (nbd:, file:) targets are not"
            " accepted",
        )
    for option in ("target", "receipt"):
        if getattr(drive, option):
            check_path(option, check_text(option, getattr(drive, option)))
    if drive.job_id and not JOB_ID.fullmatch(drive.job_id):
        raise Refused(
            "job_id", f"{drive.job_id!r}: QEMU wants a letter, then letters, digits, '-', '.' and '_', 255 at most"
        )


def _check_bitmap_options(drive: Drive) -> None:
    if drive.sync in (Sync.INCREMENTAL, Sync.BITMAP) and not drive.bitmap:
        raise Refused("bitmap", f"sync {drive.sync} needs the bitmap that holds the changes")
    if drive.sync == Sync.BITMAP and not drive.bitmap_mode:
        raise Refused("bitmap_mode", "sync bitmap needs on-success, never or always")
    if drive.sync == Sync.INCREMENTAL and drive.bitmap_mode not in (BitmapMode.OF_SYNC, BitmapMode.ON_SUCCESS):
        raise Refused("bitmap_mode", "sync incremental has only on-success; use sync bitmap for the others")
    if drive.bitmap_mode and not drive.bitmap:
        raise Refused("bitmap_mode", "there is no bitmap that it could apply to")
    if drive.bitmap and drive.sync in (Sync.FULL, Sync.TOP):
        if not drive.bitmap_mode:
            raise Refused(
                "bitmap", f"sync {drive.sync} does not read it; use sync incremental or bitmap, or a bitmap_mode"
            )
        if drive.bitmap_mode == BitmapMode.NEVER:
            raise Refused("bitmap_mode", f"never has no effect with sync {drive.sync}")


def _check_place(drive: Drive) -> None:
    places = [("target", drive.target)]
    if drive.receipt_path:
        places.append(("receipt" if drive.receipt else "target", drive.receipt_path))
    for option, path in places:
        refuse_inside(option, path)
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise Refused(option, f"{path}: the directory {directory} does not exist; create it first (mode 0700)")
        # Nothing is made beside a block device.
        makes_files = path != drive.target or not is_block_device(path)
        if makes_files:
            check_length(option, path, *drive.names_beside(path))
        if makes_files and not os.access(directory, os.W_OK | os.X_OK):
            raise Refused(option, f"{path}: cannot write to the directory {directory}")
    if os.path.isdir(drive.target):
        raise Refused("target", f"{drive.target} is a directory; name the image's file")
    if drive.existing and not os.path.exists(drive.target):
        raise Refused("target", f"{drive.target} does not exist, and mode is existing")
    if not drive.existing and is_block_device(drive.target):
        raise Refused("mode", f"{drive.target} is a block device, which exists already; use mode existing")
