# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether a process id, a path or a port means here what it meant to another process.

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
