# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at the worker of a repository: the process on the hypervisor that brings the sets of a plan to their end.

All that it says stands in files beside its lock, in a directory that only its user can write to and that never hangs.
The lock ends with the worker, so that nobody takes a dead one for alive; the files stay until the next worker begins.
What is read here is loaded by small modules, which look at a worker often.
"""

from __future__ import annotations

import contextlib
import fcntl
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
STEM = "sets-"
"""What the names of all files of workers begin with."""
MOMENT = 0.2
"""Seconds that a lock may be held by those who only look at it."""
ENDING = 5.0
"""Seconds that a worker may take to end when all its VMs are at their end."""
PATIENCE = 120.0
"""Seconds that are waited beyond the wanted ones until a worker has looked at all its VMs."""
UNFINISHED = ("running", "queued")
"""The states of VMs that are not at their end. What defines them takes long to load."""
CANCELLED = "cancelled"
STOPPED = "all sets were cancelled on this hypervisor while the worker made them"
UNKNOWN: dict[str, Any] = {"state": "queued", "reason": "it is about to be looked at", "warnings": [], "disks": []}


class Who(NamedTuple):
    """The worker that has the lock, or had it last.

    C(key) is its name, which no other one has; C(id) is that of its sets, C(run) that of its run, C(since) is when it
    began, in ISO 8601, and C(vms) are the names of its VMs, in the order of its plan. C(wanted) is what is asked for
    each of them, as a digest.
    C(start) and C(space) tell its process from a later one of that pid, and from one of another pid name space.
    What has a default is not said by a worker of an older version, which may run on after an upgrade.
    """

    pid: int
    start: int
    space: str
    key: str
    id: str
    since: str
    vms: list[str]
    wanted: list[str]
    run: str = ""


class Standing(NamedTuple):
    """How far a worker is. One that does not run, and has no C(result), has died.

    C(vms) is what backup_set returns for each of its VMs, as far as the worker knows; C(known) says that it has looked
    at all of them. C(result) is all that backup_set has printed, as JSON, when it came to its end. C(repository) is the
    uuid of its repository, which may have several paths; empty until it has opened that. C(begun) says that it has
    given way to no other worker of that repository, and makes its sets.
    """

    who: Who | None
    running: bool
    known: bool = False
    vms: Sequence[dict[str, Any]] = ()
    result: str = ""
    repository: str = ""
    begun: bool = False

    @property
    def at_the_end(self) -> bool:
        """Whether nothing is left to be done for any VM, so that the worker is about to end."""
        return self.known and not any(vm["state"] in UNFINISHED for vm in self.vms)


class WorkerPlace(NamedTuple):
    """The files of the worker for one repository."""

    lock: str
    progress: str
    result: str
    log: str
    stop: str

    @classmethod
    def of(cls, repository: str) -> WorkerPlace:
        """Return those for the repository at this path, whose file system may hang."""
        digest = hashlib.sha256(os.fsencode(os.path.normpath(repository))).hexdigest()[:16]
        return cls._of_stem(f"{STEM}{digest}")

    @classmethod
    def every(cls) -> list[WorkerPlace]:
        """Return those for all paths of repositories at which this user has had a worker since the machine started."""
        names = sorted(os.listdir(lock_directory())) if os.path.isdir(lock_directory()) else []
        stems = (name.rpartition(".")[0] for name in names if name.startswith(STEM) and name.endswith(".lock"))
        return [cls._of_stem(stem) for stem in stems]

    @classmethod
    def _of_stem(cls, stem: str) -> WorkerPlace:
        path = os.path.join(lock_directory(), stem)
        return cls(*(f"{path}.{kind}" for kind in ("lock", "progress", "result", "log", "stop")))

    def take(self) -> int | None:
        """Take the lock, and return its file descriptor; None where a worker has it.

        Nothing is said of the worker before any more.
        """
        deadline = time.monotonic() + MOMENT
        while True:
            fd = take_at_once(self.lock)
            if fd is not None:
                os.ftruncate(fd, 0)
                return fd
            if time.monotonic() > deadline:
                return None
            time.sleep(SOON)

    def is_held(self) -> bool:
        """Tell whether a worker has the lock. Who only looks does not keep others from looking."""
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def who(self) -> Who | None:
        """Return what the worker says of itself; None where it has only just begun."""
        said = {**Who._field_defaults, **_load(self.lock)}
        try:
            return Who(**{name: said[name] for name in Who._fields})
        except KeyError:
            return None

    def look(self) -> Standing:
        """Return how far the worker is that has the lock, or had it last."""
        running = self.is_held()
        who = self.who()
        progress, stopped = _load(self.progress), _read(self.stop)
        printed_by, _newline, result = _read(self.result).partition("\n")
        # The next worker takes away what the one before has said, before it says anything.
        if who is None or self.who() != who:
            return Standing(None, running)
        if progress.get("key") != who.key:
            progress = {}
        vms = progress.get("vms") or [{**UNKNOWN, "name": name, "id": who.id} for name in who.vms]
        if running or printed_by != who.key or not _parse(result):
            result = _cancelled(vms) if stopped == who.key and not running else ""
        opened = progress.get("repository", ""), bool(progress.get("begun"))
        return Standing(who, running, bool(progress.get("known")), vms, result, *opened)

    def follow(self, key: str, seconds: float) -> Standing:
        """Wait for the end of the worker with this C(key), until it has looked at all its VMs and so long at most."""
        deadline = time.monotonic() + seconds
        pause = SOON
        while True:
            late = time.monotonic() - deadline
            if late >= 0 or not self.is_held():
                found = self.look()
                if found.who is None or found.who.key != key:
                    return Standing(None, running=False)
                patience = ENDING if found.at_the_end else 0 if found.known else PATIENCE
                if not found.running or late >= patience:
                    return found
            time.sleep(pause)
            pause = min(pause * GROWTH, LATER)


def _cancelled(vms: Sequence[dict[str, Any]]) -> str:
    """Return the result of a worker that was stopped because its sets were cancelled."""
    states = [{**vm, "state": CANCELLED, "error": STOPPED} if vm["state"] in UNFINISHED else vm for vm in vms]
    changed = any(vm.get("changed") for vm in vms)
    return json.dumps({"failed": True, "changed": changed, "msg": STOPPED, "vms": states, "qmp": []}) + "\n"


def vms_of(result: str) -> Sequence[dict[str, Any]]:
    """Return what a result says of each VM."""
    vms: Sequence[dict[str, Any]] = _parse(result).get("vms", ())
    return vms


def gives_way(result: str) -> str:
    """Return why a worker has left its sets to others; empty where it has not."""
    found = _parse(result)
    return str(found["msg"]) if found.get("gives_way") else ""


def all_of(result: str, set_id: str, names: Sequence[str]) -> bool:
    """Tell whether a result is about these VMs, and no others, with all that backup_set returns."""
    found = _parse(result)
    return "headline" in found and [(vm["id"], vm["name"]) for vm in found["vms"]] == [(set_id, name) for name in names]


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
