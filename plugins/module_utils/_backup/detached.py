# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Leave a process on the hypervisor that brings the sets of a plan to their end, whether anybody waits for them or not.

It is a fork of the module, and does what a call with C(state=completed) does: its memory is the repository and QEMU,
and one that is killed is a killed module. There is one for each repository at a time, by a lock that ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import json
import os
import signal
import sys
import time
import zipfile
from typing import TYPE_CHECKING, NamedTuple

from .._common.errors import BackupError, Refused, why
from .._common.formats import utc_now
from .._host.lock import lock_directory, locked, take_at_once
from .._host.worker import run_in_worker
from .._plan.model import parse_plan

if TYPE_CHECKING:
    from typing import NoReturn

    from ansible.module_utils.basic import AnsibleModule

    from .._host.worker import Main


GO = b"g"
MOMENT = 2.0
"""Seconds in which a process that has the lock says who it is."""
STOPPING = 30.0
"""Seconds that a process takes at most to end. It may hang in the kernel."""
LIMIT = 4096
"""Bytes that are read of what a process says of itself."""


class Who(NamedTuple):
    """The process that has the lock: C(id) is that of its sets, C(since) is when it was left, in ISO 8601."""

    pid: int
    id: str
    since: str


class Successor:
    """A process that waits for the word to go on with the sets of a plan. Without it, it ends with its parent."""

    def __init__(self, sink: int) -> None:
        self._sink = sink

    def go(self) -> bool:
        """Give the word; False where somebody has stopped it already."""
        try:
            return os.write(self._sink, GO) == len(GO)
        except BrokenPipeError:
            return False


def lock_path(repository: str) -> str:
    """Return the path of the lock for the sets in the repository at this path, which may hang."""
    digest = hashlib.sha256(os.fsencode(os.path.normpath(repository))).hexdigest()[:16]
    return os.path.join(lock_directory(), f"sets-{digest}.lock")


def log_path(repository: str) -> str:
    """Return the path of what the last such process has said."""
    return lock_path(repository)[: -len("lock")] + "log"


def prepare(module: AnsibleModule, main: Main) -> Successor:
    """Fork a process that is to go on with C(main). Refused where another one has the sets of this repository."""
    plan = parse_plan(module.params["plan"])
    path = lock_path(plan.repository)
    fd = take_at_once(path)
    if fd is None:
        who = _read(path)
        raise Refused(
            "detach",
            (
                f"process {who.pid} makes the sets {who.id} in {plan.repository} since {who.since}"
                if who
                else f"another process begins to make sets in {plan.repository}"
            )
            + "; wait for its end, back up without detach beside it, or cancel all sets that are being made",
        )
    _load_payload()
    source, sink = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        os.close(sink)
        _live(module, main, plan.repository, Who(os.getpid(), plan.id, utc_now()), fd, source)
    os.close(source)
    os.close(fd)
    return Successor(sink)


def _load_payload() -> None:
    """Load all that Ansible has packed for this module, which it removes when the module has ended."""
    payload = next((part for part in sys.path if zipfile.is_zipfile(part)), None)
    if not payload:
        return
    with zipfile.ZipFile(payload) as packed:
        names = [name[: -len(".py")].replace("/", ".") for name in packed.namelist() if name.endswith(".py")]
    for name in names:
        if name.startswith("ansible") and not name.endswith("__init__"):
            # What needs a library that is not here is met without it, too, and says so then.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _live(module: AnsibleModule, main: Main, repository: str, who: Who, lock: int, source: int) -> NoReturn:
    """Live as that process. It keeps C(lock) until its end."""
    status = 1
    try:
        os.setsid()
        log = os.open(log_path(repository), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        # Ansible reads the module's output to its end, and would wait.
        for place, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(file, place)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(who._asdict()).encode(), 0)
        if os.read(source, len(GO)) == GO:
            status = _go_on(module, main, repository, who.id)
    finally:
        os._exit(status)


def _go_on(module: AnsibleModule, main: Main, repository: str, set_id: str) -> int:
    """Bring the sets to their end; return the exit status of the module."""
    # What was to be made is made by now: a repository that is missing has gone away.
    plan = {**module.params["plan"], "create_repository": False}
    module.params.update(plan=plan, state="completed", detach=False, unattended=False)
    module.log(f"vmfleet.backup: goes on with the sets {set_id} in {repository}")
    try:
        run_in_worker(module, main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        how = "are there" if status == 0 else f"are not all there, see {log_path(repository)}"
        module.log(f"vmfleet.backup: the sets {set_id} in {repository} {how}")
        return status


def _is_held(path: str) -> bool:
    """Tell whether a process has this lock. One that is not there is not made."""
    if not os.path.exists(path):
        return False
    fd = take_at_once(path)
    if fd is None:
        return True
    os.close(fd)
    return False


def _read(path: str) -> Who | None:
    """Return what the process with the lock says of itself; None where it has only just begun."""
    try:
        with open(path, "rb") as file:
            said = json.loads(file.read(LIMIT))
        return Who(int(said["pid"]), str(said["id"]), str(said["since"]))
    except (ValueError, LookupError, TypeError):
        return None


async def stop(repository: str) -> None:
    """End the process that makes the sets in this repository, where there is one. Copies that run are left running."""
    path = lock_path(repository)
    deadline = time.monotonic() + MOMENT
    while _is_held(path):
        who = _read(path)
        if who:
            await _end(who, path, repository)
            return
        if time.monotonic() > deadline:
            raise BackupError(f"{repository}: a process on this hypervisor begins to make sets; cancel them again")
        await asyncio.sleep(0.02)


async def _end(who: Who, path: str, repository: str) -> None:
    """End a process, and wait until it has let its lock go."""
    try:
        os.kill(who.pid, signal.SIGTERM)
    except ProcessLookupError:
        # It has just ended by itself.
        pass
    except PermissionError as error:
        reason = f"process {who.pid}, which makes the sets {who.id}, cannot be stopped: {why(error)}"
        raise BackupError(reason) from None
    async with locked(path, f"the sets {who.id} in {repository}", STOPPING):
        pass
