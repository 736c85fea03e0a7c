# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One hypervisor's way from a plan to published sets.

Every step is a function of the plan, the repository and QEMU: all memory is on disk or in QEMU, so that another process
can go on from wherever this one is killed. A look takes no locks and changes nothing; what it finds to be done is found
once more with the locks held, and then done. Nobody waits for a job with a lock or a monitor in hand.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import (
    AgentError,
    BackupError,
    CommandError,
    JobFailed,
    MonitorError,
    MonitorGone,
    RepositoryHangs,
    after,
    in_words,
    internal,
)
from .._common.formats import boottime, utc_now
from .._host import machine, probe
from .._host.lock import locked
from .._plan import decide, observe, space
from .._plan.model import PUBLISHED_ALREADY, Action, Quiesce, RunContext
from .._qemu import bitmaps, block_jobs, guest_freeze
from .._qemu.losses import IN_THE_CLEAR
from .._qemu.model import IO_ERROR
from .._qemu.monitor import Monitor, parse_address
from .._qemu.query import query_jobs
from .._qemu.vm_lock import host_lock_path
from .._repository import chain
from .._repository.chain import Level
from .._repository.documents import Failure, Phase
from . import attempt_state
from .attempt_state import AttemptStatus
from .outcome import Outcome, VmState, of_disks
from .prepare import NOT_ASKED, Maker, bitmap_prefix
from .scheduler import BandwidthLimiter, TimeSlice, VmSlots
from .task import VmTask

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .._host.process import Process
    from .._plan.model import Decision, Observation, Plan, VmPlan
    from .._qemu.model import Job, Vm
    from .._repository.async_repository import AsyncRepository
    from .._repository.documents import Intent, Manifest
    from .._repository.repository import VmRecords
    from .attempt_state import AttemptState
    from .task import Settings


UNREACHABLE_PATIENCE = 60.0
"""Seconds that a monitor may be silent, or in somebody else's hands, while its jobs run."""
PIECE = 1 << 20
"""Bytes that a job copies at a time; with a limited speed, it rests after each."""


class Engine:
    """Brings the VMs of a plan to their sets. C(commands) lists what QEMU was told."""

    def __init__(self, repository: AsyncRepository, plan: Plan, settings: Settings) -> None:
        self.repository = repository
        self.plan = plan
        self.settings = settings
        self.commands: list[dict[str, Any]] = []
        self._hypervisor = machine.this_hypervisor()
        self._terms = RunContext(
            plan.id,
            plan.run,
            repository.tag,
            self._hypervisor,
            plan.policy,
            takeover=settings.takeover,
            supersede=settings.supersede,
            adopt=settings.adopt,
        )
        watched = settings.state != "started" or settings.unattended
        self._maker = Maker(repository, plan, self._hypervisor, settings.timeout, watched)
        self._turns = VmSlots(settings.max_vms, (planned.name for planned in plan.vms))
        self._budget = BandwidthLimiter(settings.bandwidth, plan.policy.speed)
        self._slice = TimeSlice(settings.slice)
        self._gate = asyncio.Lock()
        # One that is only planned has nothing in it that could hang.
        self._watch = repository.calls.watch if repository.uuid else None

    async def run(self) -> list[Outcome]:
        """Every VM's outcome, in the plan's order. One VM's failure never stops the others."""
        names = {planned.name for planned in self.plan.vms}
        begun = [intent for intent in await self.repository.intents() if intent.vm.name in names]
        for intent in begun:
            self._turns.join(intent.vm.name)
            self._budget.count(intent.vm.name, len(intent.disks))
        # One whose set has begun to grow since the plan has nothing to start: its jobs are to be looked at.
        fresh = names - {intent.vm.name for intent in begun}
        works = [
            VmTask(planned, order=("", place), fresh=planned.name in fresh)
            for place, planned in enumerate(self.plan.vms)
        ]
        return list(await asyncio.gather(*(self._settle(work) for work in works)))

    async def _settle(self, work: VmTask) -> Outcome:
        planned = work.planned
        try:
            if self.settings.state == VmState.CANCELLED:
                outcome = await self._cancel(work)
            elif self.settings.state == VmState.UNTRACKED:
                outcome = await self._untrack(work)
            elif planned.action == Action.FAIL and not (planned.unless or planned.identity):
                outcome = self._outcome(work, VmState.FAILED, error=planned.reason)
            else:
                outcome = await self._bring_to_end(work)
        except RepositoryHangs as error:
            outcome = await self._abandon(work, str(error))
        except (BackupError, OSError) as error:
            outcome = await self._fail(work, in_words(error))
        except Exception as error:  # noqa: BLE001
            # A defect of ours that shows with one VM is not to take the others along.
            work.warn(traceback.format_exc())
            outcome = await self._fail(work, internal(error))
        if outcome.state != VmState.RUNNING:
            self._turns.leave(planned.name)
            self._budget.count(planned.name, 0)
        return outcome

    async def _fail(self, work: VmTask, error: str) -> Outcome:
        """Give up on a VM for now. Where the repository itself is gone, no later run can free the guest of its jobs."""
        if work.followed and await self._is_gone():
            return await self._abandon(work, error)
        return self._outcome(work, VmState.FAILED, error=error)

    async def _is_gone(self) -> bool:
        """Whether the repository cannot be used any more: unmounted, exchanged, or its disk has failed."""
        try:
            await probe.probe(self.repository.path, writing=True)
            await self.repository.check_same()
        except (BackupError, OSError):
            return True
        return False

    def _is_refused(self, planned: VmPlan) -> bool:
        """Whether the plan refused it, and there is no order that the plan did not know of."""
        orders = {"takeover": self.settings.takeover, "adopt": self.settings.adopt}
        return planned.action == Action.FAIL and not orders.get(planned.unless, False)

    async def _bring_to_end(self, work: VmTask) -> Outcome:
        """Step after step until there is nothing left to do, or nothing but to wait, and this call does not do that."""
        while True:
            with self._slice.busy():
                hanging = await self._watch.ask() if self._watch else ""
                step = await (self._abandon(work, hanging) if hanging else self._step(work))
            self._turns.arrive(work.request.name)
            outcome = step if isinstance(step, Outcome) else await self._wait(work, step)
            if outcome:
                return outcome

    async def _wait(self, work: VmTask, verdict: AttemptState) -> Outcome | None:
        """Wait for what the next step needs; an outcome where this call is not to wait, or has waited long enough."""
        starting = self.settings.state == "started"
        if verdict.state != AttemptStatus.UNREACHABLE:
            work.silent_since = 0.0
        if verdict.state == VmState.QUEUED:
            until = None if starting else self._slice.over
            if not await self._turns.take(work.request.name, work.order, until):
                return self._outcome(work, VmState.QUEUED, reason=verdict.error)
        elif verdict.state == AttemptStatus.RUNNING:
            if self._slice.over.is_set():
                await self._note_progress(work)
            if starting or self._slice.over.is_set():
                return self._running(work)
            await self._budget.pause(work.next_pause())
        elif verdict.state == AttemptStatus.UNREACHABLE:
            work.silent_since = work.silent_since or time.monotonic()
            if starting or time.monotonic() - work.silent_since > UNREACHABLE_PATIENCE:
                error = f"{verdict.error}; the set is unfinished: run the backup again to go on with it"
                return self._outcome(work, VmState.FAILED, error=error)
            # The next call would not know for how long it has been silent.
            with self._slice.busy():
                await asyncio.sleep(work.next_pause())
        return None

    async def _step(self, work: VmTask) -> Outcome | AttemptState:
        """Look, and do what is to be done. A verdict means: not at the end yet."""
        process = await self._to_start(work)
        if process:
            return await self._act(work, process)
        facts, shelf = await self._look(work, seen=work.copying)
        work.copying = None
        decision = self._decide(work, facts, shelf)
        if decision.plan.action == Action.FAIL and not self.settings.check_mode and await self._is_lost(facts, shelf):
            return await self._act(work, facts.process)
        outcome = await self._final(work, decision, facts, shelf)
        if outcome or self.settings.check_mode:
            return outcome or self._predict(work, decision)
        if decision.plan.action in (Action.START, Action.FINISH) and not self._turns.has(work.request.name):
            work.order = (shelf.sets[-1].started if shelf.sets else "", work.order[1])
            work.called = None if decision.intent else facts.process
            return attempt_state.AttemptState(VmState.QUEUED, f"at most {self.settings.max_vms} VMs copy at a time")
        if decision.intent and self._is_ours(decision.intent):
            work.followed = decision.intent
        if decision.intent and not decision.removal:
            verdict = await self._follow(work, decision.intent, facts, shelf)
            if verdict:
                return verdict
        return await self._act(work, facts.process, None if facts.vm else facts)

    async def _to_start(self, work: VmTask) -> Process | None:
        """The QEMU of a VM that is to start its set now, as was planned or seen: it is looked at with the locks held.

        None where something else is to be done, or where the QEMU is not known.
        """
        process, work.called = work.called, None
        may_start = self.settings.begin and not self.settings.check_mode
        planned = work.fresh and work.planned.action == Action.START and may_start
        work.fresh = False
        if planned and self._turns.has(work.request.name):
            return await observe.find_process(work.request)
        return process

    async def _follow(self, work: VmTask, intent: Intent, facts: Observation, shelf: VmRecords) -> AttemptState | None:
        """Do for an attempt what needs no locks. A verdict means: there is nothing else to be done now."""
        verdict = self._judge(work, intent, facts, shelf)
        if verdict.state == AttemptStatus.UNREACHABLE:
            return verdict
        await self._pace(work, intent, facts)
        if verdict.state == AttemptStatus.RUNNING and facts.vm:
            work.copying = facts.vm, intent
            self._maker.nudge(intent)
            if not intent.frozen and not await self._alarm(intent, facts, work):
                return verdict
        if verdict.state == AttemptStatus.COPIED:
            if self._slice.over.is_set():
                # The others have gone, and this may take long.
                return attempt_state.AttemptState(AttemptStatus.RUNNING)
            try:
                if attempt_state.guest_stopped_by(intent, facts):
                    # The target failed while nobody looked. The copy is good: the guest's write failed instead.
                    async with Monitor(parse_address(work.request.monitor), self.commands) as monitor:
                        await block_jobs.resume(monitor)
                await self._close_targets(work, intent, facts)
            except MonitorError as error:
                return attempt_state.AttemptState(AttemptStatus.UNREACHABLE, str(error))
            await self._make_safe(work, intent, shelf)
        return None

    async def _look(
        self, work: VmTask, monitor: Monitor | None = None, seen: tuple[Vm, Intent] | None = None
    ) -> tuple[Observation, VmRecords]:
        facts = await (
            observe.refresh(work.request, seen[0], seen[1].jobs) if seen else observe.observe(work.request, monitor)
        )
        # What a glance shows of a VM, no new set is begun upon.
        return await self._on_shelf(work, facts, damage=not seen)

    async def _on_shelf(self, work: VmTask, facts: Observation, damage: bool = False) -> tuple[Observation, VmRecords]:
        name = work.request.name
        return await self.repository.run(observe.with_shelf, facts, name, self._hypervisor, damage)

    def _decide(self, work: VmTask, facts: Observation, shelf: VmRecords) -> Decision:
        return decide.decide(work.request, facts, shelf, self._terms)

    def _judge(self, work: VmTask, intent: Intent, facts: Observation, shelf: VmRecords) -> AttemptState:
        verdict = attempt_state.judge(intent, facts, shelf, boottime())
        lost = chain.lost_parent(intent, shelf.sets)
        if verdict.state == AttemptStatus.GIVEN_UP:
            return verdict
        if lost:
            return attempt_state.AttemptState(AttemptStatus.BROKEN, lost)
        if intent.attempt in work.spoiled:
            # A second fsync may succeed where the first has failed, and mean nothing.
            return attempt_state.AttemptState(AttemptStatus.BROKEN, work.spoiled[intent.attempt])
        if intent.attempt in work.safe:
            # All its jobs have ended well and its images are flushed: whatever QEMU does now, the set is good.
            return attempt_state.AttemptState(AttemptStatus.COPIED)
        if self._lacks_freeze(work, intent, shelf) and verdict.state in (AttemptStatus.RUNNING, AttemptStatus.COPIED):
            return attempt_state.AttemptState(AttemptStatus.INTERRUPTED)
        return verdict

    def _lacks_freeze(self, work: VmTask, intent: Intent, shelf: VmRecords) -> bool:
        """Whether nobody can tell that the guest was frozen when the jobs of an attempt started, and it has to be.

        The process that started them was killed at that very moment. Little is lost, as the set has hardly begun.
        """
        unknown = intent.phase == Phase.PREPARING and intent.agent and intent.attempt not in shelf.described
        return bool(unknown) and work.request.quiesce == Quiesce.REQUIRE and intent.id == self.plan.id

    # What needs no hand

    async def _final(self, work: VmTask, decision: Decision, facts: Observation, shelf: VmRecords) -> Outcome | None:
        """The outcome, where nothing is left to be done."""
        name, action = work.request.name, decision.plan.action
        if action == Action.SKIP and decision.manifest:
            if facts.vm and (await self._leftovers(facts.vm, shelf) or await self._surplus(work, facts.vm, shelf)):
                return None
            if await self.repository.untidy(name, self.plan.id):
                return None
            return self._published(work, decision.manifest)
        if action == Action.SKIP:
            return self._outcome(work, VmState.SKIPPED, reason=decision.plan.reason)
        if action == Action.FAIL:
            failure = shelf.failure(self.plan.id)
            cancelled = failure and failure.run == self.plan.run and failure.state == VmState.CANCELLED
            return self._outcome(work, VmState.CANCELLED if cancelled else VmState.FAILED, error=decision.plan.reason)
        if action == Action.START and work.planned.action == Action.SKIP:
            if work.planned.reason == PUBLISHED_ALREADY:
                return self._outcome(work, VmState.FAILED, error="its set has been removed since the plan; plan again")
            # What has changed since the plan makes it safer, never bolder.
            return self._outcome(work, VmState.SKIPPED, reason=f"the plan was to skip it: {work.planned.reason}")
        if action in (Action.START, Action.FINISH) and self._is_refused(work.planned):
            return self._outcome(work, VmState.FAILED, error=work.planned.reason)
        if action == Action.START and not self.settings.begin:
            reason = f"set {self.plan.id} is not being made, and is not to be begun now"
            return self._outcome(work, VmState.SKIPPED, reason=reason)
        return None

    def _predict(self, work: VmTask, decision: Decision) -> Outcome:
        """What check mode says of a VM with which something is to be done."""
        work.changed = decision.plan.action != Action.SKIP
        if decision.manifest:
            return self._published(work, decision.manifest)
        state = VmState.PUBLISHED if self.settings.state == "completed" else VmState.RUNNING
        return self._outcome(work, state, level=decision.plan.level, reason=decision.plan.reason, path=self._path(work))

    def _published(self, work: VmTask, manifest: Manifest) -> Outcome:
        if manifest.consistency_reason and work.request.quiesce != Quiesce.NONE:
            advice = "; for a set of a frozen guest use another id" if manifest.consistency_reason == NOT_ASKED else ""
            work.warn(f"the guest's file systems were not frozen: {manifest.consistency_reason}{advice}")
        for disk in manifest.disks:
            if disk.source_encrypted:
                work.warn(f"disk {disk.name} {IN_THE_CLEAR}")
        wanted = work.request.wanted
        if wanted in (Level.FULL, Level.DIFFERENTIAL) and manifest.level not in (Level.FULL, wanted):
            work.warn(f"the set is {manifest.level} and stays so; for the level {wanted} use another id")
        return self._outcome(
            work,
            VmState.PUBLISHED,
            level=manifest.level,
            bytes=manifest.bytes,
            duration=manifest.duration,
            consistency=manifest.consistency,
            consistency_reason=manifest.consistency_reason,
            frozen_ms=manifest.frozen_ms,
            path=self._path(work),
            disks=of_disks(manifest.disks),
        )

    def _running(self, work: VmTask) -> Outcome:
        if not work.copying:
            return self._outcome(work, VmState.RUNNING, reason="its jobs have ended, and it is about to be finished")
        vm, intent = work.copying
        jobs = _jobs_of(intent, vm)
        advance = {"offset": sum(job.offset for job in jobs), "len": sum(job.len for job in jobs)}
        if intent.id != self.plan.id:
            reason = f"the jobs of set {intent.id} are copying, which comes first"
            return self._outcome(work, VmState.RUNNING, reason=reason, **advance)
        return self._outcome(
            work,
            VmState.RUNNING,
            reason="its jobs are copying",
            **advance,
            level=intent.level,
            consistency=intent.consistency,
            consistency_reason=intent.consistency_reason,
            frozen_ms=intent.frozen_ms,
            disks=of_disks(disk.image for disk in intent.disks),
        )

    def _outcome(self, work: VmTask, state: str, **more: Any) -> Outcome:
        return Outcome(
            name=work.request.name,
            id=self.plan.id,
            state=state,
            warnings=tuple(work.warnings),
            changed=work.changed,
            **more,
        )

    def _path(self, work: VmTask) -> str:
        return self.repository.set_path(work.request.name, self.plan.id)

    # What is done with the locks held

    async def _act(
        self, work: VmTask, process: Process | None, absent: Observation | None = None
    ) -> Outcome | AttemptState:
        """Take the locks, look, and do the one thing that is to be done.

        C(process) is the QEMU that has just answered, where it is known; where none has, C(absent) is what was found.
        """
        name = work.request.name
        address = parse_address(work.request.monitor)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(locked(host_lock_path(process, address), f"VM {name}"))
            lock = await stack.enter_async_context(self.repository.lock(name))
            if absent:
                return await self._do(work, None, *await self._on_shelf(work, absent), lock)
            try:
                monitor = await stack.enter_async_context(Monitor(address, self.commands))
            except MonitorError as error:
                # A set whose images are safe needs no QEMU any more: the next look goes on without one.
                return attempt_state.AttemptState(AttemptStatus.UNREACHABLE, str(error))
            if monitor.process != process:
                # Another QEMU has taken the monitor's place: its lock is another one.
                return attempt_state.AttemptState(AttemptStatus.INTERRUPTED)
            return await self._do(work, monitor, *await self._look(work, monitor), lock)

    async def _do(
        self, work: VmTask, monitor: Monitor | None, facts: Observation, shelf: VmRecords, lock: int
    ) -> Outcome | AttemptState:
        """Do what is to be done; C(lock) is that of the repository."""
        decision = self._decide(work, facts, shelf)
        if decision.intent and self._is_ours(decision.intent):
            work.followed = decision.intent
        if decision.plan.action == Action.SKIP and decision.manifest:
            await self._tidy(work, monitor, facts, shelf, decision.manifest)
            return self._published(work, decision.manifest)
        if decision.intent and decision.removal:
            return await self._remove(work, monitor, facts, decision.intent, decision.removal)
        if decision.intent and decision.plan.action != Action.FAIL:
            return await self._advance(work, monitor, facts, shelf, decision.intent)
        if decision.plan.action == Action.FAIL and monitor and facts.vm and await self._is_lost(facts, shelf):
            work.changed = True
            await self._remove_leftovers(work, monitor, facts.vm, shelf)
        if decision.plan.action == Action.START and monitor and facts.vm and self.settings.begin:
            return await self._start(work, monitor, facts.vm, shelf, decision, lock)
        return await self._final(work, decision, facts, shelf) or attempt_state.AttemptState(AttemptStatus.INTERRUPTED)

    async def _advance(
        self, work: VmTask, monitor: Monitor | None, facts: Observation, shelf: VmRecords, intent: Intent
    ) -> Outcome | AttemptState:
        """Bring an attempt one step on."""
        intent = await self._thaw(work, intent, facts)
        verdict = self._judge(work, intent, facts, shelf)
        if verdict.state == AttemptStatus.COPIED and (intent.attempt in work.safe or intent.attempt in shelf.described):
            manifest = await self._publish(work, monitor, facts, shelf, intent)
            return self._published(work, manifest) if intent.id == self.plan.id else verdict
        if verdict.state in (AttemptStatus.INTERRUPTED, AttemptStatus.GIVEN_UP):
            await self._withdraw(monitor, facts, intent)
        elif verdict.state == AttemptStatus.BROKEN:
            await self._give_up(work, monitor, facts, intent, verdict.error)
        elif verdict.state == AttemptStatus.RUNNING:
            # One at a time: what one set leaves behind may be enough for the others.
            async with self._gate:
                alarm = await self._alarm(intent, facts, work)
                if alarm:
                    await self._give_up(work, monitor, facts, intent, alarm)
                    return attempt_state.AttemptState(AttemptStatus.BROKEN, alarm)
        return verdict

    async def _thaw(self, work: VmTask, intent: Intent, facts: Observation) -> Intent:
        """Undo a freeze of which nobody has seen the end, where there is one."""
        if not intent.frozen:
            return intent
        if facts.vm and intent.attempt not in facts.dead:
            try:
                await guest_freeze.thaw(intent.agent)
            except AgentError as error:
                work.warn(
                    f"the guest's file systems may still be frozen by this backup: {error}; thaw them in the guest"
                )
                return intent
        thawed = replace(intent, frozen=False)
        try:
            await self.repository.update(thawed)
        except OSError as full:
            if full.errno not in probe.NO_SPACE:
                raise
            # The mark stays, and is looked at again.
            return intent
        return thawed

    async def _alarm(self, intent: Intent, facts: Observation, work: VmTask) -> str:
        """Why a running attempt must end, for the guest's sake or for standing still; empty where it need not."""
        short = "" if intent.reserved else await self.repository.run(space.short_of_space, self.plan.policy)
        if attempt_state.guest_stopped_by(intent, facts):
            return "the guest was stopped by an I/O error because the backup's target is, or was, full or failing"
        if short and await self._is_youngest(intent):
            return f"{short}, and the set's space could not be reserved"
        return self._stalled(intent, facts, work)

    async def _pace(self, work: VmTask, intent: Intent, facts: Observation) -> None:
        """Give each of a VM's running jobs its share of the bandwidth."""
        if not self.settings.bandwidth:
            return
        name = work.request.name
        jobs = [job for job in _jobs_of(intent, facts.vm) if not job.copied]
        share = self._budget.count(name, len(jobs))
        late = [job for job in jobs if job.speed != share]
        try:
            if late:
                async with Monitor(parse_address(work.request.monitor), self.commands) as monitor:
                    for job in late:
                        await block_jobs.set_speed(monitor, job.id, share)
        except MonitorError:
            # The next look tells what has become of it.
            return
        self._budget.confirm(name, share)

    async def _is_youngest(self, intent: Intent) -> bool:
        """Whether no set of this run that could not reserve its space is younger: that one has less to lose."""
        names = {planned.name for planned in self.plan.vms}
        mine = (other for other in await self.repository.intents() if other.vm.name in names and not other.reserved)
        return all(other.begun <= intent.begun for other in mine)

    def _stalled(self, intent: Intent, facts: Observation, work: VmTask) -> str:
        jobs = _jobs_of(intent, facts.vm)
        copied = sum(job.offset for job in jobs)
        now = boottime()
        if work.progress[:2] != (intent.attempt, copied) or any(job.paused for job in jobs):
            # Where it stood when an earlier call came back, and since when.
            seen, since = intent.progress or (-1, now)
            work.moved = bool(work.progress[0])
            work.progress = (intent.attempt, copied, since if seen == copied and not work.moved else now)
        if self.settings.stall_timeout and now - work.progress[2] > self.settings.stall_timeout:
            return f"no progress for {self.settings.stall_timeout:g} s"
        return ""

    async def _note_progress(self, work: VmTask) -> None:
        """Write down since when a set stands still: the call that goes on cannot know."""
        attempt, copied, since = work.progress
        if not work.copying or work.copying[1].attempt != attempt or work.moved:
            return
        async with self.repository.lock(work.request.name):
            there = await self.repository.intent(work.request.name, work.copying[1].id)
            if there and there.attempt == attempt and there.progress != (copied, since):
                await self.repository.update(replace(there, progress=(copied, since)))

    # Start

    async def _start(
        self, work: VmTask, monitor: Monitor, vm: Vm, shelf: VmRecords, decision: Decision, lock: int
    ) -> Outcome | AttemptState:
        decision = attempt_state.keep_planned_fulls(decision, work.planned)
        for change in attempt_state.changes(work.planned, decision.plan.disks):
            work.warn(change)
        work.changed = True
        await self._clear(work, monitor, vm, shelf)
        try:
            draft = await self._maker.draft(monitor, work.request, vm, decision)
        except BackupError as error:
            return await self._refuse(work, str(error))
        try:
            work.followed = draft.intent
            intent = await self._maker.prepare(draft, work.planned.disks, lock)
            speed = await self._budget.make_way(work.request.name, len(intent.disks))
            intent = await self._maker.launch(monitor, draft, intent, work.request.quiesce, speed)
        except MonitorError as error:
            if work.cut_off or not isinstance(error, MonitorGone):
                raise
            # Whether QEMU lives, and has started the jobs, is for the next look to find out.
            work.cut_off = True
            return attempt_state.AttemptState(AttemptStatus.UNREACHABLE, str(error))
        except RepositoryHangs:
            raise
        except (BackupError, OSError) as error:
            return await self._undo(work, monitor, draft.intent, in_words(error))
        work.copying = vm, intent
        return attempt_state.AttemptState(AttemptStatus.RUNNING)

    async def _refuse(self, work: VmTask, error: str) -> AttemptState:
        """Nothing was begun; that this run need not try again is written down all the same."""
        now = utc_now()
        failure = Failure(self.plan.run, "", self.plan.id, VmState.FAILED, error, now, now)
        with after(error):
            await self.repository.record_failure(work.request.name, failure)
        return attempt_state.AttemptState(AttemptStatus.BROKEN, error)

    async def _undo(self, work: VmTask, monitor: Monitor, drafted: Intent, error: str) -> AttemptState:
        """An attempt came to nothing while it was begun: how far it got, the repository and QEMU tell."""
        with after(error):
            facts = await observe.observe(work.request, monitor)
            there = await self.repository.intent(drafted.vm.name, drafted.id)
            intent = there if there and there.attempt == drafted.attempt else drafted
            intent = await self._thaw(work, intent, facts)
        await self._give_up(work, monitor, facts, intent, error)
        return attempt_state.AttemptState(AttemptStatus.BROKEN, error)

    # End

    async def _close_targets(self, work: VmTask, intent: Intent, facts: Observation) -> None:
        """Have QEMU close images that it holds as nodes: it may have kept some of them in memory until now."""
        prefix = self._tag(intent.attempt)
        if facts.vm and any(name.startswith(block_jobs.target_nodes(prefix)) for name in facts.vm.target_nodes):
            async with Monitor(parse_address(work.request.monitor), self.commands) as monitor:
                await block_jobs.close_targets(monitor, facts.vm, prefix)

    async def _make_safe(self, work: VmTask, intent: Intent, shelf: VmRecords) -> None:
        """Bring finished images onto stable storage and take their checksums: without locks, for it may take long."""
        if intent.attempt in shelf.described or intent.attempt in work.safe:
            return
        try:
            work.safe[intent.attempt] = await self._maker.finish(intent)
        except FileNotFoundError as error:
            # Another process may have published or removed it meanwhile: the next look tells.
            there = await self.repository.intent(intent.vm.name, intent.id)
            if there and there.attempt == intent.attempt:
                work.spoiled[intent.attempt] = f"an image is gone: {in_words(error)}"
        except RepositoryHangs:
            raise
        except (BackupError, OSError) as error:
            work.spoiled[intent.attempt] = (
                f"the copy ended, but could not be brought to stable storage: {in_words(error)}"
            )

    async def _publish(
        self, work: VmTask, monitor: Monitor | None, facts: Observation, shelf: VmRecords, intent: Intent
    ) -> Manifest:
        if intent.attempt not in shelf.described:
            await self.repository.describe(intent, self._maker.manifest(intent, work.safe[intent.attempt]))
        manifest = await self.repository.publish(intent)
        self._maker.release(intent)
        work.changed = True
        # From here on the set is good; what is left in QEMU is removed now or by any later run.
        await self._tidy(work, monitor, facts, await self.repository.shelf(intent.vm.name), manifest)
        return manifest

    async def _tidy(
        self, work: VmTask, monitor: Monitor | None, facts: Observation, shelf: VmRecords, manifest: Manifest
    ) -> None:
        """Remove what the making of a published set has left in QEMU and beside the set."""
        if monitor and facts.vm:
            await self._remove_leftovers(work, monitor, facts.vm, shelf, manifest.attempt)
        await self.repository.tidy(manifest.vm.name, manifest.id)

    async def _remove_leftovers(
        self, work: VmTask, monitor: Monitor, vm: Vm, shelf: VmRecords, *published: str
    ) -> None:
        """Remove what dead attempts have left in QEMU, and the bitmaps that no set will build on.

        C(published) is an attempt that has come to a good end.
        """
        for attempt in {*published, *await self._leftovers(vm, shelf)}:
            await self._remove_jobs(monitor, vm, attempt)
        try:
            await bitmaps.remove_bitmaps(monitor, await self._surplus(work, vm, shelf))
        except CommandError as error:
            work.warn(f"a bitmap that is needed no more could not be removed: {error}")

    async def _give_up(
        self,
        work: VmTask,
        monitor: Monitor | None,
        facts: Observation,
        intent: Intent,
        error: str,
        state: str = VmState.FAILED,
    ) -> None:
        """An attempt has come to nothing. That is written down before anything is removed."""
        work.changed = True
        failure = Failure(intent.run, intent.attempt, intent.id, state, error, intent.started, utc_now())
        with after(error):
            await self._note(monitor, facts, intent, failure)
            await self._withdraw(monitor, facts, intent)

    async def _note(self, monitor: Monitor | None, facts: Observation, intent: Intent, failure: Failure) -> None:
        try:
            await self.repository.record_failure(intent.vm.name, failure)
        except OSError as full:
            if full.errno not in probe.NO_SPACE:
                raise
            # The images themselves are in the way. QEMU still tells how their jobs have ended.
            await self._stop(monitor, intent.jobs)
            if monitor and facts.vm:
                await block_jobs.close_targets(monitor, facts.vm, self._tag(intent.attempt))
            await self.repository.discard_images(intent)
            self._maker.release(intent)
            await self.repository.record_failure(intent.vm.name, failure)

    async def _withdraw(self, monitor: Monitor | None, facts: Observation, intent: Intent) -> None:
        """Remove every trace of an attempt, in QEMU first."""
        if monitor and facts.vm:
            # One that stands still for another reason only tries its write again, and stops again.
            blamed = any(job.error or not job.ended for job in _jobs_of(intent, facts.vm))
            await self._remove_jobs(monitor, facts.vm, intent.attempt)
            await bitmaps.remove_bitmaps(monitor, _bitmaps(facts.vm, intent.bitmaps))
            if blamed and intent.guest != IO_ERROR:
                await block_jobs.resume(monitor)
        elif self._is_ours(intent) and intent.attempt not in facts.dead | facts.doubtful:
            raise BackupError(f"{facts.error}; the set is unfinished: run the backup again to clean up")
        # NFS renames what is unlinked while it is open, and then the directory is not empty.
        self._maker.release(intent)
        await self.repository.discard(intent)

    def _is_ours(self, intent: Intent) -> bool:
        return intent.hypervisor.is_same(self._hypervisor)

    async def _remove(
        self, work: VmTask, monitor: Monitor | None, facts: Observation, intent: Intent, removal: str
    ) -> AttemptState:
        """Put an end to a set that is not to be finished: superseded by ours, or left behind by others."""
        work.warn(f"the unfinished set {intent.id} was removed: {removal}")
        await self._give_up(
            work, monitor, facts, intent, removal, VmState.CANCELLED if self._is_ours(intent) else VmState.FAILED
        )
        return attempt_state.AttemptState(AttemptStatus.INTERRUPTED)

    async def _stop(self, monitor: Monitor | None, jobs: Iterable[str]) -> None:
        stubborn = await block_jobs.cancel_jobs(monitor, jobs) if monitor else ()
        if stubborn:
            names = ", ".join(job.id for job in stubborn)
            raise JobFailed(
                f"job {names} does not end after block-job-cancel: its target hangs. Bring the target back; the next"
                " run removes what is left"
            )

    async def _remove_jobs(self, monitor: Monitor, vm: Vm, attempt: str) -> None:
        """Remove the jobs of an attempt, and the files that were handed over for it."""
        tag = self._tag(attempt)
        jobs = [job for job in vm.jobs if job.id.startswith(f"vmfleet.{self.repository.tag}.{attempt}.")]
        running = [job.id for job in jobs if not job.ended]
        if running:
            await self._stop(monitor, running)
        await block_jobs.close_targets(monitor, vm, tag)
        await block_jobs.dismiss_jobs(monitor, (job.id for job in jobs))
        await block_jobs.remove_fdsets(monitor, vm, tag)

    def _tag(self, attempt: str = "") -> str:
        """What the tags of this repository's fdsets begin with, or those of an attempt."""
        return f"{block_jobs.TAG}{self.repository.tag}:" + (f"{attempt}:" if attempt else "")

    async def _clear(self, work: VmTask, monitor: Monitor, vm: Vm, shelf: VmRecords) -> None:
        """Before a start: nothing of this repository may be left on the VM but what the next set may build on."""
        other = await self._under_another_name(vm, shelf)
        if other:
            raise BackupError(other)
        for attempt in await self._leftovers(vm, shelf):
            await self._remove_jobs(monitor, vm, attempt)
        await bitmaps.remove_bitmaps(monitor, await self._surplus(work, vm, shelf))

    def _unknown(self, vm: Vm, shelf: VmRecords) -> set[str]:
        """The attempts of this repository that QEMU knows and no intent under this VM's name does."""
        known = {job.id.split(".")[2] for job in vm.jobs if job.id.startswith(f"vmfleet.{self.repository.tag}.")}
        for opaques in vm.fdsets.values():
            known |= {tag.split(":")[2] for tag in opaques if tag.startswith(self._tag())}
        nodes = block_jobs.target_nodes(self._tag())
        known |= {name.split(".")[2] for name in vm.target_nodes if name.startswith(nodes)}
        return known - {intent.attempt for intent in shelf.intents}

    async def _elsewhere(self, vm: Vm, shelf: VmRecords) -> dict[str, Intent]:
        """The intents under other names of which QEMU knows, by attempt."""
        unknown = self._unknown(vm, shelf)
        found = await self.repository.intents() if unknown else ()
        return {intent.attempt: intent for intent in found if intent.attempt in unknown}

    async def _under_another_name(self, vm: Vm, shelf: VmRecords) -> str:
        """What is wrong with a VM that is being backed up under two names; empty where it has one only."""
        for other in (await self._elsewhere(vm, shelf)).values():
            return f"the same VM is being backed up under the name {other.vm.name} (set {other.id}); give it one name"
        return ""

    async def _leftovers(self, vm: Vm, shelf: VmRecords) -> set[str]:
        """The attempts of this repository that QEMU knows and no intent does."""
        return self._unknown(vm, shelf) - (await self._elsewhere(vm, shelf)).keys()

    async def _is_lost(self, facts: Observation, shelf: VmRecords) -> bool:
        """Whether a set that this VM's jobs are making is somebody else's by now: nobody but us can stop them."""
        return bool(facts.vm and await self._leftovers(facts.vm, shelf))

    async def _surplus(self, work: VmTask, vm: Vm, shelf: VmRecords) -> list[tuple[str, str]]:
        """This repository's bitmaps on a VM that no set will build on, as node and name."""
        if await self._elsewhere(vm, shelf):
            return []
        keep = chain.bitmaps_to_keep(shelf.sets, work.request.wanted == Level.DIFFERENTIAL)
        keep = keep.union(*(intent.bitmaps for intent in shelf.intents))
        return [(node, name) for node, name in self._own_bitmaps(vm) if name not in keep]

    def _own_bitmaps(self, vm: Vm) -> list[tuple[str, str]]:
        prefix = bitmap_prefix(self.repository)
        return [(node, name) for node, name in _removable_bitmaps(vm) if name.startswith(prefix)]

    # A repository that hangs

    async def _abandon(self, work: VmTask, reason: str) -> Outcome:
        """Free the guest of copies into a repository that does not answer; nothing there can be touched."""
        intent = work.followed
        if intent is None:
            return self._outcome(work, VmState.FAILED, error=reason)
        try:
            async with Monitor(parse_address(intent.monitor), self.commands) as monitor:
                fate = await self._cancel_hanging(monitor, intent)
                if intent.guest != IO_ERROR:
                    await block_jobs.resume(monitor)
            work.changed = True
        except BackupError as error:
            # Why the repository cannot be used is still the first thing to be told.
            fate = f"its jobs could not be cancelled: {error}"
        return self._outcome(work, VmState.FAILED, error=f"{reason}; {fate}. Run the backup again when it is back")

    async def _cancel_hanging(self, monitor: Monitor, intent: Intent) -> str:
        """Cancel jobs whose target hangs; returns what has become of them.

        One that waits for its target ends when that is back. One that rests would end now, and QEMU would close its
        image: that stops QEMU, and the guest with it, until the target is back. It is better left alone.
        """
        jobs = [job for job in await query_jobs(monitor) if job.id in intent.jobs and not job.ended]
        if not jobs:
            return "none of its jobs runs"
        slow = PIECE / probe.TIMEOUT
        resting = [job for job in jobs if job.paused or 0 < job.speed < slow]
        stubborn = await block_jobs.cancel_jobs(monitor, (job.id for job in jobs if job not in resting))
        if resting:
            return "its jobs are so slow, or paused, that they are left to the next run"
        return "its jobs were cancelled, but do not end before that" if stubborn else "its jobs were cancelled"

    # Cancel

    async def _cancel(self, work: VmTask) -> Outcome:
        """Stop the set that is being made, and remember that somebody wanted it so."""
        shelf = await self.repository.shelf(work.request.name)
        wanted = [intent for intent in shelf.intents if self.plan.id in ("", intent.id)]
        if not wanted:
            manifest = shelf.published(self.plan.id)
            if manifest:
                return self._published(work, manifest)
            await self._sweep(work.request.name)
            return self._outcome(work, VmState.SKIPPED, reason="no set is being made")
        foreign = [intent for intent in wanted if not self._is_ours(intent)]
        if foreign:
            error = f"set {foreign[0].id} is being made by hypervisor {foreign[0].hypervisor.name}; cancel it there"
            return self._outcome(work, VmState.FAILED, error=error)
        work.changed = True
        if not self.settings.check_mode:
            work.planned = replace(work.planned, monitor=wanted[0].monitor)
            work.followed = wanted[0]
            async with AsyncExitStack() as stack:
                monitor, facts, shelf = await self._take_hold(stack, work)
                doubtful = [intent for intent in wanted if intent.attempt in facts.doubtful]
                if doubtful:
                    error = f"{decide.in_doubt(doubtful[0])}, and cancel it there"
                    return self._outcome(work, VmState.FAILED, error=error)
                for intent in shelf.intents:
                    if intent.id in [other.id for other in wanted]:
                        thawed = await self._thaw(work, intent, facts)
                        await self._give_up(work, monitor, facts, thawed, "cancelled on request", VmState.CANCELLED)
        return self._outcome(work, VmState.CANCELLED, reason="cancelled on request")

    async def _sweep(self, name: str) -> None:
        """Remove what is left of a set whose intent is gone already: a process was killed while it cancelled."""
        if await self.repository.untidy(name, self.plan.id) and not self.settings.check_mode:
            async with self.repository.lock(name):
                await self.repository.tidy(name, self.plan.id)

    async def _take_hold(self, stack: AsyncExitStack, work: VmTask) -> tuple[Monitor | None, Observation, VmRecords]:
        """The VM's locks, its monitor where there is a VM, and a look at it with these in hand."""
        address = parse_address(work.request.monitor)
        facts, _shelf = await self._look(work)
        await stack.enter_async_context(locked(host_lock_path(facts.process, address), f"VM {work.request.name}"))
        await stack.enter_async_context(self.repository.lock(work.request.name))
        if facts.vm is None:
            return (None, *await self._on_shelf(work, facts))
        monitor = await stack.enter_async_context(Monitor(address, self.commands))
        return (monitor, *await self._look(work, monitor))

    # No tracking any more

    async def _untrack(self, work: VmTask) -> Outcome:
        """Remove all bitmaps of this repository from a VM: its next sets are full ones."""
        if not work.request.monitor:
            return self._outcome(work, VmState.SKIPPED, reason="this hypervisor has made no set of it here")
        error, found = await self._tracked(work, *await self._look(work))
        if found and not error and not self.settings.check_mode:
            async with AsyncExitStack() as stack:
                monitor, facts, shelf = await self._take_hold(stack, work)
                error, found = await self._tracked(work, facts, shelf)
                if monitor and not error:
                    await bitmaps.remove_bitmaps(monitor, found)
        if error:
            return self._outcome(work, VmState.FAILED, error=error)
        work.changed = bool(found)
        reason = (
            f"{len(found)} bitmaps removed; the next set is a full one"
            if found
            else "it has no bitmaps of this repository"
        )
        return self._outcome(work, VmState.UNTRACKED, reason=reason)

    async def _tracked(self, work: VmTask, facts: Observation, shelf: VmRecords) -> tuple[str, list[tuple[str, str]]]:
        """Why the bitmaps of a VM cannot be removed now, and where they are, as node and name."""
        if shelf.intents:
            return f"set {shelf.intents[0].id} is being made; wait for its end, or cancel it", []
        if facts.vm is None:
            return facts.error, []
        expected = work.planned.identity
        if expected and facts.vm.identity != expected:
            return f"another VM is behind {work.request.monitor} now ({facts.vm.identity}; it was {expected})", []
        return await self._under_another_name(facts.vm, shelf), self._own_bitmaps(facts.vm)


def _bitmaps(vm: Vm, names: frozenset[str]) -> list[tuple[str, str]]:
    """Where these bitmaps are, as node and name."""
    return [(node, name) for node, name in _removable_bitmaps(vm) if name in names]


def _removable_bitmaps(vm: Vm) -> list[tuple[str, str]]:
    """Return the bitmaps that QEMU would remove, as node and name.

    A disk that has become another's backing file is read-only: what is stored in it is out of reach, and right again
    if it comes back. What is in memory only can be removed there too.
    """
    layers = {name for disk in vm.disks for name in disk.layers}
    return [
        (disk.node, bitmap.name)
        for disk in (*vm.disks, *vm.other_nodes)
        for bitmap in disk.bitmaps
        if (disk in vm.disks and not disk.read_only) or (disk.node in layers and not bitmap.persistent)
    ]


def _jobs_of(intent: Intent, vm: Vm | None) -> list[Job]:
    return [job for job in vm.jobs if job.id in intent.jobs] if vm else []
