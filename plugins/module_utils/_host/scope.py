# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Move this process out of the session or the unit that has started it, into a unit of systemd of its own.

systemd ends all processes of a unit with it, and, where it is told to, those of a session with that; a fork stays among
them. A scope is a unit for processes that are there already, and ends with the last of them.

Reference: org.freedesktop.systemd1(5), StartTransientUnit; systemd.scope(5).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from .._common.errors import why
from .._common.printable import printable
from .process import proc_is_ours

INIT = "/run/systemd/system"
"""Is there where systemd is the init (sd_booted(3))."""
BOUND = 5.0
"""Seconds that systemd gets: it takes milliseconds."""
INTERVAL = 0.01
BUS = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
TOP = "-.slice"
"""Beside the units of all services, of all sessions and of all machines: there a weight is one against these."""


def offers_scopes() -> bool:
    """Return whether systemd is the init of this process, which may ask it for anything."""
    return os.geteuid() == 0 and os.path.isdir(INIT) and _runs_here()


def _runs_here() -> bool:
    # A container may see the /run of its host. The id of a process in there means another process to that systemd.
    try:
        with open("/proc/1/comm", encoding="ascii", errors="replace") as name:
            return name.read().strip() == "systemd" and proc_is_ours()
    except OSError:
        return False


def enter_scope(name: str, description: str, cpu_weight: int | None = None) -> str:
    """Move this process into a new scope; return why it stays where it is, or nothing.

    What it starts from now on is in there, too. C(cpu_weight) is that of systemd.resource-control(5).
    """
    deadline = time.monotonic() + BOUND
    properties = [
        ("PIDs", "au", "1", str(os.getpid())),
        ("Description", "s", printable(description)),
        # One that has failed would be kept for somebody to look at it.
        ("CollectMode", "s", "inactive-or-failed"),
    ]
    if cpu_weight is not None:
        properties += [("CPUWeight", "t", str(cpu_weight)), ("Slice", "s", TOP)]
    words = [word for each in properties for word in each]
    reason = _call("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", str(len(properties)), *words, "0")
    while not reason and not _is_in(name):
        # It has been told to, and does it soon.
        if time.monotonic() > deadline:
            reason = f"systemd has not moved it within {BOUND:g} s"
        time.sleep(INTERVAL)
    return reason


def _call(method: str, *arguments: str) -> str:
    """Call a method of systemd; return why that has failed, or nothing."""
    program = shutil.which("busctl")
    if program is None:
        return "busctl, which is a part of systemd, is not installed"
    try:
        done = subprocess.run(
            [program, "call", *BUS, method, "--", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=BOUND,
            check=False,
            cwd="/",
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return f"systemd does not answer within {BOUND:g} s"
    except OSError as error:
        return f"{program}: {why(error)}"
    if not done.returncode:
        return ""
    return printable(os.fsdecode(done.stderr).strip()) or f"busctl: status {done.returncode}"


def _is_in(name: str) -> bool:
    """Return whether this process is in the scope; it is in several hierarchies where these are of version 1."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as groups:
        return any(line.rstrip("\n").endswith(f"/{name}") for line in groups)
