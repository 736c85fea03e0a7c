# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Observe VMs: what QEMU says, and what the repository adds to that. Changes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorGone
from .._host.process import machine_id
from .._qemu.connection import Origin, parse_address
from .._qemu.jobs import query_jobs
from .._qemu.monitor import Monitor
from .._qemu.query import inspect_vm
from .._repository.catalog import failed_sets, read_annotations
from .._repository.chain import walk
from .._repository.documents import Depth, Level
from .model import Observation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from .._host.process import Hypervisor, Process
    from .._qemu.model import Vm
    from .._repository.documents import Intent, Manifest
    from .._repository.repository import Repository, VmRecords
    from .model import Request


async def find_process(request: Request) -> Process | None:
    """Find which QEMU is behind a monitor; None where none answers, or where that cannot be told."""
    try:
        async with Monitor(parse_address(request.monitor)) as monitor:
            return monitor.process
    except BackupError:
        return None


async def observe(request: Request, monitor: Monitor | None = None) -> Observation:
    """Ask one VM for everything; C(monitor) is a connection that is open already."""
    return await _ask(request, lambda asked: _inspect(asked, request.name), monitor)


async def refresh(request: Request, last: Vm, wanted: Collection[str]) -> Observation:
    """Ask one VM for what changes while the jobs C(wanted) run; C(last) is what a look has shown.

    When they have ended it is for everything: what they have come to is not told by what was seen before.
    """

    async def question(monitor: Monitor) -> Vm:
        if monitor.process != last.process:
            return await _inspect(monitor, request.name)
        status, jobs = await asyncio.gather(monitor.execute("query-status"), query_jobs(monitor))
        if all(job.ended for job in jobs if job.id in wanted):
            return await _inspect(monitor, request.name)
        return replace(last, status=status["status"], jobs=jobs)

    return await _ask(request, question)


async def _ask(
    request: Request, question: Callable[[Monitor], Awaitable[Vm]], monitor: Monitor | None = None
) -> Observation:
    try:
        if monitor is not None:
            return Observation(await question(monitor))
        async with Monitor(parse_address(request.monitor)) as own:
            return Observation(await question(own))
    except MonitorGone as error:
        return Observation(error=str(error), off=True)
    except BackupError as error:
        return Observation(error=str(error))


async def _inspect(monitor: Monitor, name: str) -> Vm:
    vm = await inspect_vm(monitor, name)
    # In a repository a VM without a uuid is known by its name there, wherever that name comes from.
    return vm if vm.uuid else replace(vm, identity=f"{machine_id()}:{vm.name}")


def with_records(
    repository: Repository, seen: Observation, name: str, hypervisor: Hypervisor, damage: bool = True
) -> tuple[Observation, VmRecords]:
    """Add what the repository holds about the VM to an observation; return that, too.

    C(damage) says that the files of images are looked at.

    Raises BackupError as Repository.records() does.
    """
    records = repository.records(name)
    seen = with_ends(seen, records.intents, hypervisor)
    return with_damage(seen, repository, records.sets) if damage else seen, records


def with_damage(seen: Observation, repository: Repository, sets: Sequence[Manifest]) -> Observation:
    """Add what is wrong with the images that this VM's next ones may build on."""
    if seen.vm is None or not sets:
        return seen
    found = {}
    annotations = read_annotations(repository, sets[-1].vm.name)
    # That a guest did not start says nothing of what its disks' images hold.
    looks = tuple(look for look in annotations.verifications if look.ok or look.depth != Depth.BOOT)
    failed = failed_sets(sets, replace(annotations, verifications=looks))
    fulls = {disk.name: manifest for manifest in sets for disk in manifest.disks if disk.level == Level.FULL}
    for disk in seen.vm.disks:
        # Manifests are not hashable as a whole; the two are often one.
        for base in {one.id: one for one in (sets[-1], fulls.get(disk.name, sets[-1]))}.values():
            steps, _broken = walk(sets, base, disk.name)
            wrong = next(filter(None, (repository.damage(manifest, image) for manifest, image in steps)), "")
            if not wrong and base.id in failed:
                wrong = f"set {base.id} has failed its verification: {failed[base.id]}"
            if wrong:
                found[(base.id, disk.name)] = wrong
    return replace(seen, damage=found)


def with_ends(seen: Observation, intents: Iterable[Intent], hypervisor: Hypervisor) -> Observation:
    """Add what can be told from here of the end of each attempt's QEMU."""
    found = list(intents)
    ended = {intent.attempt: _has_ended(intent, seen, hypervisor) for intent in found}
    return replace(
        seen,
        dead=frozenset(attempt for attempt, fate in ended.items() if fate),
        doubtful=frozenset(attempt for attempt, fate in ended.items() if fate is None),
        elsewhere=frozenset(
            intent.attempt for intent in found if seen.vm and _origin(intent).is_other_process(seen.vm)
        ),
    )


def _has_ended(intent: Intent, seen: Observation, hypervisor: Hypervisor) -> bool | None:
    if not intent.hypervisor.is_same(hypervisor):
        return False
    if intent.hypervisor.boot_id != hypervisor.boot_id:
        return True
    return _origin(intent).has_ended(seen.vm, seen.off, seen.shows(intent))


def _origin(intent: Intent) -> Origin:
    return Origin(intent.vm.identity, intent.monitor, intent.process, intent.spaces)
