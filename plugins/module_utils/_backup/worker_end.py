# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""End the worker of a repository before the sets are cancelled that it makes: it would begin those that are queued.

Without their worker, nobody watches the copies. What keeps all sets from being cancelled is found before it ends: a
name that is wrong, or a repository that cannot be used. What keeps one of them, such as another VM that answers at its
monitor, is found afterwards: the worker itself fails with that VM when it looks, and watches it no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from .._common.errors import BackupError, Refused, why
from .._common.selection import Selection
from .._host.lock import locked
from .._host.probe import probe_if_there
from .._host.process import PROCESSES, Process, spaces
from .._repository.access import find_repository
from .._repository.repository import check_owner, open_repository
from .cancel import plan_of_names
from .outcome import UNFINISHED, VmState
from .worker import new_file, process_of
from .worker_place import WorkerPlace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .._host.worker import ThreadedCalls
    from .._plan.model import Plan
    from .._repository.repository import VmRecords
    from .worker_place import Who


MOMENT = 2.0
"""Seconds in which a worker that has the lock says who it is."""
STOPPING = 30.0
"""Seconds that a worker takes at most to end. It may hang in the kernel."""


class Worker(NamedTuple):
    """A worker that runs, and how far its VMs are, as in Standing."""

    place: WorkerPlace
    who: Who
    vms: Sequence[dict[str, Any]]


async def make_way(params: dict[str, Any], given: Plan | None, calls: ThreadedCalls) -> None:
    """End the worker where all its sets are to be cancelled: those of the plan C(given), or those of the names.

    Raises Refused where only some are, and it would begin one of them afterwards. There may be more than one, where the
    repository has more than one path.
    """
    path = calls.watch.path
    workers = [worker for worker in [await find(path)] if worker]
    others = _others(path)
    if not workers and not others:
        return
    await probe_if_there(path, writing=True)
    if others:
        # What is wrong with it is said by whoever needs it.
        with contextlib.suppress(BackupError):
            uuid = (await calls.run(open_repository, path, params["trust_others"])).uuid
            workers += [worker for worker, of in others if of == uuid]
    workers = [worker for worker in workers if not given or given.id == worker.who.id]
    if not workers:
        return
    selection = Selection.of(params)
    chosen = _is_of(given) if given else selection.takes
    creates = bool(given and given.create_repository)
    repository = await calls.run(find_repository, path, creates, params["trust_others"])
    for worker in workers:
        names = [name for name in dict.fromkeys(worker.who.vms) if chosen(name)]
        later = [name for name in names if begins(worker, name, await calls.run(repository.records, name))]
        if later and not all(map(chosen, worker.who.vms)):
            raise Refused(
                "names",
                f"{', '.join(later)}: the worker of {path}, process {worker.who.pid}, would start the sets"
                f" {worker.who.id} of these VMs afterwards. Cancel the sets of all VMs, or wait until these are copied",
            )
    ending = [worker for worker in workers if all(map(chosen, worker.who.vms))]
    if not ending:
        return
    plan = given
    if plan is None:
        plan = await calls.run(plan_of_names, repository, selection)
    for vm in plan.vms:
        await calls.run(check_owner, repository, vm.name)
    for worker in ending:
        await end(worker.who, worker.place, path)


def _is_of(plan: Plan) -> Callable[[str], bool]:
    return {vm.name for vm in plan.vms}.__contains__


def begins(worker: Worker, name: str, records: VmRecords) -> bool:
    """Tell whether a worker would begin its set of a VM, though what is being made of that VM now is cancelled.

    It does not where it is done with the VM, or follows an attempt at its set, whoever has begun that: this then counts
    as cancelled. An older set that comes first tells it nothing, nor does anything of a VM that waits.
    """
    states = {vm["state"] for vm in worker.vms if vm["name"] == name}
    if states.isdisjoint(UNFINISHED):
        return False
    ours = worker.who.run, worker.who.id
    told = any((failure.run, failure.id) == ours for failure in records.failures)
    # One of an older version, which does not say its run, begins what another run had begun.
    follows = bool(worker.who.run) and VmState.RUNNING in states
    follows = follows and any(intent.id == worker.who.id for intent in records.intents)
    return not (told or follows or records.published(worker.who.id))


async def find(repository: str) -> Worker | None:
    """Return the worker of the repository at this path; None where there is none."""
    place = WorkerPlace.of(repository)
    deadline = time.monotonic() + MOMENT
    while place.is_held():
        found = place.look()
        if found.who and found.running:
            return Worker(place, found.who, found.vms)
        if time.monotonic() > deadline:
            raise BackupError(
                f"{repository}: a process on this hypervisor is about to make sets; repeat the cancellation"
            )
        await asyncio.sleep(0.02)
    return None


def _others(repository: str) -> list[tuple[Worker, str]]:
    """Return the workers of the repositories at other paths, each with the uuid of its repository."""
    found = [(place, place.look()) for place in WorkerPlace.every() if place != WorkerPlace.of(repository)]
    return [(Worker(place, one.who, one.vms), one.repository) for place, one in found if one.who and one.running]


async def end(who: Who, place: WorkerPlace, repository: str) -> None:
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
