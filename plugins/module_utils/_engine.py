# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""One hypervisor's way from a plan to published sets.

Every step is a function of the plan, the repository and QEMU: all memory is on disk or in QEMU, so that another process
can go on from wherever this one is killed. A look takes no locks and changes nothing; what it finds to be done is found
once more with the locks held, and then done. Nobody waits for a job with a lock or a monitor in hand.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils import _jobs, _plan, _survey, _target
from ansible_collections.vmfleet.backup.plugins.module_utils._documents import (
    COPYING,
    DiskImage,
    Failure,
    Growing,
    Intent,
    Manifest,
    VmName,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import BackupError, CommandError, JobFailed
from ansible_collections.vmfleet.backup.plugins.module_utils._lock import host_lock_path, locked
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import Decision, Request, VmPlan, human
from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Monitor, parse_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Disk, Job, Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._plan import Facts, Plan, Policy, Verdict
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository import Repository, Shelf

PUBLISHED = "published"
RUNNING = "running"
QUEUED = "queued"
FAILED = "failed"
CANCELLED = "cancelled"
SKIPPED = "skipped"
STATES = (PUBLISHED, RUNNING, QUEUED, FAILED, CANCELLED, SKIPPED)

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
PAUSE_GROWTH = 1.5

UNREACHABLE_PATIENCE = 60.0
"""Seconds that a monitor may be silent, or in somebody else's hands, while its jobs run."""

READ_SIZE = 4 << 20

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Settings:
    """How a run goes. Times are seconds; 0 waits without end."""

    state: str = "completed"
    max_vms: int = 4
    timeout: float = 0
    stall_timeout: float = 600
    unattended: bool = False
    check_mode: bool = False


@dataclass(frozen=True)
class Outcome:
    """What has become of one VM's set."""

    name: str
    id: str
    state: str
    level: str = "full"
    bytes: int = 0
    duration: float = 0.0
    consistency: str = "crash"
    frozen_ms: int = 0
    path: str = ""
    error: str = ""
    reason: str = ""
    changed: bool = False

    def describe(self, width: int) -> str:
        said = self.error or self.reason
        if self.state == PUBLISHED:
            said = f"{self.level}, {human(self.bytes)} in {self.duration:.1f} s, {self.path}"
            if not self.changed:
                said += " (was there)"
        return f"{self.state:9}  {self.name:{width}}  {said}"


@dataclass
class _Turns:
    """At most so many VMs copy at a time. One that is found copying counts too, however many there are."""

    limit: int
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._changed = asyncio.Condition()

    def join(self, name: str) -> None:
        self.taken.add(name)

    def try_take(self, name: str) -> bool:
        if name not in self.taken and self.limit and len(self.taken) >= self.limit:
            return False
        self.taken.add(name)
        return True

    async def take(self, name: str) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.try_take(name))

    async def leave(self, name: str) -> None:
        async with self._changed:
            self.taken.discard(name)
            self._changed.notify_all()


@dataclass
class _Work:
    """What this process knows of one VM beyond disk and QEMU. Losing it costs time only."""

    planned: VmPlan
    changed: bool = False
    safe: dict[str, tuple[DiskImage, ...]] = field(default_factory=dict)
    """Finished images on stable storage, by attempt."""
    spoiled: dict[str, str] = field(default_factory=dict)
    """Why finished images could not be brought there, by attempt."""
    progress: tuple[str, int, float] = ("", -1, 0.0)
    """Attempt, bytes copied, and when that was first seen."""

    @property
    def request(self) -> Request:
        return self.planned.request


class Engine:
    """Brings the VMs of a plan to their sets. C(commands) lists what QEMU was told."""

    def __init__(self, repository: Repository, plan: Plan, settings: Settings) -> None:
        self.repository = repository
        self.plan = plan
        self.settings = settings
        self.commands: list[dict[str, Any]] = []
        self._hypervisor = _survey.this_hypervisor()
        self._terms = _plan.Terms(plan.id, plan.run, repository.tag, self._hypervisor, plan.policy)
        self._turns = _Turns(settings.max_vms)
        self._gate = asyncio.Lock()

    async def run(self) -> list[Outcome]:
        """Every VM's outcome, in the plan's order. One VM's failure never stops the others."""
        for intent in self.repository.intents():
            if intent.vm.name in {planned.name for planned in self.plan.vms}:
                self._turns.join(intent.vm.name)
        return list(await asyncio.gather(*(self._settle(planned) for planned in self.plan.vms)))

    async def _settle(self, planned: VmPlan) -> Outcome:
        work = _Work(planned)
        try:
            if self.settings.state == CANCELLED:
                outcome = await self._cancel(work)
            elif planned.action == _plan.FAIL:
                outcome = self._outcome(work, FAILED, error=planned.reason)
            else:
                outcome = await self._bring_to_end(work)
        except (BackupError, OSError) as error:
            outcome = self._outcome(work, FAILED, error=str(error))
        if outcome.state != RUNNING:
            await self._turns.leave(planned.name)
        return outcome

    async def _bring_to_end(self, work: _Work) -> Outcome:
        """Step after step until there is nothing left to do, or, with state started, nothing but to wait."""
        pause = FIRST_PAUSE
        silent_since: float | None = None
        while True:
            step = await self._step(work)
            if isinstance(step, Outcome):
                return step
            if step.state == _plan.UNREACHABLE:
                silent_since = silent_since or time.monotonic()
                if self.settings.state == "started" or time.monotonic() - silent_since > UNREACHABLE_PATIENCE:
                    return self._outcome(
                        work,
                        FAILED,
                        error=f"{step.error}; the set is unfinished: run the backup again to go on with it",
                    )
            else:
                silent_since = None
            if step.state == _plan.RUNNING and self.settings.state == "started":
                return self._outcome(work, RUNNING, reason="its jobs are copying")
            if step.state in (_plan.RUNNING, _plan.UNREACHABLE):
                await asyncio.sleep(pause)
                pause = min(pause * PAUSE_GROWTH, LONGEST_PAUSE)

    async def _step(self, work: _Work) -> Outcome | Verdict:
        """Look, and do what is to be done. A verdict means: not at the end yet."""
        facts, shelf = await self._look(work)
        decision = self._decide(work, facts, shelf)
        outcome = self._final(work, decision, facts, shelf)
        if outcome or self.settings.check_mode:
            return outcome or self._predict(work, decision)
        if decision.plan.action in (_plan.START, _plan.FINISH) and not await self._turn(work.request.name):
            return self._outcome(work, QUEUED, reason=f"at most {self.settings.max_vms} VMs copy at a time")
        if decision.intent:
            verdict = self._judge(work, decision.intent, facts, shelf)
            if verdict.state == _plan.UNREACHABLE:
                return verdict
            if verdict.state == _plan.RUNNING and not self._alarm(decision.intent, facts, work):
                return verdict
            if verdict.state == _plan.COPIED:
                await self._make_safe(work, decision.intent, shelf)
        return await self._act(work, facts)

    async def _turn(self, name: str) -> bool:
        if self.settings.state == "started":
            return self._turns.try_take(name)
        await self._turns.take(name)
        return True

    async def _look(self, work: _Work, monitor: Monitor | None = None) -> tuple[Facts, Shelf]:
        facts = await _survey.look(work.request, monitor)
        shelf = self.repository.shelf(work.request.name)
        return _survey.with_dead(facts, shelf.intents, self._hypervisor), shelf

    def _decide(self, work: _Work, facts: Facts, shelf: Shelf) -> Decision:
        return _plan.decide(work.request, facts, shelf, self._terms)

    def _judge(self, work: _Work, intent: Intent, facts: Facts, shelf: Shelf) -> Verdict:
        verdict = _plan.judge(intent, facts, shelf, _boottime())
        if intent.attempt in work.spoiled:
            # A second fsync may succeed where the first has failed, and mean nothing.
            return _plan.Verdict(_plan.BROKEN, work.spoiled[intent.attempt])
        if intent.attempt in work.safe and verdict.state != _plan.GIVEN_UP:
            # All its jobs have ended well and its images are flushed: whatever QEMU does now, the set is good.
            return _plan.Verdict(_plan.COPIED)
        return verdict

    # What needs no hand

    def _final(self, work: _Work, decision: Decision, facts: Facts, shelf: Shelf) -> Outcome | None:
        """The outcome, where nothing is left to be done."""
        name, action = work.request.name, decision.plan.action
        if action == _plan.SKIP and decision.manifest:
            if facts.vm and self._leftovers(facts.vm, shelf):
                return None
            if self.repository.untidy(name, self.plan.id):
                return None
            return self._published(work, decision.manifest)
        if action == _plan.SKIP:
            return self._outcome(work, SKIPPED, reason=decision.plan.reason)
        if action == _plan.FAIL:
            failure = shelf.failure(self.plan.id)
            cancelled = failure and failure.run == self.plan.run and failure.state == CANCELLED
            return self._outcome(work, CANCELLED if cancelled else FAILED, error=decision.plan.reason)
        if action == _plan.START and work.planned.action == _plan.SKIP:
            # What has changed since the plan makes it safer, never bolder.
            return self._outcome(work, SKIPPED, reason=f"the plan was to skip it: {work.planned.reason}")
        return None

    def _predict(self, work: _Work, decision: Decision) -> Outcome:
        """What check mode says of a VM with which something is to be done."""
        work.changed = decision.plan.action != _plan.SKIP
        if decision.manifest:
            return self._published(work, decision.manifest)
        state = PUBLISHED if self.settings.state == "completed" else RUNNING
        return self._outcome(work, state, reason=decision.plan.reason, path=self._path(work))

    def _published(self, work: _Work, manifest: Manifest) -> Outcome:
        return self._outcome(
            work,
            PUBLISHED,
            level=manifest.level,
            bytes=manifest.bytes,
            duration=manifest.duration,
            consistency=manifest.consistency,
            path=self._path(work),
        )

    def _outcome(self, work: _Work, state: str, **more: Any) -> Outcome:
        return Outcome(name=work.request.name, id=self.plan.id, state=state, changed=work.changed, **more)

    def _path(self, work: _Work) -> str:
        return self.repository.set_path(work.request.name, self.plan.id)

    # What is done with the locks held

    async def _act(self, work: _Work, seen: Facts) -> Outcome | Verdict:
        """Take the locks, look once more, and do the one thing that is to be done."""
        name = work.request.name
        address = parse_address(work.request.monitor)
        process = seen.vm.process if seen.vm else None
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(locked(host_lock_path(process, address), f"VM {name}"))
            lock = await stack.enter_async_context(self.repository.lock(name))
            monitor = None
            if seen.vm:
                monitor = await stack.enter_async_context(Monitor(address, self.commands))
                if monitor.process != process:
                    # Another QEMU has taken the monitor's place: its lock is another one.
                    return _plan.Verdict(_plan.INTERRUPTED)
            facts, shelf = await self._look(work, monitor) if monitor else (seen, self.repository.shelf(name))
            facts = _survey.with_dead(facts, shelf.intents, self._hypervisor)
            decision = self._decide(work, facts, shelf)
            if decision.plan.action == _plan.SKIP and decision.manifest:
                await self._tidy(monitor, facts, shelf, decision.manifest)
                return self._published(work, decision.manifest)
            if decision.intent and decision.plan.action != _plan.FAIL:
                return await self._advance(work, monitor, facts, shelf, decision.intent)
            if decision.plan.action == _plan.START and monitor and facts.vm:
                return await self._start(work, monitor, facts.vm, decision, lock)
            return self._final(work, decision, facts, shelf) or _plan.Verdict(_plan.INTERRUPTED)

    async def _advance(
        self, work: _Work, monitor: Monitor | None, facts: Facts, shelf: Shelf, intent: Intent
    ) -> Outcome | Verdict:
        """Bring an attempt one step on."""
        verdict = self._judge(work, intent, facts, shelf)
        if verdict.state == _plan.COPIED and (intent.attempt in work.safe or intent.attempt in shelf.described):
            manifest = await self._publish(work, monitor, facts, shelf, intent)
            return self._published(work, manifest) if intent.id == self.plan.id else verdict
        if verdict.state == _plan.INTERRUPTED:
            await self._withdraw(monitor, facts, intent)
        elif verdict.state == _plan.BROKEN:
            await self._give_up(work, monitor, facts, intent, verdict.error)
        elif verdict.state == _plan.GIVEN_UP:
            await self._withdraw(monitor, facts, intent)
        elif verdict.state == _plan.RUNNING:
            # One at a time: what one set leaves behind may be enough for the others.
            async with self._gate:
                alarm = self._alarm(intent, facts, work)
                if alarm:
                    await self._give_up(work, monitor, facts, intent, alarm)
                    return _plan.Verdict(_plan.BROKEN, alarm)
        return verdict

    def _alarm(self, intent: Intent, facts: Facts, work: _Work) -> str:
        """Why a running attempt must end, for the guest's sake or for standing still; empty where it need not."""
        short = "" if intent.reserved else _survey.short_of_space(self.repository, self.plan.policy)
        if _plan.guest_stopped_by(intent, facts, bool(short)):
            return "the guest was stopped by an I/O error because the backup's target is full or failing"
        if short:
            return f"{short}, and the set's space could not be reserved"
        return self._stalled(intent, facts, work)

    def _stalled(self, intent: Intent, facts: Facts, work: _Work) -> str:
        jobs = _jobs_of(intent, facts)
        copied = sum(job.offset for job in jobs)
        now = _boottime()
        if work.progress[:2] != (intent.attempt, copied) or any(job.paused for job in jobs):
            work.progress = (intent.attempt, copied, now)
        if self.settings.stall_timeout and now - work.progress[2] > self.settings.stall_timeout:
            return f"no progress for {self.settings.stall_timeout:g} s"
        return ""

    # Start

    async def _start(self, work: _Work, monitor: Monitor, vm: Vm, decision: Decision, lock: int) -> Outcome | Verdict:
        work.changed = True
        await self._clear(monitor, vm, work.request.name)
        intent = self._intent(work.request, vm, decision)
        targets = {disk.image.name: self._target_of(intent, disk) for disk in intent.disks}
        try:
            async with self._gate:
                intent = await self._prepare(intent, decision.choice.disks, targets, lock)
        except (BackupError, OSError) as error:
            await self._give_up(work, monitor, _plan.Facts(vm), intent, str(error))
            return _plan.Verdict(_plan.BROKEN, str(error))
        starts = [
            _jobs.BackupStart(
                job_id=disk.job,
                node=disk.image.node,
                target=targets[disk.image.name],
                opaque=f"vmfleet:{self.repository.tag}:{intent.attempt}:{number}",
                arguments=_arguments(self.plan.policy),
            )
            for number, disk in enumerate(intent.disks)
        ]
        try:
            await _jobs.start_backups(monitor, starts, completion_mode="individual")
        except (CommandError, OSError) as error:
            await self._give_up(work, monitor, _plan.Facts(vm), intent, str(error))
            return _plan.Verdict(_plan.BROKEN, str(error))
        self.repository.update(replace(intent, phase=COPYING))
        return _plan.Verdict(_plan.RUNNING)

    def _intent(self, request: Request, vm: Vm, decision: Decision) -> Intent:
        attempt = secrets.token_hex(6)
        begun = _boottime()
        policy = self.plan.policy
        disks = tuple(
            Growing(
                image=_image(disk, planned, policy),
                job=f"vmfleet.{self.repository.tag}.{attempt}.{number}",
                expected=0,
            )
            for number, (disk, planned) in enumerate(zip(decision.choice.disks, decision.plan.disks))
        )
        return Intent(
            run=self.plan.run,
            attempt=attempt,
            id=self.plan.id,
            vm=VmName(request.name, vm.identity, vm.uuid),
            hypervisor=self._hypervisor,
            monitor=request.monitor,
            process=(vm.process.pid, vm.process.start) if vm.process else (),
            level=decision.plan.level,
            consistency="crash",
            qemu=vm.version,
            guest=vm.status,
            started=_utc_now(),
            begun=begun,
            deadline=begun + self.settings.timeout if self.settings.timeout else None,
            checksum=policy.checksum,
            disks=disks,
        )

    def _target_of(self, intent: Intent, disk: Growing) -> _target.Target:
        return _target.Target(
            path=self.repository.image_path(intent, disk.image.image),
            format=disk.image.format,
            size=disk.image.virtual_size,
            compress=disk.image.compression != "none",
            compression_type=disk.image.compression,
        )

    async def _prepare(
        self, intent: Intent, disks: Sequence[Disk], targets: dict[str, _target.Target], lock: int
    ) -> Intent:
        """Claim the id, make the images, and take the space that they may need."""
        expected = await _survey.measure(disks)
        space = _survey.room(self.repository, self.plan.policy, intent.vm.name)
        if sum(expected.values()) > max(space.usable, 0):
            raise BackupError(_plan.no_room(sum(expected.values()), space, space.usable))
        intent = replace(
            intent, disks=tuple(replace(disk, expected=expected[disk.image.name]) for disk in intent.disks)
        )
        try:
            self.repository.begin(intent)
        except FileExistsError:
            raise BackupError(f"VM {intent.vm.name}: somebody else has begun set {intent.id}") from None
        grown = []
        reserved = True
        for disk in intent.disks:
            target = replace(targets[disk.image.name], expected=disk.expected)
            await _target.create(target, pass_fds=(lock,))
            reserved = _target.reserve(target) and reserved
            grown.append(replace(disk, inode=os.stat(target.path).st_ino))
        if not reserved and self.settings.state == "started" and not self.settings.unattended:
            raise BackupError(
                f"{self.repository.path} cannot reserve space: when it fills up while nobody looks, the guest's writes"
                " fail; use state: completed, or unattended: true"
            )
        intent = replace(intent, disks=tuple(grown), reserved=reserved)
        self.repository.update(intent)
        return intent

    # End

    async def _make_safe(self, work: _Work, intent: Intent, shelf: Shelf) -> None:
        """Bring finished images onto stable storage and take their checksums: without locks, for it may take long."""
        if intent.attempt in shelf.described or intent.attempt in work.safe:
            return
        loop = asyncio.get_running_loop()
        try:
            images = await asyncio.gather(
                *(
                    loop.run_in_executor(
                        None, _finish_image, self.repository.image_path(intent, disk.image.image), disk, intent.checksum
                    )
                    for disk in intent.disks
                )
            )
        except FileNotFoundError as error:
            # Another process may have published or removed it meanwhile: the next look tells.
            there = self.repository.intent(intent.vm.name, intent.id)
            if there and there.attempt == intent.attempt:
                work.spoiled[intent.attempt] = f"an image is gone: {error}"
            return
        except (BackupError, OSError) as error:
            work.spoiled[intent.attempt] = f"the copy ended, but could not be brought to stable storage: {error}"
            return
        work.safe[intent.attempt] = tuple(images)

    async def _publish(
        self, work: _Work, monitor: Monitor | None, facts: Facts, shelf: Shelf, intent: Intent
    ) -> Manifest:
        if intent.attempt not in shelf.described:
            self.repository.describe(intent, self._manifest(intent, work.safe[intent.attempt]))
        manifest = self.repository.publish(intent)
        work.changed = True
        # From here on the set is good; what is left in QEMU is removed now or by any later run.
        await self._tidy(monitor, facts, shelf, manifest)
        return manifest

    def _manifest(self, intent: Intent, images: tuple[DiskImage, ...]) -> Manifest:
        return Manifest(
            repository=self.repository.uuid,
            vm=intent.vm,
            id=intent.id,
            sequence=0,
            level=intent.level,
            run=intent.run,
            attempt=intent.attempt,
            started=intent.started,
            finished=_utc_now(),
            duration=round(_boottime() - intent.begun, 3),
            consistency=intent.consistency,
            qemu=intent.qemu,
            disks=images,
        )

    async def _tidy(self, monitor: Monitor | None, facts: Facts, shelf: Shelf, manifest: Manifest) -> None:
        """Remove what the making of a published set has left in QEMU and beside the set."""
        if monitor and facts.vm:
            await self._remove_traces(monitor, facts.vm, manifest.attempt)
            for attempt in self._leftovers(facts.vm, shelf) - {manifest.attempt}:
                await self._remove_traces(monitor, facts.vm, attempt)
        self.repository.tidy(manifest.vm.name, manifest.id)

    async def _give_up(
        self, work: _Work, monitor: Monitor | None, facts: Facts, intent: Intent, error: str, state: str = FAILED
    ) -> None:
        """An attempt has come to nothing. That is written down before anything is removed."""
        work.changed = True
        failure = Failure(intent.run, intent.attempt, intent.id, state, error, intent.started, _utc_now())
        try:
            self.repository.record_failure(intent.vm.name, failure)
        except OSError as full:
            if full.errno not in NO_SPACE:
                raise
            # The images themselves are in the way. QEMU still tells how their jobs have ended.
            await self._stop(monitor, intent.jobs)
            self.repository.discard_images(intent)
            self.repository.record_failure(intent.vm.name, failure)
        await self._withdraw(monitor, facts, intent)

    async def _withdraw(self, monitor: Monitor | None, facts: Facts, intent: Intent) -> None:
        """Remove every trace of an attempt, in QEMU first."""
        if monitor and facts.vm:
            blamed = any(job.error for job in _jobs_of(intent, facts)) or _plan.guest_stopped_by(intent, facts, True)
            await self._remove_traces(monitor, facts.vm, intent.attempt)
            if blamed and intent.guest != "io-error":
                await _resume(monitor)
        elif intent.attempt not in facts.dead:
            raise BackupError(f"{facts.error}; the set is unfinished: run the backup again to clean up")
        self.repository.discard(intent)

    async def _stop(self, monitor: Monitor | None, jobs: Iterable[str]) -> None:
        stubborn = await _jobs.cancel_jobs(monitor, jobs) if monitor else ()
        if stubborn:
            names = ", ".join(job.id for job in stubborn)
            raise JobFailed(
                f"job {names} does not end after block-job-cancel: its target hangs. Bring the target back; the next"
                " run removes what is left"
            )

    async def _remove_traces(self, monitor: Monitor, vm: Vm, attempt: str) -> None:
        jobs = [job.id for job in vm.jobs if job.id.startswith(f"vmfleet.{self.repository.tag}.{attempt}.")]
        await self._stop(monitor, jobs)
        await _jobs.dismiss_jobs(monitor, jobs)
        await _jobs.remove_fdsets(monitor, vm, f"vmfleet:{self.repository.tag}:{attempt}:")

    async def _clear(self, monitor: Monitor, vm: Vm, name: str) -> None:
        """Before a start: nothing of this repository may be left on the VM."""
        leftovers = self._leftovers(vm, self.repository.shelf(name))
        elsewhere = {intent.attempt: intent for intent in self.repository.intents()} if leftovers else {}
        for attempt in leftovers:
            other = elsewhere.get(attempt)
            if other:
                raise BackupError(
                    f"the same VM is being backed up under the name {other.vm.name} (set {other.id}); give it one name"
                )
            await self._remove_traces(monitor, vm, attempt)

    def _leftovers(self, vm: Vm, shelf: Shelf) -> set[str]:
        """The attempts of this repository that QEMU knows and no intent of this VM does."""
        known = {job.id.split(".")[2] for job in vm.jobs if job.id.startswith(f"vmfleet.{self.repository.tag}.")}
        for opaques in vm.fdsets.values():
            known |= {tag.split(":")[2] for tag in opaques if tag.startswith(f"vmfleet:{self.repository.tag}:")}
        return known - {intent.attempt for intent in shelf.intents}

    # Cancel

    async def _cancel(self, work: _Work) -> Outcome:
        """Stop the set that is being made, and remember that somebody wanted it so."""
        name = work.request.name
        shelf = self.repository.shelf(name)
        wanted = [intent for intent in shelf.intents if self.plan.id in ("", intent.id)]
        if not wanted:
            manifest = shelf.published(self.plan.id)
            return (
                self._published(work, manifest)
                if manifest
                else self._outcome(work, SKIPPED, reason="no set is being made")
            )
        foreign = [intent for intent in wanted if intent.hypervisor.machine_id != self._hypervisor.machine_id]
        if foreign:
            error = f"set {foreign[0].id} is being made by hypervisor {foreign[0].hypervisor.name}; cancel it there"
            return self._outcome(work, FAILED, error=error)
        work.changed = True
        if not self.settings.check_mode:
            work.planned = replace(work.planned, monitor=wanted[0].monitor)
            await self._cancel_intents(work, [intent.id for intent in wanted])
        return self._outcome(work, CANCELLED, reason="cancelled on request")

    async def _cancel_intents(self, work: _Work, ids: Sequence[str]) -> None:
        name = work.request.name
        address = parse_address(work.request.monitor)
        facts, shelf = await self._look(work)
        async with AsyncExitStack() as stack:
            process = facts.vm.process if facts.vm else None
            await stack.enter_async_context(locked(host_lock_path(process, address), f"VM {name}"))
            await stack.enter_async_context(self.repository.lock(name))
            monitor = await stack.enter_async_context(Monitor(address, self.commands)) if facts.vm else None
            if monitor:
                facts, shelf = await self._look(work, monitor)
            for intent in shelf.intents:
                if intent.id in ids:
                    await self._give_up(work, monitor, facts, intent, "cancelled on request", CANCELLED)


def cancellation(repository: Repository, names: Iterable[str]) -> Plan:
    """A plan for state cancelled of the VMs with these names: their intents know the rest."""
    vms = tuple(VmPlan(name, "", _plan.ATTACH, "") for name in names)
    policy = _plan.Policy()
    return _plan.Plan(repository.path, False, "", "", policy, _survey.room(repository, policy), vms)


def results(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [asdict(outcome) for outcome in outcomes]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many VMs are in which state, and what was written."""
    counts: dict[str, Any] = {state: sum(outcome.state == state for outcome in outcomes) for state in STATES}
    counts["changed"] = sum(outcome.changed for outcome in outcomes)
    counts["bytes"] = sum(outcome.bytes for outcome in outcomes if outcome.changed)
    return counts


def describe(outcomes: Sequence[Outcome]) -> list[str]:
    """The results for people to read, what went wrong last."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    return [outcome.describe(width) for outcome in sorted(outcomes, key=lambda one: one.state in (FAILED, CANCELLED))]


def _image(disk: Disk, planned: _plan.DiskPlan, policy: Policy) -> DiskImage:
    return DiskImage(
        name=disk.name,
        node=disk.node,
        qdev=disk.qdev,
        source=disk.filename,
        source_format=disk.driver,
        virtual_size=disk.virtual_size,
        level=planned.level,
        reason=planned.reason,
        parent=None,
        image=planned.target,
        format="qcow2",
        compression=policy.compression,
    )


def _arguments(policy: Policy) -> dict[str, Any]:
    arguments: dict[str, Any] = {"sync": "full"}
    if policy.speed:
        arguments["speed"] = policy.speed
    if policy.compression != "none":
        arguments["compress"] = True
    return arguments


def _jobs_of(intent: Intent, facts: Facts) -> list[Job]:
    return [job for job in facts.vm.jobs if job.id in intent.jobs] if facts.vm else []


async def _resume(monitor: Monitor) -> None:
    """Let a VM go on that our target had stopped."""
    if (await monitor.execute("query-status"))["status"] == "io-error":
        await monitor.execute("cont")


def _finish_image(path: str, disk: Growing, checksum: bool) -> DiskImage:
    if os.stat(path).st_ino != disk.inode:
        raise BackupError(f"disk {disk.image.name}: {path} is not the file that the backup was started with")
    status = _target.flush(path)
    return replace(disk.image, bytes=status.st_size, sha256=_sha256(path) if checksum else None)


def _sha256(path: str) -> str:
    """The checksum of what is on the disk, not of what the page cache remembers."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as image:
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while True:
            piece = image.read(READ_SIZE)
            if not piece:
                return digest.hexdigest()
            digest.update(piece)


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
