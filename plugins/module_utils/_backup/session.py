# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what a run knows of a VM beyond disk and QEMU, observe the VM, and hold its locks.

What changes something takes a LockedVm, which only C(hold) makes.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorError
from .._host.lock import host_lock_path, locked
from .._plan import decide
from .._plan import observe as observing
from .._qemu import daemon_place
from .._qemu.jobs import StallClock
from .._qemu.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .._host.process import Process
    from .._plan.model import Decision, Observation, Request, VmPlan
    from .._qemu.address import Address
    from .._qemu.model import Job, Vm
    from .._repository.documents import DiskImage, Intent, Manifest
    from .._repository.repository import VmRecords
    from .run import BackupRun


FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
PAUSE_GROWTH = 1.5


class WaitFor(Enum):
    """What the next step of a VM waits for."""

    NOTHING = "nothing"
    SLOT = "slot"
    """One of the others that copy has to come to its end."""
    JOBS = "jobs"
    MONITOR = "monitor"
    """QEMU has to answer again."""


@dataclass(frozen=True)
class Pending:
    """A VM that is not at its end yet. C(reason) is why, where people are told."""

    wait_for: WaitFor
    reason: str = ""


AGAIN = Pending(WaitFor.NOTHING)
"""The VM is to be observed again at once: something has changed."""


@dataclass
class VmTask:
    """What this process knows of one VM beyond disk and QEMU. Losing it costs time only."""

    planned: VmPlan
    changed: bool = False
    flushed: dict[str, tuple[DiskImage, ...]] = field(default_factory=dict)
    """Finished images on stable storage, by attempt."""
    flush_errors: dict[str, str] = field(default_factory=dict)
    """Why finished images could not be brought there, by attempt."""
    place: int = 0
    """Its place in the plan."""
    newest: str = ""
    """When its newest set was begun, as far as that has been looked up."""
    watched: str = ""
    """The attempt whose jobs are watched."""
    clock: StallClock = field(default_factory=lambda: StallClock(0.0))
    """How much they have copied, and since when."""
    moved: bool = False
    """Whether this process has seen it advance."""
    first_step: bool = True
    """Whether nothing was done for it yet, and all that is known of it is the plan."""
    start_on: Process | None = None
    """The QEMU of a VM that was told to wait for a slot to start a set."""
    last_seen: tuple[Vm, Intent] | None = None
    """The VM as it was when its jobs were last seen to run, and whose jobs they are."""
    last_attempt: Intent | None = None
    """The last attempt whose jobs may run on this hypervisor."""
    followed: str = ""
    """The last attempt at this very set that was seen to be made, by whomever it was begun."""
    reconnected: bool = False
    """Whether the connection has broken off once while a set was drafted or started."""
    begun_again: bool = False
    """Whether an attempt of this call was withdrawn because its copies were not of one moment."""
    resumed: float = 0.0
    """When its guest was resumed last, which an I/O error had stopped."""
    silent_since: float = 0.0
    """When its monitor was first found not to answer."""
    pause: float = FIRST_PAUSE
    warnings: list[str] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.planned.request

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def order(self) -> tuple[str, int]:
        """Its place among those that wait for a slot."""
        return self.newest, self.place

    def next_pause(self) -> float:
        """Return the seconds until the next look: few at first, as most sets are small."""
        pause, self.pause = self.pause, min(self.pause * PAUSE_GROWTH, LONGEST_PAUSE)
        return pause

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class VmSession:
    """One look at a VM: what QEMU says of it, and what the repository holds."""

    run: BackupRun
    task: VmTask
    seen: Observation
    records: VmRecords

    @property
    def place(self) -> str:
        """Where a storage daemon belongs that copies the disks of the VM while it is off."""
        return daemon_place.place_of(self.run.repository.tag, self.task.name)

    @property
    def address(self) -> Address:
        """Where the VM is asked."""
        held = self.seen.vm is not None and self.seen.vm.daemon
        return daemon_place.monitor_in(self.place) if held else self.task.request.address

    @cached_property
    def decision(self) -> Decision:
        return decide.decide(self.task.request, self.seen, self.records, self.run.context, self.task.followed)

    @property
    def intent(self) -> Intent:
        """The attempt that is to be brought to its end. Only steps that are about one ask for it."""
        if self.decision.intent is None:
            raise LookupError("no set is being made")
        return self.decision.intent

    @property
    def manifest(self) -> Manifest:
        """The set that is published. Only steps that are about one ask for it."""
        if self.decision.manifest is None:
            raise LookupError("no set is published")
        return self.decision.manifest


@dataclass(frozen=True)
class LockedVm(VmSession):
    """A look at a VM whose locks are held. C(monitor) is None where QEMU does not answer; C(lock) is the repository's.

    Nobody waits for a job with this in hand.
    """

    monitor: Monitor | None
    lock: int


async def observe(run: BackupRun, task: VmTask) -> VmSession:
    """Look at a VM without its locks; while its jobs are known to run, only at what changes."""
    seen, task.last_seen = task.last_seen, None
    if seen is None:
        found = await observing.observe(task.request, run.context)
    else:
        found = await observing.refresh(task.request, run.context, seen[0], seen[1].jobs)
    # No new set is begun on what a refreshed look shows of a VM.
    return VmSession(run, task, *await _with_records(run, task, found, damage=seen is None))


@asynccontextmanager
async def hold(
    run: BackupRun,
    task: VmTask,
    address: Address,
    process: Process | None,
    absent: Observation | None = None,
    flushed: tuple[Vm, Intent] | None = None,
) -> AsyncIterator[LockedVm | Pending]:
    """Take a VM's locks and look at it once more; give what there is to wait for where that cannot be done.

    C(process) is the QEMU that has just answered at C(address), where it is known; where none has, C(absent) is what
    was found.
    C(flushed) is the VM as it was when the jobs of an attempt were judged whose images are flushed since: as nothing
    that QEMU shows by now can make that set a bad one, only its jobs are looked at.
    """
    request, context = task.request, run.context
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(locked(host_lock_path(process, address), f"VM {task.name}"))
        lock = await stack.enter_async_context(run.repository.lock(task.name))
        if absent:
            # The files of a VM that is off can have changed.
            found = await observing.observe(request, context) if absent.vm else absent
            if not found.alone:
                yield AGAIN
                return
            yield LockedVm(run, task, *await _with_records(run, task, found, damage=bool(absent.vm)), None, lock)
            return
        try:
            monitor = await stack.enter_async_context(Monitor(address, run.commands))
        except MonitorError as error:
            # A set whose images are flushed needs no QEMU any more: the next look goes on without one.
            yield Pending(WaitFor.MONITOR, str(error))
            return
        if monitor.process != process:
            # Another QEMU has taken the monitor's place: its lock is another one.
            yield AGAIN
            return
        if flushed:
            vm, intent = flushed
            found = await observing.refresh(request, context, vm, intent.jobs, monitor, judged=True)
        else:
            found = await observing.observe(request, context, monitor)
        yield LockedVm(run, task, *await _with_records(run, task, found, damage=not flushed), monitor, lock)


@asynccontextmanager
async def hold_now(session: VmSession) -> AsyncIterator[LockedVm]:
    """Take the locks of a VM that was looked at; BackupError where that cannot be done now."""
    seen = session.seen
    async with AsyncExitStack() as stack:
        found = hold(session.run, session.task, session.address, seen.process, seen if seen.alone else None)
        held = await stack.enter_async_context(found)
        if isinstance(held, Pending):
            raise BackupError(held.reason or "the VM has another QEMU than at the start of this call; repeat the call")
        yield held


async def _with_records(
    run: BackupRun, task: VmTask, found: Observation, damage: bool = False
) -> tuple[Observation, VmRecords]:
    return await run.repository.run(observing.with_records, found, task.name, run.context.hypervisor, damage)


def jobs_of(intent: Intent, vm: Vm | None) -> list[Job]:
    """Return the jobs of an attempt that a VM still has."""
    return [job for job in vm.jobs if job.id in intent.jobs] if vm else []
