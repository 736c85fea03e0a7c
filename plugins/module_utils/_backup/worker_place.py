# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at the worker of a repository: the process on the hypervisor that brings the sets of a plan to their end.

All that it says stands in files beside its lock, in a directory that only its user can write to and that never hangs.
The lock ends with the worker, so that nobody takes a dead one for alive; the files stay until the next worker begins.
What is read here is loaded by small modules, which look at a worker often.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from .._host.lock import lock_directory, take_at_once

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn


SOON, LATER = 0.02, 0.5
"""Seconds between two looks at the lock: those of the first and of the last ones."""
GROWTH = 1.3
MOMENT = 0.2
"""Seconds that a lock may be held by somebody who only looks at it."""


class Who(NamedTuple):
    """The worker that has the lock, or had it last.

    C(key) is its name, which no other one has; C(id) is that of its sets, C(since) is when it began, in ISO 8601, and
    C(vms) are the names of its VMs, in the order of its plan.
    """

    pid: int
    key: str
    id: str
    since: str
    vms: list[str]


class Standing(NamedTuple):
    """How far a worker is. One that does not run, and has no C(result), has died.

    C(vms) is what backup_set returns for each of its VMs, as far as the worker knows; C(known) says that it has looked
    at all of them. C(result) is all that backup_set has printed, as JSON, when it came to its end.
    """

    who: Who | None
    running: bool
    known: bool = False
    vms: Sequence[dict[str, Any]] = ()
    result: str = ""


class WorkerPlace(NamedTuple):
    """The files of the worker for one repository."""

    lock: str
    progress: str
    result: str
    log: str

    @classmethod
    def of(cls, repository: str) -> WorkerPlace:
        """Return those for the repository at this path, whose file system may hang."""
        digest = hashlib.sha256(os.fsencode(os.path.normpath(repository))).hexdigest()[:16]
        stem = os.path.join(lock_directory(), f"sets-{digest}")
        return cls(*(f"{stem}.{kind}" for kind in ("lock", "progress", "result", "log")))

    def take(self) -> int | None:
        """Take the lock, and return its file descriptor; None where a worker has it."""
        deadline = time.monotonic() + MOMENT
        while True:
            fd = take_at_once(self.lock)
            if fd is not None or time.monotonic() > deadline:
                return fd
            time.sleep(SOON)

    def is_held(self) -> bool:
        """Tell whether a worker has the lock. One that is not there is not made."""
        if not os.path.exists(self.lock):
            return False
        fd = take_at_once(self.lock)
        if fd is None:
            return True
        os.close(fd)
        return False

    def who(self) -> Who | None:
        """Return what the worker says of itself; None where it has only just begun."""
        try:
            return Who(**_load(self.lock))
        except TypeError:
            return None

    def look(self) -> Standing:
        """Return how far the worker is that has the lock, or had it last."""
        running = self.is_held()
        who = self.who()
        progress, result = _load(self.progress), _read(self.result)
        # The next worker says who it is before it says anything else.
        if who is None or self.who() != who:
            return Standing(None, running)
        if progress.get("key") != who.key:
            progress = {}
        ended = not running and _parse(result)
        return Standing(who, running, bool(progress.get("known")), progress.get("vms", ()), result if ended else "")

    def follow(self, key: str, seconds: float) -> Standing:
        """Wait for the end of the worker with this C(key), until it has looked at all its VMs and so long at most."""
        deadline = time.monotonic() + seconds
        pause = SOON
        while True:
            over = time.monotonic() >= deadline
            if over or not self.is_held():
                found = self.look()
                if found.who is None or found.who.key != key:
                    return Standing(None, running=False)
                if not found.running or (over and found.known):
                    return found
            time.sleep(pause)
            pause = min(pause * GROWTH, LATER)


def print_result(result: str) -> NoReturn:
    """End a module with what the worker has printed, as if it had done it itself."""
    sys.stdout.write(result)
    sys.stdout.flush()
    raise SystemExit(int(bool(_parse(result).get("failed"))))


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def _parse(text: str) -> dict[str, Any]:
    """Return what a file says; nothing where it is not whole."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def _load(path: str) -> dict[str, Any]:
    return _parse(_read(path))
