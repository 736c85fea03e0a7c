# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take the checksum of an image. Threads can do that at the same time: hashlib releases the interpreter's lock."""

from __future__ import annotations

import hashlib
import os

from .files import step

READ_SIZE = 1 << 20


def sha256(path: str) -> str:
    """Return the checksum of what is on the disk. The page cache is neither asked nor filled.

    What a hypervisor has in its memory is worth more than a backup that nobody reads again today.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(READ_SIZE))
    with step(path, "its checksum was taken"), open(path, "rb", buffering=0) as image:
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while True:
            count = image.readinto(piece)
            if not count:
                return digest.hexdigest()
            digest.update(piece[:count])
            os.posix_fadvise(image.fileno(), 0, image.tell(), os.POSIX_FADV_DONTNEED)
