# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell processes from each other, and start programs that die with this one, however it ends."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


# Only the process itself can ask to be killed with its parent (PR_SET_PDEATHSIG), which may have ended by then.
LAUNCHER = """
import ctypes, os, signal, sys
os.nice(int(sys.argv[2]))
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[3], sys.argv[3:])
"""


def die_with_parent(command: Sequence[str], niceness: int = 0) -> list[str]:
    """Return a command that runs this one, and is killed when this process ends. FileNotFoundError where there is none.

    C(niceness) is added to this process's own (nice(2)).
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(command[0])
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(niceness), program, *command[1:]]


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one of the same pid: C(start) is in clock ticks since boot."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process of this id; None where there is none, or where it is out of sight, as from a container."""
        stat = _process_stat(pid) if proc_is_ours() else []
        return cls(pid, int(stat[19])) if stat else None

    @property
    def alive(self) -> bool:
        """Return whether it has not ended."""
        # A zombie has closed its files and ended its jobs: only its exit status is still there.
        stat = _process_stat(self.pid)
        return bool(stat) and int(stat[19]) == self.start and stat[0] != "Z"

    @property
    def stopped(self) -> bool:
        """Return whether a signal or a debugger has stopped it."""
        return _process_stat(self.pid)[:1] in (["T"], ["t"])


def proc_is_ours() -> bool:
    """Return whether /proc shows processes by the ids that they have here: that of another pid namespace does not."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            ids = next((line.split()[1:] for line in status if line.startswith("NSpid:")), [""])
    except OSError:
        return False
    # Kernels without nested name spaces do not have the line.
    return len(ids) == 1


def _process_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (proc(5)); empty where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return []
