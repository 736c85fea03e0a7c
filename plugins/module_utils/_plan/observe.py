# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Observe VMs, and the space for their sets: what QEMU says, and what the repository adds to that. Changes nothing."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible.module_utils.common.text.formatters import human_to_bytes

from .._common.errors import BackupError, MonitorGone, Refused
from .._common.formats import human
from .._host import preallocate
from .._host.files import nearest_directory, scratch
from .._host.probe import PREFIX
from .._host.process import machine_id
from .._qemu import daemon_place, estimate, qemu_img
from .._qemu.address import Origin
from .._qemu.jobs import query_jobs, query_status
from .._qemu.monitor import Monitor
from .._qemu.query import inspect_vm
from .._repository.annotations import Depth, failed_sets, read_annotations
from .._repository.chain import newest_full, walk
from .._repository.documents import Level, Phase, VmName
from .._repository.staging import outstanding
from .admission import with_admission
from .model import Observation, Offline, Space

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

    from .._qemu.address import Address
    from .._qemu.model import Disk, Vm
    from .._repository.documents import Hypervisor, Intent, Manifest
    from .._repository.repository import Repository, VmRecords
    from .disks import ChainLink
    from .model import DiskPlan, Policy, Request, RunContext


MOST = 1 << 63
"""No file system has so many bytes."""
LEAST_FREE = 1 << 20
"""A file system with fewer bytes free than this is full, whatever the reserve: a copy takes pieces of this size."""


def address_of(name: str, monitor: Address, tag: str) -> Address:
    """Return where a VM is asked: at the storage daemon that copies its disks for this repository, where one does.

    C(tag) is the repository's.
    """
    return (daemon_place.find(tag, name) if name else None) or monitor


async def observe(request: Request, context: RunContext, monitor: Monitor | None = None) -> Observation:
    """Ask one VM for everything; C(monitor) is a connection that is open already."""
    return await _ask(request, context, lambda asked: _inspect(asked, request), monitor)


async def refresh(
    request: Request,
    context: RunContext,
    last: Vm,
    wanted: Collection[str],
    monitor: Monitor | None = None,
    judged: bool = False,
) -> Observation:
    """Ask one VM for what changes while the jobs C(wanted) run; C(last) is what a look has shown.

    When they have ended it is for everything: what they have come to is not told by what was seen before, unless that
    look has C(judged) it. When they are gone it is for everything, too: another VM may have answered.
    """

    async def question(monitor: Monitor) -> Vm:
        if monitor.process != last.process:
            return await _inspect(monitor, request)
        status, jobs = await asyncio.gather(query_status(monitor), query_jobs(monitor))
        there = [job for job in jobs if job.id in wanted]
        now = replace(last, status=status, jobs=jobs)
        if not there:
            return await _inspect(monitor, request)
        return now if judged or not all(job.ended for job in there) else await _inspect(monitor, request, now)

    return await _ask(request, context, question, monitor)


async def _ask(
    request: Request, context: RunContext, question: Callable[[Monitor], Awaitable[Vm]], monitor: Monitor | None = None
) -> Observation:
    try:
        if monitor is not None:
            return Observation(await question(monitor))
        return Observation(await _ask_whoever_is_there(request, context.tag, question))
    except MonitorGone as error:
        gone = str(error)
    except BackupError as error:
        return Observation(error=str(error))
    if context.policy.offline != Offline.BACKUP or not (request.files or request.address.domain):
        return Observation(error=gone, off=True)
    try:
        return Observation(await _inspect_off(request), off=True)
    except MonitorGone:
        return Observation(error=gone, off=True)
    except BackupError as error:
        return Observation(error=f"{gone}; and {error}")


async def _inspect_off(request: Request) -> Vm:
    """Look at a VM that is off. MonitorGone where libvirt does not know it, or has just started it."""
    # A VM that is on needs nothing of this, and what is loaded is compiled first.
    from .._qemu.storage_daemon import require_storage_daemon  # noqa: PLC0415

    require_storage_daemon()
    if request.address.domain:
        from .._qemu.domain_files import inspect_domain  # noqa: PLC0415

        return await inspect_domain(request.address, request.name)
    from .._qemu.image_files import inspect_files  # noqa: PLC0415

    return await inspect_files(request.files, request.name, request.uuid, request.monitor)


async def _ask_whoever_is_there(request: Request, tag: str, question: Callable[[Monitor], Awaitable[Vm]]) -> Vm:
    address = address_of(request.name or request.address.domain, request.address, tag)
    if address.daemon:
        # The set that it makes comes to its end first, whatever has become of the VM.
        try:
            async with Monitor(address) as daemon:
                return await question(daemon)
        except MonitorGone:
            # It was killed, or has just ended.
            address = request.address
    async with Monitor(address) as own:
        return await question(own)


async def _inspect(monitor: Monitor, request: Request, known: Vm | None = None) -> Vm:
    """Look at a VM. C(known) is what has just been seen of it, where QEMU is the one that was looked at before."""
    if monitor.address.daemon:
        from .._qemu import storage_daemon  # noqa: PLC0415 (as for a VM that is off)

        held = await storage_daemon.inspect(monitor, request.name, request.uuid, request.monitor)
        if not request.address.domain:
            return held
        from .._qemu.domain_files import with_other_drives  # noqa: PLC0415

        return await with_other_drives(held, request.address)
    vm = await inspect_vm(monitor, request.name, known if monitor.process else None)
    # In a repository a VM without a uuid is known by its name there, wherever that name comes from.
    return vm if vm.uuid else replace(vm, identity=f"{machine_id()}:{vm.name}")


def with_records(
    repository: Repository, seen: Observation, name: str, hypervisor: Hypervisor, damage: bool = True
) -> tuple[Observation, VmRecords]:
    """Add what the repository holds about the VM to an observation; return that, too.

    C(damage) says that the files of images are looked at, and whether QEMU would be given those of a new set.

    Raises BackupError as Repository.records() does.
    """
    records = repository.records(name)
    seen = with_identity(seen, records, name, hypervisor)
    seen = with_ends(seen, records.intents, hypervisor)
    if damage:
        seen = with_damage(seen, repository, records.sets)
    if damage and not records.intents:
        seen = with_admission(seen, repository, name)
    return seen, records


def with_identity(seen: Observation, records: VmRecords, name: str, hypervisor: Hypervisor) -> Observation:
    """Add who a VM is that is off, and whose uuid nobody has told: the one that this machine has made its sets of."""
    if seen.vm is None or seen.vm.identity:
        return seen
    makers: list[Intent | Manifest] = [*reversed(records.intents), *reversed(records.sets)]
    ours = next((one.vm for one in makers if one.hypervisor and one.hypervisor.is_same(hypervisor)), None)
    who = ours or VmName(name, f"{machine_id()}:{name}", "")
    return replace(seen, vm=replace(seen.vm, name=name, uuid=who.uuid, identity=who.identity))


def with_damage(seen: Observation, repository: Repository, sets: Sequence[Manifest]) -> Observation:
    """Add what is wrong with the images that this VM's next ones may build on."""
    if seen.vm is None or not sets:
        return seen
    found = {}
    annotations = read_annotations(repository, sets[-1].vm.name)
    # That a guest did not start says nothing of what its disks' images hold.
    looks = tuple(look for look in annotations.verifications if look.ok or look.depth != Depth.BOOT)
    failed = failed_sets(sets, replace(annotations, verifications=looks))
    for disk in seen.vm.disks:
        newest, full = sets[-1].find(disk.names), newest_full(sets, disk.names)
        # Manifests are not hashable as a whole; the two are often one.
        bases = [(sets[-1], newest)] if newest else []
        bases += [full] if full and full[0].id != sets[-1].id else []
        for base, image in bases:
            steps, _broken = walk(sets, base, image.name)
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
            intent.attempt
            for intent in found
            if seen.vm and intent.phase != Phase.COPIED and _origin(intent).is_other_process(seen.vm)
        ),
    )


def _has_ended(intent: Intent, seen: Observation, hypervisor: Hypervisor) -> bool | None:
    if not intent.hypervisor.is_same(hypervisor):
        return False
    if intent.hypervisor.boot_id != hypervisor.boot_id:
        return True
    if intent.phase == Phase.COPIED:
        # It needs no QEMU any more.
        return False
    return _origin(intent).has_ended(seen.vm, seen.off, seen.shows(intent))


def _origin(intent: Intent) -> Origin:
    return Origin(intent.vm.identity, intent.monitor, intent.process, intent.spaces)


def reserve_bytes(reserve: str, total: int) -> int:
    """Return C(5%) of a file system of C(total) bytes, or an amount such as C(20G)."""
    try:
        if reserve.endswith("%"):
            percent = float(reserve[:-1])
            if not 0 <= percent < 100:
                raise ValueError
            return int(total * percent / 100)
        found = int(human_to_bytes(reserve, default_unit="B"))
        if not 0 <= found < MOST:
            raise ValueError
        return found
    except (ValueError, OverflowError):
        raise Refused(
            "reserve", f"{reserve!r} is neither an amount, such as 20G, nor a percentage, such as 5%"
        ) from None


def no_room(needed: int, space: Space, left: int) -> str:
    """Return what is said of a set for which only C(left) bytes are there."""
    reserve = human(space.reserve)
    if not space.reservable:
        reserve += " (counted twice, because this file system cannot reserve space for a copy)"
    return (
        f"not enough space: the set may take {human(needed)}, and there is room for {human(max(left, 0))}:"
        f" {human(space.free)} are free, {reserve} are kept in reserve, and the rest is for other sets;"
        " make room, or lower the reserve"
    )


async def measure(
    disks: Sequence[Disk],
    links: Sequence[ChainLink],
    planned: Iterable[DiskPlan] = (),
    counted: Mapping[str, int | None] | None = None,
) -> dict[str, int]:
    """Return the most that each disk's image is expected to take, in bytes.

    A full image that was C(planned) takes what was measured then, or what the disk has come to hold since. C(counted)
    are the bytes that the layers of a disk are known to hold.
    """
    before = {disk.name: disk.bytes for disk in planned if disk.level == Level.FULL}

    async def expected(disk: Disk, link: ChainLink) -> int:
        if link.bitmap:
            return estimate.increment_bytes(disk, link.records)
        held = counted.get(disk.name) if counted else None
        return await estimate.expected_bytes(disk, "qcow2", before=before.get(disk.name, 0), counted=held)

    sizes = await asyncio.gather(*(expected(disk, link) for disk, link in zip(disks, links)))
    return {disk.name: size for disk, size in zip(disks, sizes)}


class SpaceTracker:
    """The space in a repository, or where one is to be made.

    Which sets grow there, made by whomever, is looked up again after RESCAN seconds: there may be thousands of VMs.
    """

    RESCAN = 5.0

    def __init__(self, repository: Repository, policy: Policy) -> None:
        self._repository = repository
        self._policy = policy
        self._path = nearest_directory(repository.path)
        self._reservable = _reservable(self._path)
        self._growing: dict[str, Intent] = {}
        self._seen = -self.RESCAN

    def space(self, besides: str = "") -> Space:
        """Return the space for the set of the VM C(besides)."""
        status = os.statvfs(self._path)
        return Space(
            free=status.f_bavail * status.f_frsize,
            reserve=reserve_bytes(self._policy.reserve, status.f_blocks * status.f_frsize),
            promised=self._promised(besides) if self._repository.uuid else 0,
            reservable=self._reservable,
        )

    def note(self, intent: Intent) -> None:
        """Count a set that has begun to grow since."""
        self._growing[intent.attempt] = intent

    def _promised(self, besides: str) -> int:
        if time.monotonic() - self._seen >= self.RESCAN:
            self._growing = {intent.attempt: intent for intent in self._repository.intents()}
            self._seen = time.monotonic()
        total = 0
        for intent in [*self._growing.values()]:
            if intent.vm.name != besides:
                left = outstanding(self._repository, intent)
                total += left
                if not left:
                    # All its space is reserved or written, or it has come to its end: it never takes more again.
                    del self._growing[intent.attempt]
        return total


def space_in(repository: Repository, policy: Policy) -> Space:
    """Return the space for new sets, of whatever VM."""
    return SpaceTracker(repository, policy).space()


def short_of_space(repository: Repository, policy: Policy) -> str:
    """Return what is wrong with the free space for copies whose space could not be reserved; empty where nothing is."""
    status = os.statvfs(repository.path)
    free = status.f_bavail * status.f_frsize
    reserve = max(LEAST_FREE, reserve_bytes(policy.reserve, status.f_blocks * status.f_frsize))
    if free >= reserve:
        return ""
    return f"only {human(free)} are left in {repository.path}, less than the reserve of {human(reserve)}"


def _reservable(directory: str) -> bool:
    """Tell whether space can be reserved here, tried on a file of which nothing is left, whatever happens."""
    try:
        with scratch(directory, PREFIX) as probe:
            return preallocate.allocate(probe, qemu_img.CLUSTER)
    except OSError:
        return False
