# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Let other processes of the hypervisor go before this one, and before all that it starts from now on."""

from __future__ import annotations

import os
import subprocess

from .._common.errors import why
from .._common.formats import Word
from .._common.printable import printable

BOUND = 5.0


class Ionice(Word):
    """When the disks serve a process, as others wait for them."""

    NONE = "none"
    BEST_EFFORT = "best-effort"
    IDLE = "idle"


CLASSES = {Ionice.BEST_EFFORT: ("-c", "2", "-n", "7"), Ionice.IDLE: ("-c", "3")}
"""As ionice(1) takes them: the last among those that are served in turn, and after all others."""


def give_way(niceness: int, ionice: str) -> str:
    """Lower the priorities of this process, which has one thread; return why that of its I/O stays, or nothing."""
    os.nice(niceness)
    if ionice == Ionice.NONE:
        return ""
    command = ["ionice", *CLASSES[Ionice(ionice)], "-p", str(os.getpid())]
    try:
        # The call of the kernel has another number on each architecture; this program knows it.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"ionice: {why(error) if isinstance(error, OSError) else error}"
    if not done.returncode:
        return ""
    return printable(os.fsdecode(done.stderr).strip()) or f"ionice: status {done.returncode}"
