# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start the backup jobs of all disks of a VM in one transaction, with the guest frozen where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import AgentError, BackupError, after
from .._host import preallocate
from .._plan.decide import busy_with
from .._plan.model import Quiesce
from .._qemu import block_jobs
from .._qemu.bitmaps import bitmap_add, bitmap_merge
from .._qemu.jobs import query_jobs, query_lengths
from .._qemu.model import OFF, moved_nodes
from .._qemu.query import query_disks
from .._repository.documents import Phase
from .prepare import Consistency, target_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .._plan.disks import ChainLink
    from .._plan.model import Policy
    from .._qemu.model import Disk
    from .._qemu.monitor import Monitor
    from .._repository.documents import DiskImage, Intent
    from .prepare import AttemptDraft
    from .run import BackupRun
    from .session import LockedVm


class DisksMoved(BackupError):
    """A guest writes elsewhere than to what is copied: the copies of its disks are not of one moment."""


async def launch(locked: LockedVm, monitor: Monitor, draft: AttemptDraft, intent: Intent, speed: int) -> Intent:
    """Start all jobs of an attempt that is prepared. C(speed) is bytes/s for each job, 0 for no limit."""
    run = locked.run
    copied = [each for each in zip(draft.disks, intent.disks, draft.links) if each[1].job]
    starts = [
        block_jobs.BackupStart(
            job_id=disk.job,
            node=disk.image.node,
            target=target_of(run, intent, disk),
            opaque=f"{run.fdset_tag(intent.attempt)}{number}",
            arguments=_arguments(run.plan.policy, link, _record(disk.image, link), speed),
            calls=run.repository.calls,
            place=run.repository.path,
        )
        for number, (_source, disk, link) in enumerate(copied)
    ]
    bitmaps = [
        action for source, disk, link in copied for action in _bitmap_actions(source, disk.image, link, intent.guest)
    ]
    # Since the look at the VM, other VMs may have been waited for, and the data of its disks looked for.
    await _refuse_busy(run, monitor)
    if intent.agent:
        intent = await _start_frozen(run, monitor, intent, starts, bitmaps, locked.task.request.quiesce)
    else:
        await block_jobs.start_backups(monitor, starts, "individual", bitmaps)
    # Nobody but us changes the nodes of a storage daemon, nor writes to what it has open.
    if not monitor.address.daemon:
        await _check_moment(locked, monitor, intent)
    intent = replace(intent, phase=Phase.COPYING)
    await run.repository.update(intent)
    return await _top_up(run, monitor, draft, intent)


async def _refuse_busy(run: BackupRun, monitor: Monitor) -> None:
    """Raise BackupError where somebody else has started a job: no guest is to find out what QEMU does with two."""
    busy = busy_with(await query_jobs(monitor), run.repository.tag)
    if busy:
        raise BackupError(busy)


async def _check_moment(locked: LockedVm, monitor: Monitor, intent: Intent) -> None:
    """Raise DisksMoved where a disk was taken from under a guest after the look: by an external snapshot, say.

    What the guest has written since then is not in the copy of this disk, and may be in that of another.
    """
    before = locked.seen.vm.disks if locked.seen.vm else ()
    images = [disk.image for disk in intent.disks]
    nodes = moved_nodes(((image.node, image.qdev) for image in images), before, await query_disks(monitor))
    moved = ", ".join(image.name for image in images if image.node in nodes)
    if moved:
        # What has become of the guest since it was to be frozen.
        await locked.run.repository.update(intent)
        raise DisksMoved(
            f"disk {moved} got another image on top, or was detached, at the moment when the copies were started"
            " (virsh snapshot-create, virsh detach-disk). So the copies are not of one moment"
        )


async def _start_frozen(
    run: BackupRun,
    monitor: Monitor,
    intent: Intent,
    starts: Sequence[block_jobs.BackupStart],
    bitmaps: Sequence[dict[str, Any]],
    quiesce: str,
) -> Intent:
    """Start the jobs while the guest is frozen. The intent says so before."""
    # Loaded only where a guest is to be frozen, and then before that, with all that its guard needs.
    from .._qemu import guest_freeze  # noqa: PLC0415

    # What QEMU would refuse, it is to refuse before the guest is touched.
    way = await block_jobs.rehearse_backups(monitor, starts, bitmaps)
    await run.repository.update(replace(intent, frozen=True))
    freezer = guest_freeze.Freezer(guest_freeze.AgentPlace(intent.agent, intent.libvirt_uri))
    reason = ""
    try:
        try:
            if way is None:
                raise AgentError("the VM has stopped, and its guest agent with it")
            await block_jobs.start_backups(monitor, starts, "individual", bitmaps, freezer, way)
            if not freezer.held:
                reason = freezer.thaw_error or "another program thawed the guest before all jobs had started"
        except AgentError as error:
            reason = str(error)
            if quiesce == Quiesce.TRY:
                await block_jobs.start_backups(monitor, starts, "individual", bitmaps)
        if reason and quiesce == Quiesce.REQUIRE:
            raise BackupError(f"VM {intent.vm.name}: quiesce: {reason}")
    except (BackupError, OSError) as error:
        # Whoever undoes this is not to thaw what was seen thawed, or what others have frozen.
        with after(error):
            await run.repository.update(replace(intent, frozen=bool(freezer.thaw_error)))
        raise
    return replace(
        intent,
        frozen=bool(freezer.thaw_error),
        frozen_ms=freezer.frozen_ms,
        consistency=Consistency.CRASH if reason else Consistency.FILESYSTEM,
        consistency_reason=reason,
    )


async def _top_up(run: BackupRun, monitor: Monitor, draft: AttemptDraft, intent: Intent) -> Intent:
    """Reserve what an increment takes beyond its estimate: the guest has written since that was made."""
    if not intent.reserved or not any(link.bitmap for link in draft.links):
        return intent
    lengths = await query_lengths(monitor)
    for link, staged in zip(draft.links, intent.disks):
        more = lengths.get(staged.job, 0) - sum(bitmap.count for bitmap in link.records)
        if link.bitmap and more > 0:
            target = target_of(run, intent, staged)
            expected = staged.expected + more + more // 8
            try:
                await run.repository.calls.run(preallocate.top_up, target.path, expected, target.fd)
            except BackupError:
                # Without it, this set has to be watched like one on a file system that cannot reserve.
                intent = replace(intent, reserved=False)
                await run.repository.update(intent)
    return intent


def _record(image: DiskImage, link: ChainLink) -> str:
    """Return the name of the bitmap that an increment is made from; empty where it is none."""
    return image.merged if link.below else link.bitmap


def _bitmap_actions(disk: Disk, image: DiskImage, link: ChainLink, status: str) -> list[dict[str, Any]]:
    """Return what a set's transaction does to the bitmaps of a disk before the copy begins.

    C(status) is that of the VM: while it is off, the new bitmap is in its image already.
    """
    actions = []
    if image.bitmap and status != OFF:
        actions.append(bitmap_add(disk.node, image.bitmap, disk.keeps_bitmaps))
    if link.below:
        merged = _record(image, link)
        actions += [
            bitmap_add(disk.node, merged, persistent=False),
            bitmap_merge(disk.node, merged, link.bitmap, link.below),
        ]
    return actions


def _arguments(policy: Policy, link: ChainLink, bitmap: str, speed: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"sync": "full"}
    if link.bitmap:
        # Never cleared: what goes wrong later can take no change away.
        arguments = {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "never"}
    if speed:
        arguments["speed"] = speed
    if policy.compression != "none":
        arguments["compress"] = True
    return arguments
