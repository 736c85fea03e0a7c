# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lock a VM on its hypervisor, and note who owns its jobs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from .._host.files import step
from .._host.lock import lock_directory

if TYPE_CHECKING:
    from .._host.process import Process
    from .connection import Address


def host_lock_path(process: Process | None, address: Address) -> str:
    """Return the path of the lock of one QEMU. Over TCP the process is unknown, and the address stands for it."""
    directory = lock_directory()
    if process is not None:
        return os.path.join(directory, f"{process.pid}-{process.start}.lock")
    return os.path.join(directory, str(address).replace("/", "_") + ".lock")


def read_owners(path: str) -> dict[str, str]:
    """Return who owns the jobs with ids of the user's choice. QEMU does not tell, so that its lock's file does."""
    try:
        with step(path, "it was read"), open(path, encoding="utf-8") as source:
            return dict(json.loads(source.read() or "{}"))
    except FileNotFoundError:
        return {}


def write_owners(lock: int, owners: dict[str, str]) -> None:
    """Replace what read_owners will tell; C(lock) is the lock's file descriptor."""
    content = json.dumps(owners).encode()
    with step(os.readlink(f"/proc/self/fd/{lock}"), "the owners of jobs were written"):
        os.pwrite(lock, content, 0)
        os.ftruncate(lock, len(content))
