# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell by what the kernel counts whether a process goes on, or stands still: how long it may take, nobody can know."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .process import proc_is_ours, process_stat

STANDSTILL = 3600.0
"""Seconds in which a process has done nothing at all. What a call of its has to wait for, such as a file server that
writes out what it was given, or a device that clears a part of itself, takes minutes."""
WITHOUT_DATA = 7 * 24 * 3600.0
"""Seconds in which a process has read and written nothing, however busy it is."""


@dataclass(frozen=True)
class Work:
    """What a process has done so far: bytes that it has read and written, and clock ticks of a processor.

    None where the kernel does not tell.
    """

    moved: int | None
    ticks: int | None


def work_of(pid: int) -> Work:
    """Return what a child of this process has done so far (proc(5))."""
    if not proc_is_ours():
        return Work(None, None)
    moved = None
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as counters:
            found = dict(line.split(": ") for line in counters)
            moved = int(found["rchar"]) + int(found["wchar"])
    except (OSError, KeyError, ValueError):
        # A kernel without these counters, or a program that no other process may look into.
        pass
    stat = process_stat(pid)
    return Work(moved, int(stat[11]) + int(stat[12]) if stat else None)


class Patience:
    """Knows since when a process stands still; it is looked at now and then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._work = work_of(pid)
        self._moved = self._worked = time.monotonic()

    def ends(self) -> str:
        """Look once more; return why the process is to be given up, empty while it is not."""
        work, now = work_of(self._pid), time.monotonic()
        if work.moved != self._work.moved:
            self._moved = now
        if work != self._work or work == Work(None, None):
            self._worked = now
        self._work = work
        if now - self._worked >= STANDSTILL:
            return f"it has done nothing for {STANDSTILL:g} s"
        if now - self._moved >= WITHOUT_DATA:
            return f"it has read and written nothing for {WITHOUT_DATA:g} s"
        return ""
