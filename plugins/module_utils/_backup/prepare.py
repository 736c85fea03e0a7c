# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Decide on every name of an attempt, claim its id, make its images and take the space that they may need.

Before each step that QEMU sees, the intent says what is going to happen, so that whoever comes after a crash can undo
it: the names of the jobs and bitmaps, the images, the freeze.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._common.errors import AgentError, BackupError
from .._common.formats import Word, boottime, utc_now
from .._host.confinement import set_file_label
from .._host.preallocate import keeps_holes
from .._host.probe import PREFIX
from .._host.process import spaces
from .._plan.disks import written_elsewhere
from .._plan.model import Quiesce
from .._plan.observe import SpaceTracker, measure, no_room
from .._qemu import target_image
from .._qemu.agent_channel import find_agent
from .._qemu.tpm import renewed
from .._qemu.vm_config import describe_vm
from .._repository.documents import DiskImage, Intent, Level, StagedDisk, VmName
from .._repository.staging import opened

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .._plan.disks import ChainLink
    from .._plan.model import Decision, DiskPlan, Request
    from .._qemu.image_layout import ImageLayout
    from .._qemu.model import Disk, Vm
    from .._qemu.monitor import Monitor
    from .run import BackupRun
    from .session import LockedVm


class Consistency(Word):
    """What a set holds of the guest: what a power failure leaves, or file systems at rest."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"


WAS_OFF = "the VM was off: its file systems are as they were when it stopped"
NOT_ASKED = "the run that made the set did not ask to freeze the guest"


@dataclass(frozen=True)
class AttemptDraft:
    """An attempt before anything of it exists. C(description) is what vm.json will say."""

    intent: Intent
    disks: tuple[Disk, ...]
    links: tuple[ChainLink, ...]
    description: dict[str, Any]


async def draft_attempt(
    run: BackupRun, monitor: Monitor | None, request: Request, vm: Vm, decision: Decision
) -> AttemptDraft:
    """Decide on every name. Raises BackupError where the guest must be frozen and cannot be.

    A VM without a C(monitor) is off, and is not described here.
    """
    agent, reason = await _agent(monitor, request, vm)
    attempt = secrets.token_hex(6)
    begun = boottime()
    disks = tuple(
        StagedDisk(
            image=_image(run, vm, disk, planned, link),
            job="" if link.unchanged else f"vmfleet.{run.repository.tag}.{attempt}.{number}",
            expected=0,
        )
        for number, (disk, planned, link) in enumerate(zip(decision.choice.disks, decision.plan.disks, decision.links))
    )
    timeout = run.settings.time_for(vm)
    intent = Intent(
        run=run.plan.run,
        attempt=attempt,
        id=run.plan.id,
        vm=VmName(request.name, vm.identity, vm.uuid),
        hypervisor=run.context.hypervisor,
        monitor=request.monitor,
        libvirt_uri=request.libvirt_uri,
        process=(vm.process.pid, vm.process.start) if vm.process else (),
        level=decision.plan.level,
        consistency=Consistency.CRASH,
        # Until it is known better.
        consistency_reason=reason
        or "the process was killed before it could see that its jobs had started in a frozen guest",
        qemu=vm.version,
        guest=vm.status,
        started=utc_now(),
        begun=begun,
        deadline=begun + timeout if timeout else None,
        checksum=run.plan.policy.checksum,
        disks=disks,
        agent=agent,
        spaces=spaces(),
    )
    description = await describe_vm(monitor, vm) if monitor else {}
    return AttemptDraft(intent, decision.choice.disks, decision.links, description)


async def _agent(monitor: Monitor | None, request: Request, vm: Vm) -> tuple[str, str]:
    """Return the socket of an agent that can freeze, or why the set will be crash-consistent only."""
    if monitor is None:
        # Nothing writes: there is nothing to freeze, whatever is asked for.
        return "", WAS_OFF
    if request.quiesce == Quiesce.NONE:
        return "", NOT_ASKED
    try:
        return await _find_agent(monitor, request, vm), ""
    except AgentError as error:
        if request.quiesce == Quiesce.REQUIRE:
            raise BackupError(f"VM {request.name}: quiesce: {error}") from error
        return "", str(error)


async def _find_agent(monitor: Monitor, request: Request, vm: Vm) -> str:
    if vm.status != "running":
        raise AgentError(f"the VM does not run ({vm.status}), and so its guest agent does not either")
    socket = request.agent
    if not socket:
        found = await find_agent(monitor)
        if not found or not found["socket"]:
            raise AgentError("the VM has no channel for a guest agent (org.qemu.guest_agent.0); add one")
        if not found["connected"]:
            raise AgentError("no agent has opened its channel; install and start qemu-guest-agent in the guest")
        socket = found["socket"]
    # Not where no guest is to be frozen: what is loaded is compiled first.
    from .._qemu import guest_freeze  # noqa: PLC0415

    await guest_freeze.check(guest_freeze.AgentPlace(socket, request.libvirt_uri))
    return socket


def _image(run: BackupRun, vm: Vm, disk: Disk, planned: DiskPlan, link: ChainLink) -> DiskImage:
    """Return what the manifest will say of a disk, as far as it is known."""
    policy = run.plan.policy
    tracked = policy.tracking and disk.stable_name and not disk.read_only
    # A record with gaps would look whole as soon as the other disk has gone.
    tracked = tracked and not written_elsewhere(disk, vm.disks)
    # One in memory would end with the storage daemon.
    tracked = tracked and (disk.keeps_bitmaps or not vm.is_off)
    bitmap = f"{run.bitmap_prefix}{secrets.token_hex(8)}" if tracked else None
    return DiskImage(
        name=disk.name,
        node=disk.node,
        qdev=disk.qdev,
        source=disk.filename,
        source_format=disk.driver,
        virtual_size=disk.virtual_size,
        level=link.level,
        reason=link.reason,
        parent=link.parent,
        image=planned.target,
        format="qcow2",
        compression=policy.compression,
        # Where nothing has changed, the record since the image below is that since this one.
        bitmap=link.bitmap if link.unchanged else bitmap,
        layers=tuple(layer.filename for layer in vm.chain(disk)[1:]),
        source_encrypted=disk.encrypted,
    )


async def prepare_attempt(locked: LockedVm, draft: AttemptDraft) -> Intent:
    """Claim the id, make the images, and take the space that they may need."""
    run, intent = locked.run, draft.intent
    repository, shared = run.repository, run.preparation
    layouts = await _lay_out(locked, draft)
    # One VM after the other: each must see what those before it have taken.
    async with shared.gate:
        expected = await measure(draft.disks, draft.links, locked.task.planned.disks)
        for name, layout in layouts.items():
            expected[name] = max(expected[name], layout.length)
        if shared.space is None:
            shared.space = await repository.run(SpaceTracker, run.plan.policy)
        space = await repository.calls.run(shared.space.space, intent.vm.name)
        if sum(expected.values()) > max(space.usable, 0):
            raise BackupError(no_room(sum(expected.values()), space, space.usable))
        disks = tuple(replace(disk, expected=expected[disk.image.name]) for disk in intent.disks)
        intent = replace(intent, disks=disks)
        try:
            await repository.begin(intent)
        except FileExistsError:
            raise BackupError(f"VM {intent.vm.name}: another process has begun set {intent.id}") from None
        shared.space.note(intent)
        await repository.write_description(intent, draft.description)
        intent = await _make_images(locked, intent, draft.links, layouts)
        await repository.update(intent)
    return intent


async def _lay_out(locked: LockedVm, draft: AttemptDraft) -> dict[str, ImageLayout]:
    """Return how full images are laid out whose clusters are known before the copy, by disk.

    In an image that is compressed QEMU has to choose the place of each cluster.
    """
    run, vm = locked.run, locked.seen.vm
    full = [disk for disk, link in zip(draft.disks, draft.links) if link.level == Level.FULL]
    if not full or not vm or run.plan.policy.compression != "none":
        return {}
    if not await run.repository.calls.run(keeps_holes, run.repository.path, PREFIX):
        return {}
    # Not for increments: what is loaded is compiled first.
    from .._qemu.data_map import lay_out  # noqa: PLC0415

    layouts = await asyncio.gather(*(lay_out(vm.chain(disk)) for disk in full))
    return {disk.name: layout for disk, layout in zip(full, layouts) if layout}


async def _make_images(
    locked: LockedVm, intent: Intent, links: Sequence[ChainLink], layouts: dict[str, ImageLayout]
) -> Intent:
    run, admission = locked.run, locked.seen.admission
    calls = run.repository.calls
    blanks = run.preparation.blanks
    grown = []
    reserved = True
    staging = await run.repository.run(opened, intent)
    try:
        for disk, link in zip(intent.disks, links):
            target = replace(target_of(run, intent, disk), layout=layouts.get(disk.image.name))
            fd = await target_image.create(target, link.backing, (locked.lock,), blanks, calls, staging)
            inode = await calls.run(run.images.keep, target.path, fd, target.direct)
            if admission.label:
                await calls.run(set_file_label, target.path, admission.label, fd)
            reserved = await calls.run(target_image.reserve, replace(target, fd=fd)) and reserved
            grown.append(replace(disk, inode=inode, label=admission.former_label))
    finally:
        calls.close(staging.fd)
    if not reserved and not run.watched:
        raise BackupError(
            f"{run.repository.path} cannot reserve space. If it becomes full while no module watches, the writes of"
            " the guest fail. Use state: completed, or allow this with unattended: true"
        )
    return replace(intent, disks=tuple(grown), reserved=reserved)


async def renew_description(run: BackupRun, intent: Intent, draft: AttemptDraft) -> None:
    """Write down the state of the TPM once more where it has changed before the jobs were started.

    Where it has not, what is written already is the state of that moment.
    """
    newer = await renewed(draft.description)
    if newer:
        await run.repository.write_description(intent, newer)


def target_of(run: BackupRun, intent: Intent, disk: StagedDisk) -> target_image.Target:
    """Return what the job of a disk writes to."""
    path = run.repository.image_path(intent, disk.image.image)
    return target_image.Target(
        path=path,
        format=disk.image.format,
        size=disk.image.virtual_size,
        expected=disk.expected,
        compress=disk.image.compression != "none",
        compression_type=disk.image.compression,
        fd=run.images.fd(path),
    )
