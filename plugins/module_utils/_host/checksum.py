# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take the checksum of an image. Threads can do that at the same time: hashlib releases the interpreter's lock."""

from __future__ import annotations

import hashlib
import os

from .files import step

READ_SIZE = 1 << 20


def sha256(path: str, fd: int) -> str:
    """Return the checksum of what is on the disk, of the file at C(path) that C(fd) stands for, from its beginning.

    The page cache is neither asked nor filled: what a hypervisor has in its memory is worth more than a backup that
    nobody reads again today.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(READ_SIZE))
    with step(path, "its checksum was taken"), open(fd, "rb", buffering=0, closefd=False) as image:
        image.seek(0)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while True:
            count = image.readinto(piece)
            if not count:
                return digest.hexdigest()
            digest.update(piece[:count])
            os.posix_fadvise(fd, 0, image.tell(), os.POSIX_FADV_DONTNEED)
