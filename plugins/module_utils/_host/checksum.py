# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take the checksum of an image. Threads can do that at the same time: hashlib releases the interpreter's lock."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from .files import step
from .pace import AHEAD

if TYPE_CHECKING:
    import threading

    from .pace import Pace

READ_SIZE = 1 << 20


class Stopped(Exception):
    """Nobody needs the checksum any more."""


def sha256(path: str, fd: int, pace: Pace | None = None, stop: threading.Event | None = None) -> str:
    """Return the checksum of the file at C(path) that C(fd) stands for, from its beginning.

    It is of what is on the disk. The page cache is neither asked nor filled: what a hypervisor has in its memory is
    worth more than a backup that nobody reads again today. With a C(pace), another process reads the same data at this
    moment, and they come from the disk once; what both have read leaves the page cache.

    Stopped once C(stop) is set.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(READ_SIZE))
    with step(path, "its checksum was taken"), open(fd, "rb", buffering=0, closefd=False) as image:
        image.seek(0)
        if not pace:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while not (stop and stop.is_set()):
            if pace:
                pace.take(READ_SIZE)
            count = image.readinto(piece)
            if not count:
                return digest.hexdigest()
            digest.update(piece[:count])
            behind = image.tell() - (2 * AHEAD if pace else 0)
            if behind > 0:
                os.posix_fadvise(fd, 0, behind, os.POSIX_FADV_DONTNEED)
    raise Stopped
