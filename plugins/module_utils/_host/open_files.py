# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell who has a file or a block device open: not every program that writes to a disk image locks it.

See proc(5). A process of another user, or of another pid namespace, cannot be looked into.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import Refused, warn_once

if TYPE_CHECKING:
    from collections.abc import Iterator

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode (PROC_PID_INIT_INO of Linux): whoever is in another one does not see all processes."""


@dataclass(frozen=True)
class Users:
    """Who uses a file, in words, and whether all processes could be looked into."""

    names: tuple[str, ...]
    complete: bool


def users_of(path: str) -> Users:
    """Return who uses what stands at C(path), besides this process: open, mapped, as a loop device or as swap."""
    wanted = os.stat(path)
    found = [f"loop device {name}" for name in _loop_devices(wanted)]
    found += ["swap"] if any(_is_same(name, wanted) for name in _swaps()) else []
    complete = os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            if _has_open(pid, wanted) or _has_mapped(pid, wanted):
                found.append(f"{_name(pid)} (process {pid})")
        except PermissionError:
            complete = False
        except OSError:
            # It has ended by now.
            continue
    return Users(tuple(found), complete)


def refuse_used(option: str, path: str) -> None:
    """Refuse what somebody uses; warn where it cannot be seen whether somebody does."""
    users = users_of(path)
    if users.names:
        raise Refused(option, f"{path} is in use by {', '.join(users.names)}; end that first")
    if not users.complete:
        warn_once(
            path,
            f"{path}: user {os.geteuid()} cannot see here whether a process of another user, or outside of a"
            " container, has it open. A VM that takes no locks would continue with the deleted file",
        )


def _is_same(path: str, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if stat.S_ISBLK(wanted.st_mode):
            return stat.S_ISBLK(found.st_mode) and found.st_rdev == wanted.st_rdev
        return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
    return False


def _has_open(pid: str, wanted: os.stat_result) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        # What is no file is left out. To look at a file of a network file system that is gone would hang: its number
        # tells without that, where the kernel gives it (from 5.14 on).
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(path).startswith("/") and _may_be(pid, fd, wanted) and _is_same(path, wanted):
                return True
    return False


def _may_be(pid: str, fd: str, wanted: os.stat_result) -> bool:
    if stat.S_ISBLK(wanted.st_mode):
        # One device can have several files.
        return True
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as source:
        number = next((line.split()[1] for line in source if line.startswith("ino:")), "")
    return number in ("", str(wanted.st_ino))


def _has_mapped(pid: str, wanted: os.stat_result) -> bool:
    number = str(wanted.st_ino)
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as source:
        mapped = [line.split(maxsplit=5)[0] for line in source if line.split(maxsplit=5)[4] == number]
    return any(_is_same(f"/proc/{pid}/map_files/{place}", wanted) for place in mapped)


def _name(pid: str) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as source:
        return source.read().strip()


def _loop_devices(wanted: os.stat_result) -> Iterator[str]:
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as source:
            if _is_same(source.read().rstrip("\n"), wanted):
                yield path.split("/")[3]


def _swaps() -> list[str]:
    with contextlib.suppress(OSError), open("/proc/swaps", encoding="utf-8", errors="replace") as source:
        return [line.split()[0] for line in source.readlines()[1:]]
    return []
