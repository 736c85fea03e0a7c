# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Put an end to attempts that come to nothing, and remove what they have left in QEMU and in the repository.

Where the repository does not answer, or is gone, nothing there can be touched: the guest is freed of its copies.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import AgentError, BackupError, CommandError, ToolError, after, is_unasked
from .._common.formats import utc_now
from .._host import probe
from .._plan.model import Case
from .._plan.observe import address_of
from .._qemu import bitmaps, block_jobs
from .._qemu.address import parse_address
from .._qemu.detached import close_detached
from .._qemu.jobs import query_jobs
from .._qemu.model import IO_ERROR
from .._qemu.monitor import Monitor
from .._repository import chain
from .._repository.documents import Failure, Level
from . import results
from .outcome import VmState
from .session import AGAIN, jobs_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._qemu.model import Vm
    from .._repository.documents import Intent
    from .._repository.repository import VmRecords
    from .outcome import Outcome
    from .run import BackupRun
    from .session import LockedVm, Pending, VmSession, VmTask


PIECE = 1 << 20
"""Bytes that a job copies at a time; with a limited speed, it rests after each."""


# Steps


async def disown(locked: LockedVm, reason: str) -> Outcome:
    """Remove jobs whose set is somebody else's by now: nobody but us can stop them."""
    locked.task.changed = True
    await remove_leftovers(locked)
    return results.failed(locked, reason)


async def remove(locked: LockedVm, _reason: str) -> Pending:
    """Put an end to a set that is not to be finished: superseded by ours, or left behind by others."""
    intent, removal = locked.intent, locked.decision.removal
    locked.task.warn(f"the unfinished set {intent.id} was removed: {removal}")
    if locked.decision.case == Case.SUPERSEDED:
        # The guest of one that is taken over may be another one, or elsewhere.
        await thaw(locked, intent)
    # Who removes it goes on with another attempt.
    locked.task.followed = ""
    state = VmState.CANCELLED if locked.run.is_ours(intent) else VmState.FAILED
    await fail_attempt(locked, intent, removal, state)
    return AGAIN


async def withdraw(locked: LockedVm, _reason: str) -> Pending:
    """Remove every trace of an attempt of which nothing is to be written down."""
    await thaw(locked, locked.intent)
    await _remove_attempt(locked, locked.intent)
    return AGAIN


async def give_up(locked: LockedVm, error: str) -> Pending:
    """Put an end to an attempt that has come to nothing."""
    await thaw(locked, locked.intent)
    await fail_attempt(locked, locked.intent, error)
    return AGAIN


# What they are made of


async def thaw(locked: LockedVm, intent: Intent) -> None:
    """Undo a freeze of which nobody has seen the end, where there is one."""
    if not intent.frozen:
        return
    if intent.attempt not in locked.seen.dead and not await ask_to_thaw(locked.task, intent):
        return
    try:
        await locked.run.repository.update(replace(intent, frozen=False))
    except OSError as full:
        # The mark stays, and is looked at again.
        if full.errno not in probe.NO_SPACE:
            raise


async def ask_to_thaw(task: VmTask, intent: Intent) -> bool:
    """Ask the agent of a guest to thaw it; return whether it is seen thawed."""
    # Few guests are left frozen: the others do not need it loaded, and compiled.
    from .._qemu import guest_freeze  # noqa: PLC0415

    try:
        await guest_freeze.thaw(guest_freeze.AgentPlace(intent.agent, intent.libvirt_uri))
    except AgentError as error:
        task.warn(f"the guest's file systems may still be frozen by this backup: {error}; thaw them in the guest")
        return False
    return True


async def fail_attempt(locked: LockedVm, intent: Intent, error: str, state: VmState = VmState.FAILED) -> None:
    """Write down that an attempt has come to nothing, and remove it; in this order."""
    locked.task.changed = True
    failure = Failure(intent.run, intent.attempt, intent.id, state, error, intent.started, utc_now())
    with after(error):
        await _record(locked, intent, failure)
        await _remove_attempt(locked, intent)


async def _record(locked: LockedVm, intent: Intent, failure: Failure) -> None:
    run, monitor = locked.run, locked.monitor
    try:
        await run.repository.record_failure(intent.vm.name, failure)
    except OSError as full:
        if full.errno not in probe.NO_SPACE:
            raise
        # The images themselves are in the way. QEMU still tells how their jobs have ended.
        if monitor:
            await block_jobs.stop_jobs(monitor, intent.jobs)
        if monitor and locked.seen.vm:
            await block_jobs.close_targets(monitor, locked.seen.vm, run.fdset_tag(intent.attempt))
        await run.repository.discard_images(intent)
        run.close_images(intent)
        await run.repository.record_failure(intent.vm.name, failure)


async def _remove_attempt(locked: LockedVm, intent: Intent) -> None:
    """Remove every trace of an attempt, in QEMU first."""
    run, seen, monitor = locked.run, locked.seen, locked.monitor
    await end_daemon(locked)
    if seen.vm and seen.vm.is_off:
        # It may have been started since: on a snapshot of a disk that is being copied it can.
        await _remove_unneeded(locked, _bitmaps_of(intent, seen.vm))
    elif monitor and seen.vm:
        # No job need tell of an error. A guest that stands still for another reason only stops again.
        may_be_our_fault = bool(jobs_of(intent, seen.vm)) and intent.guest != IO_ERROR
        await _remove_jobs(locked, monitor, seen.vm, intent.attempt)
        await bitmaps.remove_bitmaps(monitor, _bitmaps_of(intent, seen.vm))
        if may_be_our_fault:
            await block_jobs.resume(monitor)
    elif run.is_ours(intent) and intent.attempt not in seen.dead | seen.doubtful:
        raise BackupError(f"{seen.error}; the set is unfinished: run the backup again to clean up")
    # NFS renames what is unlinked while it is open, and then the directory is not empty.
    run.close_images(intent)
    await run.repository.discard(intent)


async def remove_leftovers(locked: LockedVm, *ended: str) -> None:
    """Remove what dead attempts have left in QEMU, and the bitmaps that no set will build on.

    C(ended) is an attempt that has come to a good end.
    """
    await end_daemon(locked)
    if locked.seen.vm is None:
        return
    await _remove_attempts(locked, {*ended, *await leftover_attempts(locked)})
    await _remove_unneeded(locked, await leftover_bitmaps(locked))


async def clear(locked: LockedVm) -> None:
    """Remove from a VM what is this repository's, before a start, except what the next set may build on."""
    other = await other_name(locked)
    if other:
        raise BackupError(other)
    await _remove_attempts(locked, await leftover_attempts(locked))
    await remove_bitmaps(locked, await leftover_bitmaps(locked))


async def end_daemon(locked: LockedVm) -> None:
    """End the storage daemon of a VM that is off, and remove what one has left that was killed."""
    if os.path.lexists(locked.place):
        # Not for each VM that is on: what is loaded is compiled first.
        from .._qemu import storage_daemon  # noqa: PLC0415

        held = locked.seen.vm is not None and locked.seen.vm.daemon
        await storage_daemon.end(locked.place, locked.monitor if held else None)


async def _remove_unneeded(locked: LockedVm, found: Iterable[tuple[str, str]]) -> None:
    """Remove bitmaps without which sets can be made, and which any later run finds again."""
    try:
        await remove_bitmaps(locked, found)
    except (CommandError, ToolError) as error:
        locked.task.warn(f"a bitmap that no set needs any more could not be removed: {error}")


async def remove_bitmaps(locked: LockedVm, found: Iterable[tuple[str, str]]) -> None:
    """Remove bitmaps from a VM, be it on or off; each is given as node and name."""
    vm = locked.seen.vm
    if vm and vm.is_off:
        # Whoever has looked at such a VM has loaded it already.
        from .._qemu import image_files  # noqa: PLC0415

        await image_files.remove_bitmaps(vm, found)
    elif locked.monitor:
        await bitmaps.remove_bitmaps(locked.monitor, found)


async def _remove_attempts(locked: LockedVm, attempts: Iterable[str]) -> None:
    """Remove from QEMU what it has of these attempts. A VM that is off has nothing of them."""
    if locked.monitor and locked.seen.vm:
        for attempt in attempts:
            await _remove_jobs(locked, locked.monitor, locked.seen.vm, attempt)


async def _remove_jobs(locked: LockedVm, monitor: Monitor, vm: Vm, attempt: str) -> None:
    """Remove the jobs of an attempt, and the files that were handed over for it."""
    run = locked.run
    tag = run.fdset_tag(attempt)
    jobs = [job for job in vm.jobs if job.id.startswith(f"vmfleet.{run.repository.tag}.{attempt}.")]
    active = [job.id for job in jobs if not job.ended]
    if active:
        await block_jobs.stop_jobs(monitor, active)
    await block_jobs.close_targets(monitor, vm, tag)
    # As long as its jobs are listed, a later call comes here again.
    refusal = await close_detached(monitor, _nodes_of(locked.records, attempt))
    if refusal:
        locked.task.warn(f"somebody detached a disk during its copy, and QEMU still has its image open: {refusal}")
    await block_jobs.dismiss_jobs(monitor, (job.id for job in jobs))
    await block_jobs.remove_fdsets(monitor, vm, tag)


# What is left (changes nothing)


async def leftover_attempts(session: VmSession) -> set[str]:
    """Return the attempts of the repository that QEMU knows and no intent does."""
    elsewhere, doubt = await _elsewhere(session)
    return set() if doubt else _unknown(session) - elsewhere.keys()


async def leftover_bitmaps(session: VmSession) -> list[tuple[str, str]]:
    """Return the repository's bitmaps on a VM that no set will build on, as node and name."""
    vm, records = session.seen.vm, session.records
    if vm is None or any(await _elsewhere(session)):
        return []
    differential = session.task.request.wanted == Level.DIFFERENTIAL
    keep = chain.bitmaps_to_keep(records.sets, differential, (disk.names for disk in vm.disks))
    keep = keep.union(*(intent.bitmaps for intent in records.intents))
    return [(node, name) for node, name in own_bitmaps(session.run, vm) if name not in keep]


async def other_name(session: VmSession) -> str:
    """Return what is wrong with a VM that is being backed up under two names; empty where it has one only."""
    elsewhere, doubt = await _elsewhere(session)
    for other in elsewhere.values():
        return f"the same VM is being backed up under the name {other.vm.name} (set {other.id}); give it one name"
    return f"QEMU has jobs or bitmaps of an unfinished set, and it is unknown of which set: {doubt}" if doubt else ""


def own_bitmaps(run: BackupRun, vm: Vm) -> list[tuple[str, str]]:
    """Return all bitmaps of the repository on a VM, as node and name."""
    return [(node, name) for node, name in _removable_bitmaps(vm) if name.startswith(run.bitmap_prefix)]


def _nodes_of(records: VmRecords, attempt: str) -> list[str]:
    """Return the nodes of the disks that an attempt copies, or has copied."""
    growing = [disk.image for intent in records.intents if intent.attempt == attempt for disk in intent.disks]
    done = [image for manifest in records.sets if manifest.attempt == attempt for image in manifest.disks]
    return [image.node for image in (*growing, *done)]


def _bitmaps_of(intent: Intent, vm: Vm) -> list[tuple[str, str]]:
    """Return the bitmaps of an attempt on a VM, as node and name."""
    return [(node, name) for node, name in _removable_bitmaps(vm) if name in intent.bitmaps]


def _unknown(session: VmSession) -> set[str]:
    """Return the attempts of the repository that QEMU knows and no intent under this VM's name does."""
    vm, run = session.seen.vm, session.run
    if vm is None:
        return set()
    known = {job.id.split(".")[2] for job in vm.jobs if job.id.startswith(f"vmfleet.{run.repository.tag}.")}
    for opaques in vm.fdsets.values():
        known |= {tag.split(":")[2] for tag in opaques if tag.startswith(run.fdset_tag())}
    nodes = block_jobs.target_nodes(run.fdset_tag())
    known |= {name.split(".")[2] for name in vm.target_nodes if name.startswith(nodes)}
    return known - {intent.attempt for intent in session.records.intents}


async def _elsewhere(session: VmSession) -> tuple[dict[str, Intent], str]:
    """Return the intents under other names of which QEMU knows, by attempt; and which that cannot be read may be it."""
    # A set that is published is no intent any more, under whatever name: to read all of them again for each VM that has
    # just got its set would take the longer, the more VMs there are.
    unknown = _unknown(session) - {manifest.attempt for manifest in session.records.sets}
    odd: list[str] = []
    found = await session.run.repository.intents(odd) if unknown else ()
    known = {intent.attempt: intent for intent in found if intent.attempt in unknown}
    return known, "; ".join(odd) if unknown - known.keys() else ""


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


# Where the repository does not answer


async def fail_vm(run: BackupRun, task: VmTask, error: str) -> Outcome:
    """Give up on a VM for now. Where the repository itself is gone, no later run can free the guest of its jobs."""
    if task.last_attempt and await _is_gone(run):
        return await abandon(run, task, error)
    return results.outcome(run, task, VmState.FAILED, error=error)


async def abandon(run: BackupRun, task: VmTask, reason: str) -> Outcome:
    """Free the guest of copies into a repository that does not answer."""
    intent = task.last_attempt
    if intent is None:
        return results.outcome(run, task, VmState.FAILED, error=reason)
    monitor_address = parse_address(intent.monitor, libvirt_uri=intent.libvirt_uri)
    address = address_of(task.name, monitor_address, run.repository.tag)
    try:
        async with Monitor(address, run.commands) as monitor:
            fate = await _cancel_jobs(monitor, intent)
            if intent.guest != IO_ERROR:
                await block_jobs.resume(monitor)
        task.changed = True
    except BackupError as error:
        # Why the repository cannot be used is still the first thing to be told.
        fate = f"its jobs could not be cancelled: {error}"
    told = f"{reason}; {fate}. Run the backup again when the repository answers"
    return results.outcome(run, task, VmState.FAILED, error=told)


async def _is_gone(run: BackupRun) -> bool:
    """Tell whether the repository cannot be used any more: unmounted, exchanged, or its disk has failed.

    That nobody can ask is no reason to end good copies.
    """
    try:
        await probe.probe(run.repository.path, writing=True)
        await run.repository.check_same()
    except (BackupError, OSError) as error:
        return not is_unasked(error)
    return False


async def _cancel_jobs(monitor: Monitor, intent: Intent) -> str:
    """Cancel jobs whose target hangs; return what has become of them.

    One that waits for its target ends when that is back. One that rests would end now, and QEMU would close its
    image: that stops QEMU, and the guest with it, until the target is back. It is better left alone.
    """
    jobs = [job for job in await query_jobs(monitor) if job.id in intent.jobs and not job.ended]
    if not jobs:
        return "none of its jobs runs"
    slow = PIECE / probe.TIMEOUT
    resting = [job for job in jobs if job.paused or 0 < job.speed < slow]
    not_cancelled = await block_jobs.cancel_jobs(monitor, (job.id for job in jobs if job not in resting))
    if resting:
        return "its jobs are too slow, or paused: the next run continues with them"
    return (
        "its jobs were cancelled, but cannot end until the repository answers"
        if not_cancelled
        else "its jobs were cancelled"
    )
