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
from .._repository.documents import Hypervisor, Phase
from .._repository.vm_names import unknown_vms, vm_names
from . import cleanup, results
from .outcome import VmState
from .session import hold_now, observe

if TYPE_CHECKING:
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
        uri = found[-1].libvirt_uri
        return VmPlan(name, found[-1].monitor, Action.ATTACH, "", found[-1].vm.identity, libvirt_uri=uri)
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
    if run.settings.check_mode:
        task.changed = True
        return results.outcome(run, task, VmState.CANCELLED, reason="cancelled on request")
    for intent in wanted:
        error = await _cancel_attempt(run, task, intent)
        if error:
            return results.outcome(run, task, VmState.FAILED, error=error)
    return results.outcome(run, task, VmState.CANCELLED, reason="cancelled on request")


async def _cancel_attempt(run: BackupRun, task: VmTask, wanted: Intent) -> str:
    """Put an end to an attempt that is still there; return why that cannot be done, if so."""
    uri = wanted.libvirt_uri or task.planned.libvirt_uri
    task.planned = replace(task.planned, monitor=wanted.monitor, libvirt_uri=uri)
    task.last_attempt = wanted
    async with hold_now(await observe(run, task)) as locked:
        for intent in locked.records.intents:
            if intent.id != wanted.id:
                continue
            error = _not_its_vm(locked, intent)
            # One that is copied has no jobs any more, which could copy on.
            if error and intent.phase != Phase.COPIED:
                return error
            # The guest of another VM may be frozen by others.
            if not error:
                await cleanup.thaw(locked, intent)
            await cleanup.fail_attempt(locked, intent, "cancelled on request", VmState.CANCELLED)
    return ""


def _not_its_vm(session: VmSession, intent: Intent) -> str:
    """Return why an attempt cannot be cancelled by what answers: its jobs would copy on, into images that are gone."""
    if intent.attempt in session.seen.doubtful:
        return f"{decide.in_doubt(intent)}, and cancel it there"
    foreign = decide.foreign(intent, session.seen, session.run.context.hypervisor)
    if not foreign:
        return ""
    return (
        f"{foreign}, and another VM answers at {session.address} now. This set is not cancelled: repeat this when its"
        " VM answers there. If nobody makes the set any more, the next backup removes it with takeover: true"
    )


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
    unknown = _of_some_libvirt(planned)
    if vm is None:
        return f"{session.seen.error}{unknown}", []
    if planned.identity and vm.identity != planned.identity:
        other = f"{planned.monitor} belongs to another VM now ({vm.identity}; it was {planned.identity})"
        return f"{other}{unknown}", []
    return await cleanup.other_name(session), cleanup.own_bitmaps(session.run, vm)


def _of_some_libvirt(planned: VmPlan) -> str:
    """Return what is to be given where nobody has written down of which libvirt a domain is."""
    if planned.libvirt_uri or not planned.request.address.domain:
        return ""
    return (
        ". Its sets do not say of which libvirt it is: give a plan instead of names, which backup_plan has made with"
        " libvirt_uri"
    )
