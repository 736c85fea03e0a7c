# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""A look round: the hypervisor, its VMs, the room in the repository; and the plan drawn up from it. Changes nothing."""

from __future__ import annotations

import asyncio
import glob
import os
import secrets
import shutil
import stat
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils import _keeps, _plan, _qemu_img, _target
from ansible_collections.vmfleet.backup.plugins.module_utils._chain import FULL, walk
from ansible_collections.vmfleet.backup.plugins.module_utils._documents import Hypervisor
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import (
    BackupError,
    MonitorGone,
    Refused,
    RepositoryHangs,
    ToolError,
    internal,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._files import in_words, scratch
from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import inspect_vm, machine_id, query_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._library import BOOT, failed_sets
from ansible_collections.vmfleet.backup.plugins.module_utils._marks import read_marks
from ansible_collections.vmfleet.backup.plugins.module_utils._names import REPOSITORY_FILE
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import Facts, Plan, Request, Space, VmPlan
from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Monitor, parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._spaces import Origin, boot_id
from ansible_collections.vmfleet.backup.plugins.module_utils._units import human

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

    from ansible_collections.vmfleet.backup.plugins.module_utils._chain import Link
    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import Intent, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Disk, Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._plan import Policy
    from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Process
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository import Repository, Shelf
    from ansible_collections.vmfleet.backup.plugins.module_utils._watched import WatchedRepository

AT_ONCE = 32
"""How many VMs are asked at the same time."""

LEAST_FREE = 1 << 20
"""A file system with fewer bytes free than this is full, whatever the reserve: a copy takes pieces of this size."""


def this_hypervisor() -> Hypervisor:
    return Hypervisor(os.uname().nodename, machine_id(), boot_id())


def require_qemu_img() -> None:
    """ToolError where there is no qemu-img: better now than after the first VM."""
    if shutil.which("qemu-img") is None:
        raise ToolError("qemu-img is not installed on this hypervisor (Debian: qemu-utils, Red Hat and SUSE: qemu-img)")


def discover(listed: Iterable[Request], patterns: Iterable[str], general: Request) -> tuple[list[Request], list[str]]:
    """The VMs that are listed, and one like C(general) for each further socket of the patterns; with warnings."""
    requests = [replace(request, monitor=str(parse_address(request.monitor, "vms"))) for request in listed]
    known = {request.monitor for request in requests}
    warnings = []
    for pattern in patterns:
        if not pattern.startswith("/"):
            raise Refused("sockets", f"{pattern!r} is not an absolute path or pattern")
        if not glob.has_magic(pattern):
            # A path that is spelled out is meant, be there a socket or not.
            found = [pattern]
        else:
            found = [path for path in sorted(glob.glob(pattern)) if _is_socket(path)]
            if not found:
                warnings.append(f"no socket matches {pattern}")
        for path in found:
            monitor = str(parse_address(path, "sockets"))
            if monitor not in known:
                known.add(monitor)
                requests.append(replace(general, monitor=monitor))
    return requests, warnings


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


async def meet(request: Request) -> Process | None:
    """Which QEMU is behind a monitor; None where none answers, or where that cannot be told."""
    try:
        async with Monitor(parse_address(request.monitor)) as monitor:
            return monitor.process
    except BackupError:
        return None


async def look(request: Request, monitor: Monitor | None = None) -> Facts:
    """Ask one VM for everything; C(monitor) is a connection that is open already."""
    return await _ask(request, lambda asked: _inspect(asked, request.name), monitor)


async def glance(request: Request, seen: Vm, wanted: Collection[str]) -> Facts:
    """Ask one VM for what changes while the jobs C(wanted) run; C(seen) is what a look has shown.

    When they have ended it is for everything: what they have come to is not told by what was seen before.
    """

    async def question(monitor: Monitor) -> Vm:
        if monitor.process != seen.process:
            return await _inspect(monitor, request.name)
        status, jobs = await asyncio.gather(monitor.execute("query-status"), query_jobs(monitor))
        if all(job.ended for job in jobs if job.id in wanted):
            return await _inspect(monitor, request.name)
        return replace(seen, status=status["status"], jobs=jobs)

    return await _ask(request, question)


async def _ask(request: Request, question: Callable[[Monitor], Awaitable[Vm]], monitor: Monitor | None = None) -> Facts:
    try:
        if monitor is not None:
            return Facts(await question(monitor))
        async with Monitor(parse_address(request.monitor)) as own:
            return Facts(await question(own))
    except MonitorGone as error:
        return Facts(error=str(error), off=True)
    except BackupError as error:
        return Facts(error=str(error))


async def _inspect(monitor: Monitor, name: str) -> Vm:
    vm = await inspect_vm(monitor, name)
    # In a repository a VM without a uuid is known by its name there, wherever that name comes from.
    return vm if vm.uuid else replace(vm, identity=f"{machine_id()}:{vm.name}")


def with_shelf(
    repository: Repository, facts: Facts, name: str, hypervisor: Hypervisor, damage: bool = True
) -> tuple[Facts, Shelf]:
    """What the repository holds about a VM, and the facts with what that adds to them; C(damage) is worth a look each.

    Raises BackupError as Repository.shelf() does.
    """
    shelf = repository.shelf(name)
    facts = with_fates(facts, shelf.intents, hypervisor)
    return with_damage(facts, repository, shelf.sets) if damage else facts, shelf


def with_damage(facts: Facts, repository: Repository, sets: Sequence[Manifest]) -> Facts:
    """The facts with what is wrong with the images that this VM's next ones may build on."""
    if facts.vm is None or not sets:
        return facts
    found = {}
    marks = read_marks(repository, sets[-1].vm.name)
    # That a guest did not start says nothing of what its disks' images hold.
    looks = tuple(mark for mark in marks.verifications if mark.ok or mark.depth != BOOT)
    failed = failed_sets(sets, replace(marks, verifications=looks))
    fulls = {disk.name: manifest for manifest in sets for disk in manifest.disks if disk.level == FULL}
    for disk in facts.vm.disks:
        # Manifests are not hashable as a whole; the two are often one.
        for base in {one.id: one for one in (sets[-1], fulls.get(disk.name, sets[-1]))}.values():
            steps, _broken = walk(sets, base, disk.name)
            wrong = next(filter(None, (repository.damage(manifest, image) for manifest, image in steps)), "")
            if not wrong and base.id in failed:
                wrong = f"set {base.id} has failed its verification: {failed[base.id]}"
            if wrong:
                found[(base.id, disk.name)] = wrong
    return replace(facts, damage=found)


def with_fates(facts: Facts, intents: Iterable[Intent], hypervisor: Hypervisor) -> Facts:
    """The facts with what can be told from here of each attempt's QEMU."""
    found = list(intents)
    ended = {intent.attempt: _has_ended(intent, facts, hypervisor) for intent in found}
    return replace(
        facts,
        dead=frozenset(attempt for attempt, fate in ended.items() if fate),
        doubtful=frozenset(attempt for attempt, fate in ended.items() if fate is None),
        elsewhere=frozenset(
            intent.attempt for intent in found if facts.vm and _origin(intent).is_other_process(facts.vm)
        ),
    )


def _has_ended(intent: Intent, facts: Facts, hypervisor: Hypervisor) -> bool | None:
    if not intent.hypervisor.is_same(hypervisor):
        return False
    if intent.hypervisor.boot_id != hypervisor.boot_id:
        return True
    return _origin(intent).has_ended(facts.vm, facts.off, facts.shows(intent))


def _origin(intent: Intent) -> Origin:
    return Origin(intent.vm.identity, intent.monitor, intent.process, intent.spaces)


async def measure(
    disks: Sequence[Disk], links: Sequence[Link], planned: Iterable[_plan.DiskPlan] = (), vm: Vm | None = None
) -> dict[str, int]:
    """The most that each disk's image is expected to take, in bytes.

    A full image that was C(planned) takes what was measured then, or what the disk has come to hold since. C(vm) is
    where the disks' layers are told.
    """
    before = {disk.name: disk.bytes for disk in planned if disk.level == FULL}

    async def expected(disk: Disk, link: Link) -> int:
        if link.bitmap:
            return _target.increment_bytes(disk, link.records)
        chain = vm.chain(disk) if vm and disk.layers else ()
        # What a layer of which QEMU tells nothing may hold, the others do not tell.
        known = chain if len(chain) == 1 + len(disk.layers) else ()
        return await _target.expected_bytes(disk, "qcow2", before=before.get(disk.name, 0), chain=known)

    sizes = await asyncio.gather(*(expected(disk, link) for disk, link in zip(disks, links)))
    return {disk.name: size for disk, size in zip(disks, sizes)}


class Room:
    """The space in a repository, or where one is to be made.

    Which sets grow there, made by whomever, is looked up again after RESCAN seconds: there may be thousands of VMs.
    """

    RESCAN = 5.0

    def __init__(self, repository: Repository, policy: Policy) -> None:
        self._repository = repository
        self._policy = policy
        self._path = repository.path
        while not os.path.isdir(self._path):
            self._path = os.path.dirname(self._path)
        self._reservable = _reservable(self._path)
        self._growing: dict[str, Intent] = {}
        self._seen = -self.RESCAN

    def space(self, besides: str = "") -> Space:
        """The space for the set of the VM C(besides)."""
        status = os.statvfs(self._path)
        return Space(
            free=status.f_bavail * status.f_frsize,
            reserve=_plan.reserve_bytes(self._policy.reserve, status.f_blocks * status.f_frsize),
            promised=self._promised(besides) if self._repository.uuid else 0,
            reservable=self._reservable,
        )

    def note(self, intent: Intent) -> None:
        """A set that has begun to grow since."""
        self._growing[intent.attempt] = intent

    def _promised(self, besides: str) -> int:
        if time.monotonic() - self._seen >= self.RESCAN:
            self._growing = {intent.attempt: intent for intent in self._repository.intents()}
            self._seen = time.monotonic()
        others = (intent for intent in self._growing.values() if intent.vm.name != besides)
        return sum(self._repository.outstanding(intent) for intent in others)


def space_in(repository: Repository, policy: Policy) -> Space:
    """The space for new sets, of whatever VM."""
    return Room(repository, policy).space()


def short_of_space(repository: Repository, policy: Policy) -> str:
    """What is wrong with the free space for copies whose space could not be reserved; empty where nothing is."""
    status = os.statvfs(repository.path)
    free = status.f_bavail * status.f_frsize
    reserve = max(LEAST_FREE, _plan.reserve_bytes(policy.reserve, status.f_blocks * status.f_frsize))
    if free >= reserve:
        return ""
    return f"only {human(free)} are left in {repository.path}, less than the reserve of {human(reserve)}"


def _reservable(directory: str) -> bool:
    """Whether space can be reserved here, tried on a file of which nothing is left, whatever happens."""
    try:
        with scratch(directory, f".{REPOSITORY_FILE}.") as probe:
            return _target.allocate(probe, _qemu_img.CLUSTER)
    except OSError:
        return False


async def draw_up(
    repository: WatchedRepository,
    requests: Iterable[Request],
    set_id: str,
    policy: Policy,
    warnings: Iterable[str] = (),
    orders: Mapping[str, bool] | None = None,
) -> Plan:
    """The plan for these VMs: every one of them is in it, whatever its state.

    C(orders) are takeover, supersede and adopt, as _plan.Terms has them.
    """
    terms = _plan.Terms(set_id, secrets.token_hex(8), repository.tag, this_hypervisor(), policy, **(orders or {}))
    turns = asyncio.Semaphore(AT_ONCE)
    processes: dict[str, tuple[int, ...]] = {}
    losses: dict[str, tuple[str, ...]] = {}
    defects: list[str] = []

    async def plan_vm(request: Request) -> VmPlan:
        named = replace(request, name=request.name or _stem(request))
        try:
            facts = await look(request)
            named = replace(request, name=await _name(request, facts.vm, repository))
            if facts.vm and facts.vm.process:
                processes[request.monitor] = (facts.vm.process.pid, facts.vm.process.start)
            facts, shelf = await repository.run(with_shelf, facts, named.name, terms.hypervisor)
            decision = _plan.decide(named, facts, shelf, terms)
            if not decision.links:
                # Nothing is to be started, or the VM is off, and only what was begun is to be brought to its end.
                return decision.plan
            expected = await measure(decision.choice.disks, decision.links, vm=facts.vm)
            disks = tuple(replace(disk, bytes=expected[disk.name]) for disk in decision.plan.disks)
            if facts.vm:
                losses[request.monitor] = _keeps.losses(decision.choice.disks, facts.vm.disks)
            return replace(decision.plan, disks=disks)
        except RepositoryHangs:
            raise
        except (BackupError, OSError) as error:
            reason = in_words(error)
        except Exception as error:  # noqa: BLE001
            # A defect of ours that shows with one VM is not to take the others along.
            defects.append(f"{request.monitor}: {traceback.format_exc()}")
            reason = internal(error)
        return VmPlan(named.name, named.monitor, _plan.FAIL, reason)

    async def in_turn(request: Request) -> VmPlan:
        async with turns:
            return await plan_vm(request)

    plans = _plan.refuse_twins(await asyncio.gather(*(in_turn(request) for request in requests)), processes)
    space, plans = _plan.fit_into(await repository.run(space_in, policy), plans)
    copied = [plan for plan in plans if plan.action in (_plan.START, _plan.FINISH)]
    said = [f"VM {plan.name}: {loss}" for plan in copied for loss in losses.get(plan.monitor, ())]
    return Plan(
        repository=repository.path,
        create_repository=not repository.uuid,
        run=terms.run,
        id=set_id,
        policy=policy,
        space=space,
        vms=plans,
        warnings=(*warnings, *said, *defects),
    )


async def _name(request: Request, vm: Vm | None, repository: WatchedRepository) -> str:
    """What a VM is called; one that is off can only be known by a set that it was making, or by its monitor."""
    if request.name or vm is not None:
        return request.name or (vm.name if vm else "")
    making = [intent.vm.name for intent in await repository.intents() if intent.monitor == request.monitor]
    return making[0] if making else _stem(request)


def _stem(request: Request) -> str:
    return os.path.splitext(os.path.basename(request.monitor))[0]
