# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Draw up the plan of a hypervisor."""

from __future__ import annotations

import asyncio
import secrets
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, RepositoryHangs, in_words, internal
from .._common.formats import human
from .._common.selection import EVERYTHING
from .._host.process import this_machine
from .._qemu.losses import lost_in_copy
from .._qemu.tpm import tpm_warnings
from .._repository.documents import Hypervisor
from .._repository.names import column
from . import decide
from .disks import listed_otherwise
from .domain_warnings import domain_warnings
from .model import Action, Plan, RunContext, VmPlan
from .observe import measure, no_room, observe, space_in, with_records
from .old_names import OldNames
from .requests import known_name, reached_once, with_new_name, with_policy
from .speed_warnings import speed_warnings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .._common.selection import Selection
    from .._qemu.discovery import Discovery
    from .._qemu.model import Disk, Vm
    from .._repository.access import AsyncRepository
    from .disks import ChainLink
    from .model import Policy, Request, Space


# The whole run


def refuse_duplicates(plans: Iterable[VmPlan], processes: Mapping[str, tuple[int, ...]]) -> tuple[VmPlan, ...]:
    """Refuse VMs of one name, and monitors of one QEMU: nobody knows which of them is meant.

    C(processes) are the QEMUs behind the monitors, as far as they are known.
    """
    checked = tuple(plans)
    names = [plan.name for plan in checked]
    pids = [processes.get(plan.monitor) for plan in checked]
    result = []
    for plan, process in zip(checked, pids):
        if names.count(plan.name) > 1:
            others = ", ".join(other.monitor for other in checked if other.name == plan.name and other is not plan)
            reason = f"another VM is called {plan.name} too ({others}); give one of them another name"
        elif process and pids.count(process) > 1:
            others = ", ".join(
                other.monitor for other, pid in zip(checked, pids) if pid == process and other is not plan
            )
            reason = f"{plan.monitor} belongs to the same QEMU as {others}; name one of the two only"
        else:
            result.append(plan)
            continue
        # Without an identity: nobody is to look whether it goes on after all.
        result.append(replace(plan, action=Action.FAIL, reason=reason, unless="", identity="", disks=()))
    return tuple(result)


def fit_into(space: Space, plans: Iterable[VmPlan]) -> tuple[Space, tuple[VmPlan, ...]]:
    """Let each VM in turn take its part of the space; one for which there is not enough fails, and the others go on.

    One that has an unfinished set does not fail: how much room there is when that set has come to its end, and has
    given back what it does not need, only the start of the new one can tell.
    """
    left = space.usable
    needed = 0
    result = []
    for plan in plans:
        if plan.bytes > max(left, 0):
            refusal = no_room(plan.bytes, space, left)
            if plan.action == Action.FINISH:
                result.append(replace(plan, reason=f"{plan.reason}. For the new set there is {refusal}"))
            else:
                result.append(replace(plan, action=Action.FAIL, reason=refusal))
            continue
        left -= plan.bytes
        needed += plan.bytes
        result.append(plan)
    return replace(space, needed=needed), tuple(result)


def describe(plan: Plan) -> list[str]:
    """Return the plan for people to read."""
    space = plan.space
    created = " (to be created)" if plan.create_repository else ""
    amounts = {
        "needed": space.needed,
        "free": space.free,
        "kept in reserve": space.reserve,
        "promised to other sets": space.promised,
    }
    lines = [
        f"Backup {plan.id} to {plan.repository}{created}",
        "Space: {}".format(", ".join(f"{human(size)} {what}" for what, size in amounts.items())),
    ]
    if not space.reservable:
        lines.append("This file system cannot reserve space for a copy: the reserve counts twice.")
    lines += [f"Warning: {warning}" for warning in plan.warnings]
    width = column(vm.name for vm in plan.vms)
    for vm in plan.vms:
        lines.append(f"{vm.action:6}  {vm.name:{width}}  {vm.reason}")
        if vm.action in (Action.START, Action.ATTACH, Action.FINISH):
            indent = " " * (6 + 2 + width + 2)
            lines += [
                f"{indent}{disk.name}: {disk.level}, about {human(disk.bytes)}: {disk.reason}" for disk in vm.disks
            ]
            lines += [f"{indent}{drive.name}: left out, {drive.reason}" for drive in vm.left_out]
    return lines


AT_ONCE = 32
"""How many VMs are asked at the same time."""


async def draw_up(
    repository: AsyncRepository,
    requests: Sequence[Request],
    found: Discovery,
    set_id: str,
    policy: Policy,
    orders: Mapping[str, bool] | None = None,
    selection: Selection = EVERYTHING,
) -> tuple[Plan, list[str]]:
    """Draw up the plan for the VMs that are chosen: every one of them is in it, whatever its state.

    C(found) is what libvirt knows of them. C(orders) are takeover, supersede and adopt, as RunContext has them. Return
    the names that stand for no VM, too.
    """
    known = [name for name in map(known_name, requests) if name]
    requests = [one for one in requests if not known_name(one) or selection.takes(known_name(one))]
    here = Hypervisor(*this_machine())
    context = RunContext(set_id, secrets.token_hex(8), repository.tag, here, policy, **(orders or {}))
    turns = asyncio.Semaphore(AT_ONCE)
    processes: dict[str, tuple[int, ...]] = {}
    losses: dict[str, tuple[str, ...]] = {}
    defects: list[str] = []
    old_names = OldNames(repository)

    async def plan_vm(request: Request) -> VmPlan:
        named = replace(request, name=request.name or request.address.stem)
        try:
            seen = await observe(request, context)
            request = with_policy(request, found, seen)
            named = replace(request, name=await _name(request, seen.vm, repository))
            if seen.vm and seen.vm.process:
                processes[request.monitor] = (seen.vm.process.pid, seen.vm.process.start)
            seen, records = await repository.run(with_records, seen, named.name, context.hypervisor)
            seen = with_new_name(seen, named, found, records.sets)
            decision = decide.decide(named, seen, records, context)
            if not decision.links:
                # Nothing is to be started, or the VM is off, and only what was begun is to be brought to its end.
                return decision.plan
            copied, links = decision.choice.disks, decision.links
            expected = await measure(copied, links, counted=await count_layers(seen.vm, copied, links))
            disks = tuple(replace(disk, bytes=expected[disk.name]) for disk in decision.plan.disks)
            if seen.vm:
                warned = (
                    *([] if records.sets else await old_names.warnings(seen.vm, named)),
                    *tpm_warnings(seen.vm, request.address.uri),
                    *domain_warnings(seen.vm, copied, decision.choice.left_out, policy.tracking),
                    *listed_otherwise(request.files, seen.vm),
                    *speed_warnings(copied, links, expected, policy.speed),
                )
                losses[request.monitor] = (*lost_in_copy(copied, seen.vm.disks), *warned)
            return replace(decision.plan, disks=disks)
        except RepositoryHangs:
            raise
        except (BackupError, OSError) as error:
            reason = in_words(error)
        except Exception as error:  # noqa: BLE001
            # A defect of ours that shows with one VM is not to take the others along.
            defects.append(f"{request.monitor}: {traceback.format_exc()}")
            reason = internal(error)
        return VmPlan(named.name, named.monitor, Action.FAIL, reason, libvirt_uri=named.libvirt_uri)

    async def in_turn(request: Request) -> VmPlan:
        async with turns:
            return await plan_vm(request)

    drawn = await asyncio.gather(*(in_turn(request) for request in requests))
    plans = refuse_duplicates(reached_once(requests, drawn, processes), processes)
    known += [plan.name for plan in plans]
    plans = tuple(plan for plan in plans if selection.takes(plan.name))
    space, plans = fit_into(await repository.run(space_in, policy), plans)
    copied = [plan for plan in plans if plan.action in (Action.START, Action.FINISH)]
    said = [f"VM {plan.name}: {loss}" for plan in copied for loss in losses.get(plan.monitor, ())]
    plan = Plan(
        repository=repository.path,
        create_repository=not repository.uuid,
        run=context.run,
        id=set_id,
        policy=policy,
        space=space,
        vms=plans,
        warnings=(*found.warnings, *said, *defects),
    )
    return plan, selection.unknown(known)


async def count_layers(vm: Vm | None, disks: Iterable[Disk], links: Iterable[ChainLink]) -> dict[str, int | None]:
    """Return the bytes that the layers of each disk hold that is copied in full, where their tables tell it."""
    counted = {}
    for disk, link in zip(disks, links):
        chain = vm.chain(disk) if vm and disk.layers and not link.bitmap else ()
        # What a layer of which QEMU tells nothing may hold, the others do not tell.
        if len(chain) == 1 + len(disk.layers):
            # Most disks have one layer: for them it need not be loaded, and compiled.
            from .._qemu.layer_tables import held_bytes  # noqa: PLC0415

            counted[disk.name] = await held_bytes(chain)
    return counted


async def _name(request: Request, vm: Vm | None, repository: AsyncRepository) -> str:
    """Return what a VM is called; one that is off can only be known by a set that it was making, or by its monitor."""
    if request.name or vm is not None:
        return request.name or (vm.name if vm else "")
    place = (request.monitor, request.libvirt_uri)
    making = [one.vm.name for one in await repository.intents() if (one.monitor, one.libvirt_uri) == place]
    return making[0] if making else request.address.stem
