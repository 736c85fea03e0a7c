# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell which file system a path is on, by what stays the same when the machine starts again."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass

BY_UUID = "/dev/disk/by-uuid"
BTRFS = "/sys/fs/btrfs"
FROM_UUID = frozenset({"ext2", "ext3", "ext4"})
"""File systems whose id (statfs(2)) comes from their UUID. That of XFS is the number of its device, and that of btrfs
is another one for each subvolume, of which a rollback puts a new one in the place of the old one.
"""
VOLATILE = frozenset({"tmpfs", "ramfs", "rootfs", "devtmpfs"})
"""File systems whose files are gone for good when they are unmounted."""
ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Place:
    """Where a file system is mounted, and what it is known by. Both are empty where nobody can tell."""

    mount: str = ""
    file_system: str = ""


def place_of(path: str) -> Place:
    """Return where a path is, or would be if its directories were there. Nothing for what is in memory only."""
    try:
        fd = _open_above(path)
    except OSError:
        return Place()
    try:
        mount, kind, source = _mount_of(fd)
        if not mount or kind in VOLATILE:
            return Place()
        if kind in FROM_UUID:
            return Place(mount, f"{os.fstatvfs(fd).f_fsid:016x}")
    except OSError:
        return Place()
    finally:
        os.close(fd)
    # A device may have another name each time. What is no device is named by a server and its path, or by a pool.
    if not source.startswith("/dev/"):
        return Place(mount, source)
    return Place(mount, _uuid_of_btrfs(source) if kind == "btrfs" else _uuid(source))


def mount_of(path: str) -> str:
    """Return where what a path is on is mounted, be it in memory only; empty where nobody can tell."""
    try:
        fd = _open_above(path)
    except OSError:
        return ""
    try:
        return _mount_of(fd)[0]
    finally:
        os.close(fd)


def _open_above(path: str) -> int:
    """Open the next directory above a path that is there."""
    above = os.path.dirname(path)
    try:
        return os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        if above in ("", path):
            raise
        return _open_above(above)


def _mount_of(fd: int) -> tuple[str, str, str]:
    """Return the mount point, type and source of what is open; empty where it is not mounted here (proc(5))."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        number = next((line.split()[1] for line in info if line.startswith(b"mnt_id:")), b"")
    with open("/proc/self/mountinfo", "rb") as mounts:
        for words in map(bytes.split, mounts):
            if words[0] == number:
                kind, source = words[words.index(b"-", 6) + 1 :][:2]
                return _text(words[4]), _text(kind), _text(source)
    return "", "", ""


def _text(word: bytes) -> str:
    return os.fsdecode(ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), word))


def _uuid(device: str) -> str:
    """Return the UUID of the file system on a device; empty where udev does not tell."""
    try:
        number, names = os.stat(device).st_rdev, os.listdir(BY_UUID)
    except OSError:
        return ""
    return next((name for name in names if _number(os.path.join(BY_UUID, name)) == number), "")


def _number(path: str) -> int:
    """Return the number of a device; 0, which none has, where a link leads to one that is gone."""
    try:
        return os.stat(path).st_rdev
    except OSError:
        return 0


def _uuid_of_btrfs(device: str) -> str:
    """Return the UUID of a btrfs that is mounted. It may have several devices, and udev names only one of them."""
    try:
        status = os.stat(device)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}\n"
        for path in glob.glob(f"{BTRFS}/*/devices/*/dev"):
            with open(path, encoding="ascii") as text:
                if text.read() == number:
                    return path[len(BTRFS) + 1 :].split("/")[0]
    except OSError:
        return ""
    return ""
