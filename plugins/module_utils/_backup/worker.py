# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Leave the sets of a plan to a worker: a process on the hypervisor that makes them whether anybody waits or not.

It is a fork of the module, and does what a call with C(state=completed) does: its memory is the repository and QEMU,
and one that is killed is a killed module. There is one for each repository at a time, by a lock that ends with it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import secrets
import signal
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, why
from .._common.formats import Word, utc_now
from .._host.lock import locked
from .._host.worker import run_in_worker
from .._plan.model import parse_plan
from .board import Board
from .outcome import describe, headline, outcome_of, summarize
from .worker_place import Who, WorkerPlace, print_result

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, NoReturn

    from ansible.module_utils.basic import AnsibleModule

    from .._plan.model import Plan

    Main = Callable[[AnsibleModule, Board], Coroutine[Any, Any, dict[str, Any]]]


MOMENT = 2.0
"""Seconds in which a worker that has the lock says who it is."""
STOPPING = 30.0
"""Seconds that a worker takes at most to end. It may hang in the kernel."""
ORDERS = ("takeover", "supersede", "adopt")
"""What a worker that was left without it does not do."""


class Detach(Word):
    """Whether sets are left to a worker."""

    NEVER = "never"
    PREFERRED = "preferred"
    REQUIRED = "required"


def leave(module: AnsibleModule, main: Main) -> None:
    """Leave the sets to a worker that does C(main), and end the module with how far it is.

    Return where this call has to make them itself, because the repository has a worker with other sets, or the new one
    has died at once.
    """
    try:
        plan = parse_plan(module.params["plan"])
        place = WorkerPlace.of(plan.repository)
        key = _begin(module, main, place) or _join(module, plan, place)
    except BackupError as error:
        module.fail_json(msg=str(error))
        raise
    if not key:
        return
    found = place.follow(key, module.params["slice"])
    if found.result:
        print_result(found.result)
    if found.running:
        outcomes = [outcome_of(vm) for vm in found.vms]
        module.exit_json(
            changed=any(outcome.changed for outcome in outcomes),
            vms=found.vms,
            summary=summarize(outcomes),
            headline=headline(outcomes, "started"),
            text=describe(outcomes),
            qmp=[],
            worker=key,
        )


def _begin(module: AnsibleModule, main: Main, place: WorkerPlace) -> str:
    """Fork the worker; return its key, or nothing where the repository has one."""
    fd = place.take()
    if fd is None:
        return ""
    _load_payload()
    key = secrets.token_hex(8)
    sys.stdout.flush()
    sys.stderr.flush()
    source, sink = os.pipe()
    if os.fork() == 0:
        os.close(source)
        _live(module, main, place, fd, sink, key)
    os.close(fd)
    os.close(sink)
    # It says who it is, or it dies.
    os.read(source, 1)
    os.close(source)
    return key


def _join(module: AnsibleModule, plan: Plan, place: WorkerPlace) -> str:
    """Return the key of the worker that makes the same sets; nothing where it makes others."""
    who = place.who()
    makes_them = who is not None and who.id == plan.id and not Counter(vm.name for vm in plan.vms) - Counter(who.vms)
    if who and makes_them and not any(module.params[order] for order in ORDERS):
        return who.key
    if module.params["detach"] == Detach.REQUIRED:
        raise Refused(
            "detach",
            (
                f"process {who.pid} makes the sets {who.id} in {plan.repository} since {who.since}"
                if who
                else f"another process begins to make sets in {plan.repository}"
            )
            + "; wait for its end, back up without detach beside it, or cancel all sets that are being made",
        )
    return ""


# The worker


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
            with suppress(ImportError):
                importlib.import_module(name)


def _live(module: AnsibleModule, main: Main, place: WorkerPlace, lock: int, sink: int, key: str) -> NoReturn:
    """Live as the worker. It keeps C(lock) until its end."""
    status = 1
    try:
        os.setsid()
        plan = parse_plan(module.params["plan"])
        who = Who(os.getpid(), key, plan.id, utc_now(), [vm.name for vm in plan.vms])
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(who._asdict()).encode(), 0)
        # Ansible reads the module's output to its end, and would wait.
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), _new(place.result), _new(place.log))):
            os.dup2(file, number)
        os.close(sink)
        status = _make(module, main, plan, Board(place.progress, key))
    finally:
        os._exit(status)


def _new(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)


def _make(module: AnsibleModule, main: Main, plan: Plan, board: Board) -> int:
    """Bring the sets to their end; return the exit status of the module."""
    module.params.update(state="completed", detach=Detach.NEVER, unattended=False, slice=0)
    module.log(f"vmfleet.backup: makes the sets {plan.id} in {plan.repository}")
    try:
        run_in_worker(module, lambda module: main(module, board))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        module.log(f"vmfleet.backup: the sets {plan.id} in {plan.repository} are {'not all ' if status else ''}there")
        return status


# To end it


async def stop(repository: str) -> None:
    """End the worker of this repository, where there is one. Copies that run are left running."""
    place = WorkerPlace.of(repository)
    deadline = time.monotonic() + MOMENT
    while place.is_held():
        who = place.who()
        if who:
            await _end(who, place, repository)
            return
        if time.monotonic() > deadline:
            raise BackupError(f"{repository}: a process on this hypervisor begins to make sets; cancel them again")
        await asyncio.sleep(0.02)


async def _end(who: Who, place: WorkerPlace, repository: str) -> None:
    """End a worker, and wait until it has let its lock go."""
    try:
        os.kill(who.pid, signal.SIGTERM)
    except ProcessLookupError:
        # It has just ended by itself.
        pass
    except PermissionError as error:
        reason = f"process {who.pid}, which makes the sets {who.id}, cannot be stopped: {why(error)}"
        raise BackupError(reason) from None
    async with locked(place.lock, f"the sets {who.id} in {repository}", STOPPING):
        pass
