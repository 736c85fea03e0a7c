# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs a module that is SIGKILLed at its n-th step: `python -m ...tests.harness.crash N MODULE`, arguments on stdin.

A step is a call that changes something outside the process: files, QEMU, child processes. The kill comes right before
it, so that n = 1, 2, 3... visits every state that a crash can leave.
"""

from __future__ import annotations

import asyncio
import os
import runpy
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
    return name in {"fork_exec", "sendmsg"}


def main() -> None:
    """Count the steps of the module, and die at the one that was asked for."""
    left = int(sys.argv.pop(1))
    run = asyncio.run

    def profile(frame: FrameType, event: str, argument: t.Any) -> None:
        nonlocal left
        if event == "c_call" and _is_step(argument, frame):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def run_watched(*args: t.Any, **kwargs: t.Any) -> t.Any:
        # From here on: before, there are only imports and the reading of arguments.
        threading.setprofile(profile)
        sys.setprofile(profile)
        return run(*args, **kwargs)

    asyncio.run = run_watched
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
