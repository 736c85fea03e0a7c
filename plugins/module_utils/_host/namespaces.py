# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where this process stands: its machine's boot and its name spaces, and what can be judged from there.

A container has process ids, paths and ports of its own. What was begun in one of them and is gone on with in another
can be alive, and its process id, its socket or its port mean something else here, or nothing.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from .process import proc_is_ours

if TYPE_CHECKING:
    from collections.abc import Mapping


PROCESSES = "processes"
PATHS = "paths"
PORTS = "ports"


@lru_cache(maxsize=None)
def boot_id() -> str:
    """The boot of the kernel that runs this process: containers and what is outside of them have one."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as source:
        return source.read().strip()


@lru_cache(maxsize=None)
def spaces() -> dict[str, str]:
    """Within what this process's ids, paths and ports mean what they mean; empty where that cannot be told."""
    root = os.stat("/")
    mounts = _space("mnt")
    return {
        # With somebody else's /proc in view, an id that the kernel tells us is another process's there.
        PROCESSES: _space("pid") if proc_is_ours() else "",
        PATHS: f"{mounts}:{root.st_dev}:{root.st_ino}" if mounts else "",
        PORTS: _space("net"),
    }


def _space(kind: str) -> str:
    try:
        return str(os.stat(f"/proc/self/ns/{kind}").st_ino)
    except OSError:
        return ""


def shared(kind: str, recorded: Mapping[str, str]) -> bool:
    """Whether a name of this kind means here what it meant where it was written down.

    Version 0.1.0 did not say where that was: it knew of one place only.
    """
    here = spaces()[kind]
    return bool(here) and recorded.get(kind, here) == here
