# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell by QEMU's locks whether it has an image open."""

from __future__ import annotations

import fcntl
import os
import struct

from .._host.target_files import open_image

FLOCK = "hhqqi"
"""struct flock: type, whence, start, length, pid."""
QEMU_LOCKS = (100, 200)
"""Where QEMU's locks on an image begin, and how many bytes they span at most (block/file-posix.c)."""


def is_locked(path: str) -> bool:
    """Return whether a QEMU has this image open, in whatever name space, even if only to read it.

    QEMU says with locks on single bytes what it does with a file, and what it does not want others to do. No command
    of qemu-img asks for them without writing where the format is raw.
    """
    fd = open_image(path, os.O_RDONLY)
    try:
        found = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *QEMU_LOCKS, 0))
    finally:
        os.close(fd)
    return bool(struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK)
