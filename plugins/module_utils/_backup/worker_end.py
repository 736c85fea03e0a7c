# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""End the worker of a repository before the sets are cancelled that it makes: it would begin those that are queued.

Without their worker, nobody watches the copies. Whatever keeps the sets from being cancelled is found before it ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, why
from .._common.selection import Selection
from .._host.lock import locked
from .._host.probe import probe_if_there
from .._host.process import PROCESSES, Process, spaces
from .._repository.access import find_repository
from .._repository.repository import check_owner
from .cancel import plan_of_names
from .outcome import UNFINISHED
from .worker import new_file, process_of
from .worker_place import WorkerPlace

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._host.worker import ThreadedCalls
    from .._plan.model import Plan
    from .._repository.repository import VmRecords
    from .worker_place import Standing, Who


MOMENT = 2.0
"""Seconds in which a worker that has the lock says who it is."""
STOPPING = 30.0
"""Seconds that a worker takes at most to end. It may hang in the kernel."""


async def make_way(params: dict[str, Any], given: Plan | None, calls: ThreadedCalls) -> None:
    """End the worker where all its sets are to be cancelled: those of the plan C(given), or those of the names.

    Raises Refused where only some are, and it would begin one of them afterwards.
    """
    path = calls.watch.path
    found = await find(path)
    if found is None or found.who is None or (given and given.id != found.who.id):
        return
    await probe_if_there(path, writing=True)
    selection = Selection.of(params)
    chosen = _is_of(given) if given else selection.takes
    creates = bool(given and given.create_repository)
    repository = await calls.run(find_repository, path, creates, params["trust_others"])
    names = [name for name in dict.fromkeys(found.who.vms) if chosen(name)]
    if len(names) < len(set(found.who.vms)):
        later = [name for name in names if begins(found, name, await calls.run(repository.records, name))]
        if later:
            raise Refused(
                "names",
                f"{', '.join(later)}: the worker of {path}, process {found.who.pid}, would start the sets"
                f" {found.who.id} of these VMs afterwards. Cancel the sets of all VMs, or wait until these are copied",
            )
        return
    plan = given
    if plan is None:
        plan = await calls.run(plan_of_names, repository, selection)
    for vm in plan.vms:
        await calls.run(check_owner, repository, vm.name)
    await stop(path)


def _is_of(plan: Plan) -> Callable[[str], bool]:
    return {vm.name for vm in plan.vms}.__contains__


def begins(found: Standing, name: str, records: VmRecords) -> bool:
    """Tell whether a worker would begin its set of a VM, though what is being made of that VM now is cancelled.

    It does not where it is done with the VM, or where the attempt is of its own run, which then counts as cancelled.
    An older set that comes first, and an attempt of its set by an earlier run, tell it nothing.
    """
    who = found.who
    if who is None or not any(vm["name"] == name and vm["state"] in UNFINISHED for vm in found.vms):
        return False
    ours = who.run, who.id
    told = any((intent.run, intent.id) == ours for intent in records.intents)
    told = told or any((failure.run, failure.id) == ours for failure in records.failures)
    return not told and not records.published(who.id)


async def find(repository: str) -> Standing | None:
    """Return how far the worker of this repository is; None where there is none."""
    place = WorkerPlace.of(repository)
    deadline = time.monotonic() + MOMENT
    while place.is_held():
        found = place.look()
        if found.who and found.running:
            return found
        if time.monotonic() > deadline:
            raise BackupError(
                f"{repository}: a process on this hypervisor is about to make sets; repeat the cancellation"
            )
        await asyncio.sleep(0.02)
    return None


async def stop(repository: str) -> None:
    """End the worker of this repository, where there is one. Copies that run stay."""
    found = await find(repository)
    if found and found.who:
        await _end(found.who, WorkerPlace.of(repository), repository)


async def _end(who: Who, place: WorkerPlace, repository: str) -> None:
    """End a worker, and wait until it has let its lock go."""
    if who.space != spaces()[PROCESSES] or process_of(who.pid) != Process(who.pid, who.start):
        if not place.is_held():
            # It has just ended by itself.
            return
        raise BackupError(
            f"{repository}: the worker that makes the sets {who.id}, process {who.pid}, runs in another container;"
            " cancel them there"
        )
    # Who follows it is not to take it for dead, and to leave the sets to another one.
    mark = new_file(place.stop)
    os.write(mark, who.key.encode())
    os.close(mark)
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
