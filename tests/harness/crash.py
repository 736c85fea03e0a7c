# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Kills a process right before the n-th step of a module.

A step is a call that changes something outside the module's process: files, QEMU, child processes. The kill comes right
before it, so that n = 1, 2, 3... visits every state that a crash can leave.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import typing as t

if t.TYPE_CHECKING:
    from types import FrameType

FILES = frozenset({"fsync", "ftruncate", "link", "mkdir", "open", "rename", "replace", "truncate", "unlink"})


def _is_step(function: t.Any, frame: FrameType) -> bool:
    name = getattr(function, "__name__", "")
    if name in FILES:
        return bool(function.__module__ == "posix")
    if name == "send":
        # What asyncio is about to send is the argument of the frame that calls; a query changes nothing.
        data = bytes(frame.f_locals.get("data", b""))
        return b"execute" in data and b'"query-' not in data
    return name in {"fork", "fork_exec", "sendmsg"}


def arm(step: int, victim: int) -> None:
    """Count the steps of this process from asyncio.run on, and kill the process `victim` at this one."""
    left = step
    run = asyncio.run

    def profile(frame: FrameType, event: str, argument: t.Any) -> None:
        nonlocal left
        if event == "c_call" and _is_step(argument, frame):
            left -= 1
            if left == 0:
                os.kill(victim, signal.SIGKILL)

    def run_watched(*args: t.Any, **kwargs: t.Any) -> t.Any:
        # From here on: before, there are only imports and the reading of arguments.
        threading.setprofile(profile)
        sys.setprofile(profile)
        return run(*args, **kwargs)

    asyncio.run = run_watched
    # The steps of its children are not the module's.
    os.register_at_fork(after_in_child=lambda: sys.setprofile(None))
