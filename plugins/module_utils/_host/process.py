# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell processes, name spaces and machines from each other, and start programs that die with this process.

A container has process ids, paths and ports of its own. What was begun in one of them and is gone on with in another
can be alive, and its process id, its socket or its port mean something else here, or nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


PROCESSES = "processes"
PATHS = "paths"
PORTS = "ports"
"""What is known by names that mean something else in another name space."""
PROC_FDS = "/proc/self/fd/"
"""Where a process finds its open files by their descriptors."""
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
        stat = process_stat(pid) if proc_is_ours() else []
        return cls(pid, int(stat[19])) if stat else None

    @classmethod
    def of_thread(cls, thread: int) -> Process | None:
        """Return the process that a thread of this id belongs to; None as of() does."""
        try:
            with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as status:
                group = next((line.split()[1] for line in status if line.startswith("Tgid:")), "")
        except OSError:
            return None
        return cls.of(int(group)) if group else None

    @property
    def arguments(self) -> list[str]:
        """Return its command line; an empty one where it has ended, or is none of our business."""
        try:
            with open(f"/proc/{self.pid}/cmdline", "rb") as command_line:
                content = command_line.read()
        except OSError:
            return []
        # It lives after the reading, so the pid was its own all the time.
        return [os.fsdecode(argument) for argument in content.split(b"\0")[:-1]] if self.alive else []

    @property
    def alive(self) -> bool:
        """Return whether it has not ended."""
        # A zombie has closed its files and ended its jobs: only its exit status is still there.
        stat = process_stat(self.pid)
        return bool(stat) and int(stat[19]) == self.start and stat[0] != "Z"

    @property
    def stopped(self) -> bool:
        """Return whether a signal or a debugger has stopped it."""
        return process_stat(self.pid)[:1] in (["T"], ["t"])


def proc_is_ours() -> bool:
    """Return whether /proc shows processes by the ids that they have here: that of another pid namespace does not."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            ids = next((line.split()[1:] for line in status if line.startswith("NSpid:")), [""])
    except OSError:
        return False
    # Kernels without nested name spaces do not have the line.
    return len(ids) == 1


def process_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (proc(5)); empty where there is no such process.

    OSError where this process cannot look: with too many files open, no process has ended for that.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


@lru_cache(maxsize=None)
def spaces() -> dict[str, str]:
    """Return the name spaces in which this process knows ids, paths and ports; empty where that cannot be told."""
    root = os.stat("/")
    mounts = _space("mnt")
    return {
        # In a /proc of another name space, a process id from the kernel would be that of another process.
        PROCESSES: _space("pid") if proc_is_ours() else "",
        PATHS: f"{mounts}:{root.st_dev}:{root.st_ino}" if mounts else "",
        PORTS: _space("net"),
    }


def _space(kind: str) -> str:
    """Return the id of a name space of this process; empty where it cannot be told."""
    try:
        return str(os.stat(f"/proc/self/ns/{kind}").st_ino)
    except OSError:
        return ""


def shared(kind: str, recorded: Mapping[str, str]) -> bool:
    """Return whether a name of this kind means here what it meant in the name spaces that were C(recorded).

    Version 0.1.0 recorded none, and is taken to have stood where this process stands.
    """
    here = spaces()[kind]
    return bool(here) and recorded.get(kind, here) == here


def machine_id() -> str:
    """Return the identity of this hypervisor (machine-id(5))."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii") as source:
                found = source.read().strip()
        except FileNotFoundError:
            continue
        # It is empty in images that are to be cloned, until their first boot.
        if found:
            return found
    return os.uname().nodename


@lru_cache(maxsize=None)
def boot_id() -> str:
    """Return the boot of the kernel that runs this process, which is one for all containers of a machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as source:
        return source.read().strip()


def this_machine() -> tuple[str, str, str]:
    """Return the name of the machine that this process runs on, its identity and its boot."""
    return os.uname().nodename, machine_id(), boot_id()
