# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the same files as another process at the same time, so that the disk is read once.

Whichever of the two comes first takes the data from the disk, and the other one finds it in the page cache, as long as
neither is far ahead.
"""

from __future__ import annotations

import threading

AHEAD = 256 << 20
"""Bytes that this process reads before the other one does, at most."""
LOOK_INTERVAL = 0.02
"""Seconds between two looks at how far the other one has come."""


class Pace:
    """How far the other process has come. Threads that read the files of one disk share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = 0
        self._counters = ""
        self._over = threading.Event()

    def begin(self, pid: int) -> None:
        """Say which process it is. Until then nobody has read anything."""
        self._counters = f"/proc/{pid}/io"

    def end(self) -> None:
        """Say that the other one reads no more: nobody has to wait for it."""
        self._over.set()

    def take(self, count: int) -> None:
        """Wait until C(count) more bytes may be read."""
        with self._lock:
            self._read += count
            mine = self._read
        while mine > self._theirs() + AHEAD and not self._over.wait(LOOK_INTERVAL):
            pass

    def _theirs(self) -> int:
        """Return the bytes that the other one has read so far (proc(5), C(rchar))."""
        if not self._counters:
            return 0
        try:
            with open(self._counters, encoding="ascii") as counters:
                return int(counters.readline().split()[1])
        except (OSError, IndexError):
            # It has just ended, or is not ours to look at: nothing says that it is behind.
            self.end()
            return 0
