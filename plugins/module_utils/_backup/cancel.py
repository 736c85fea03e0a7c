# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Cancel sets that are being made, and remove the bitmaps of a repository from VMs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._host.process import this_machine
from .._plan import decide
from .._plan.model import Action, Plan, Policy, VmPlan
from .._plan.observe import space_in
from .._repository.documents import Hypervisor
from .._repository.vm_names import unknown_vms, vm_names
from . import cleanup, results
from .outcome import VmState
from .session import hold_now, observe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._common.selection import Selection
    from .._repository.documents import Intent, Manifest
    from .._repository.repository import Repository, VmRecords
    from .outcome import Outcome
    from .run import BackupRun
    from .session import VmSession, VmTask


def plan_of_names(repository: Repository, selection: Selection) -> Plan:
    """Return a plan for the states cancelled and untracked: what the repository knows of the VMs that are chosen.

    Without names it is for those whose sets this hypervisor is making. Refused where it knows nothing of one of them.
    """
    policy = Policy()
    here = Hypervisor(*this_machine())

    def making() -> list[str]:
        return sorted(intent.vm.name for intent in repository.intents() if intent.hypervisor.is_same(here))

    names = selection.spelled_out(making if selection.names is None else lambda: vm_names(repository))
    unknown = [name for name in names if not repository.has(name)]
    if unknown:
        raise unknown_vms(unknown, vm_names(repository), repository.path)
    vms = tuple(_last_seen(name, repository.records(name), here) for name in dict.fromkeys(names))
    return Plan(repository.path, False, "", "", policy, space_in(repository, policy), vms)


def _last_seen(name: str, records: VmRecords, here: Hypervisor) -> VmPlan:
    """Return where the VM's newest set was taken, or is being made; no monitor where that is on another hypervisor."""
    found: list[Manifest | Intent] = [*records.sets, *records.intents]
    maker = found[-1].hypervisor if found else None
    if maker and maker.is_same(here):
        return VmPlan(name, found[-1].monitor, Action.ATTACH, "", found[-1].vm.identity)
    return VmPlan(name, "", Action.ATTACH, "")


async def cancel(run: BackupRun, task: VmTask) -> Outcome:
    """Stop the set that is being made, and remember that somebody wanted it so."""
    records = await run.repository.records(task.name)
    wanted = [intent for intent in records.intents if run.plan.id in ("", intent.id)]
    if not wanted:
        manifest = records.published(run.plan.id)
        if manifest:
            return results.published(run, task, manifest)
        if records.barred:
            return results.outcome(run, task, VmState.FAILED, error=records.barred)
        await _sweep(run, task.name)
        return results.outcome(run, task, VmState.SKIPPED, reason="no set is being made")
    foreign = [intent for intent in wanted if not run.is_ours(intent)]
    if foreign:
        error = f"set {foreign[0].id} is being made by hypervisor {foreign[0].hypervisor.name}; cancel it there"
        return results.outcome(run, task, VmState.FAILED, error=error)
    task.changed = True
    if not run.settings.check_mode:
        error = await _cancel_attempts(run, task, wanted)
        if error:
            return results.outcome(run, task, VmState.FAILED, error=error)
    return results.outcome(run, task, VmState.CANCELLED, reason="cancelled on request")


async def _cancel_attempts(run: BackupRun, task: VmTask, wanted: Sequence[Intent]) -> str:
    """Put an end to the attempts at these sets that are still there; return why that cannot be done, if so."""
    task.planned = replace(task.planned, monitor=wanted[0].monitor)
    task.last_attempt = wanted[0]
    async with hold_now(await observe(run, task)) as locked:
        doubtful = [intent for intent in wanted if intent.attempt in locked.seen.doubtful]
        if doubtful:
            return f"{decide.in_doubt(doubtful[0])}, and cancel it there"
        for intent in locked.records.intents:
            if intent.id in [other.id for other in wanted]:
                await cleanup.thaw(locked, intent)
                await cleanup.fail_attempt(locked, intent, "cancelled on request", VmState.CANCELLED)
    return ""


async def _sweep(run: BackupRun, name: str) -> None:
    """Remove what is left of a set whose intent is gone already: a process was killed while it cancelled."""
    if await run.repository.untidy(name, run.plan.id) and not run.settings.check_mode:
        async with run.repository.lock(name):
            await run.repository.tidy(name, run.plan.id)


async def untrack(run: BackupRun, task: VmTask) -> Outcome:
    """Remove all bitmaps of this repository from a VM: its next sets are full ones."""
    if not task.request.monitor:
        return results.outcome(run, task, VmState.SKIPPED, reason="this hypervisor has made no set of it here")
    session = await observe(run, task)
    error, found = await _tracked(session)
    if found and not error and not run.settings.check_mode:
        async with hold_now(session) as locked:
            error, found = await _tracked(locked)
            if not error:
                await cleanup.remove_bitmaps(locked, found)
    if error:
        return results.outcome(run, task, VmState.FAILED, error=error)
    task.changed = bool(found)
    reason = (
        f"{len(found)} bitmaps removed; the next set is a full one" if found else "it has no bitmaps of this repository"
    )
    return results.outcome(run, task, VmState.UNTRACKED, reason=reason)


async def _tracked(session: VmSession) -> tuple[str, list[tuple[str, str]]]:
    """Return why the bitmaps of a VM cannot be removed now, and where they are, as node and name."""
    vm, records, planned = session.seen.vm, session.records, session.task.planned
    if records.intents:
        return f"set {records.intents[0].id} is being made; wait for its end, or cancel it", []
    if records.barred:
        return records.barred, []
    if vm is None:
        return session.seen.error, []
    if planned.identity and vm.identity != planned.identity:
        return f"{planned.monitor} belongs to another VM now ({vm.identity}; it was {planned.identity})", []
    return await cleanup.other_name(session), cleanup.own_bitmaps(session.run, vm)
