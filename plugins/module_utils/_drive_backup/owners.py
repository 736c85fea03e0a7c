# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Remember who owns jobs whose ids do not tell it. QEMU does not tell either, so that the file of its lock does."""

from __future__ import annotations

import json
import os

from .._host.files import step


def read_owners(path: str) -> dict[str, str]:
    """Return who owns the jobs with ids of the user's choice; C(path) is that of the VM's lock."""
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
