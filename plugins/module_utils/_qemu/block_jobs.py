# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start backup jobs together, cancel and dismiss them. Nothing here waits longer than a moment for a job.

A backup is QEMU's drive-backup. Where a QEMU has that no more, or its policy refuses what is deprecated, it is the same
with blockdev-backup: the target is a node then, which we add before and remove after.

Reference: QEMU QMP Reference Manual 7.2, drive-backup, blockdev-backup, transaction, block-job-cancel, job-dismiss.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, CommandError, JobFailed
from .._host.confinement import NO_DESCRIPTOR, not_given
from .._host.files import AT_ONCE
from .jobs import query_jobs, query_status
from .model import IO_ERROR, TARGET_NODES
from .target_image import open_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from .._host.files import DirectCalls
    from .model import Job, Vm
    from .monitor import Monitor
    from .target_image import Target


SETTLE_TIMEOUT = 10.0
"""Seconds that a cancelled job gets to end. Only one with a hung target needs more than milliseconds."""
SETTLE_INTERVAL = 0.02
DRIVE_BACKUP = "drive-backup"
BLOCKDEV_BACKUP = "blockdev-backup"
TAG = "vmfleet:"
"""What the tags of all our fdsets begin with."""
ABORTED = "Transaction aborted using Abort action"
"""What QEMU says of a transaction in which nothing but its action C(abort) has failed."""


@dataclass(frozen=True)
class BackupStart:
    """One backup to start: C(arguments) are QEMU's own, those of the target and of the job's identity apart.

    C(opaque) is the tag of its fdset, and C(calls) is how the target's file system is called. C(place) is the directory
    of which an admin is told what to do where a security module keeps QEMU from the target.
    """

    job_id: str
    node: str
    target: Target
    opaque: str
    arguments: dict[str, Any] = field(default_factory=dict)
    calls: DirectCalls = AT_ONCE
    place: str = ""

    @property
    def target_node(self) -> str:
        return target_nodes(self.opaque)


@dataclass(frozen=True)
class Way:
    """How QEMU takes its targets: which of them past the page cache, and whether as nodes of their own."""

    direct: tuple[bool, ...]
    by_node: bool = False

    def after(self, error: CommandError | OSError) -> Way | None:
        """Return the way to try where this one has failed; None where there is no other."""
        # In a transaction QEMU refuses the value of a field, by an error class that it uses for other errors too.
        if isinstance(error, CommandError) and DRIVE_BACKUP in error.description and not self.by_node:
            return replace(self, by_node=True)
        # Some file systems, and some images on some devices, refuse O_DIRECT: the page cache serves as well.
        return replace(self, direct=(False,) * len(self.direct)) if any(self.direct) else None


def target_nodes(opaque: str) -> str:
    """Return the name of the node of a target whose fdset has this tag; for the beginning of a tag, that of its names.

    A node's name has 31 characters at most, and begins with a letter.
    """
    return TARGET_NODES + opaque[len(TAG) :].replace(":", ".")


async def start_backups(
    monitor: Monitor,
    starts: Sequence[BackupStart],
    completion_mode: str = "grouped",
    bitmap_actions: Sequence[dict[str, Any]] = (),
    moment: AbstractAsyncContextManager[Any] | None = None,
    way: Way | None = None,
) -> None:
    """Start all backups at one point in time, or none; raises CommandError with QEMU's reason.

    C(bitmap_actions) are further actions of the same transaction, such as bitmap_add(). C(moment) is entered for just
    that point in time: then the targets are open already, and nothing touches their file system. C(way) is what a
    rehearsal has found out.
    """

    async def begin(actions: list[dict[str, Any]]) -> bool:
        async with AsyncExitStack() as stack:
            if moment:
                await stack.enter_async_context(moment)
            if len(actions) == 1:
                await monitor.execute(actions[0]["type"], actions[0]["data"])
            else:
                await _transact(monitor, actions, completion_mode)
        return True

    if way is None:
        await _with_targets(monitor, starts, bitmap_actions, begin)
    else:
        await _with_open_targets(monitor, starts, way, bitmap_actions, begin)


async def rehearse_backups(
    monitor: Monitor, starts: Sequence[BackupStart], bitmap_actions: Sequence[dict[str, Any]] = ()
) -> Way | None:
    """Find out whether QEMU would start these backups: a transaction that QEMU itself rolls back at its end.

    Returns the way in which it takes the targets; raises CommandError with QEMU's reason where
    it would not start them. A VM that is paused is not asked.
    """
    # While a VM is paused, QEMU keeps the files that it was passed open, and so the targets locked.
    if not (await monitor.execute("query-status"))["running"]:
        return None

    async def begin_and_abort(actions: list[dict[str, Any]]) -> bool:
        try:
            await _transact(monitor, [*actions, {"type": "abort", "data": {}}], "individual")
        except CommandError as error:
            if error.description != ABORTED:
                raise
        return False

    return await _with_targets(monitor, starts, bitmap_actions, begin_and_abort)


async def _transact(monitor: Monitor, actions: Sequence[dict[str, Any]], completion_mode: str) -> None:
    await monitor.execute("transaction", {"actions": actions, "properties": {"completion-mode": completion_mode}})


async def _with_targets(
    monitor: Monitor,
    starts: Sequence[BackupStart],
    bitmap_actions: Sequence[dict[str, Any]],
    execute: Callable[[list[dict[str, Any]]], Awaitable[bool]],
) -> Way:
    """Hand over the targets and C(execute) the actions, in the first way in which that works; return that way."""
    way = Way(tuple(start.target.direct for start in starts))
    while True:
        try:
            await _with_open_targets(monitor, starts, way, bitmap_actions, execute)
        except (CommandError, OSError) as error:
            other = way.after(error)
            if other is None:
                raise
            way = other
        else:
            return way


async def _with_open_targets(
    monitor: Monitor,
    starts: Sequence[BackupStart],
    way: Way,
    bitmap_actions: Sequence[dict[str, Any]],
    execute: Callable[[list[dict[str, Any]]], Awaitable[bool]],
) -> None:
    """Hand over the targets and C(execute) the actions; it returns whether they have started jobs that go on."""
    # Never on-cbw-error=break-snapshot: a copy that fails for a moment is made later, from what the disk holds by then,
    # and the job completes without an error (QEMU 11.1).
    command = BLOCKDEV_BACKUP if way.by_node else DRIVE_BACKUP
    fdsets: list[int] = []
    nodes: list[str] = []
    actions: list[dict[str, Any]] = list(bitmap_actions)
    started = False
    try:
        for start, is_direct in zip(starts, way.direct):
            # A storage daemon has the target under the number that it has here; over TCP there is the path only.
            filename = start.target.name if monitor.address.daemon else start.target.path
            if monitor.passes_fds:
                fdsets.append(await _pass_target(monitor, start, is_direct))
                filename = f"/dev/fdset/{fdsets[-1]}"
            if way.by_node:
                options = {**start.target.options(filename, is_direct), "node-name": start.target_node}
                await monitor.execute("blockdev-add", options)
                nodes.append(start.target_node)
                target = {"target": start.target_node}
            else:
                opened = start.target.node(filename, is_direct)
                target = {"mode": "existing", "target": opened, "format": start.target.format}
            identity = {"job-id": start.job_id, "device": start.node, "auto-dismiss": False}
            actions.append({"type": command, "data": {**start.arguments, **identity, **target}})
        started = await execute(actions)
    finally:
        # An fdset, or a node, that is left keeps its image open and locked for the rest of QEMU's life.
        for fdset in fdsets:
            await monitor.remove_fdset(fdset)
        if not started:
            await remove_nodes(monitor, nodes)


async def _pass_target(monitor: Monitor, start: BackupStart, direct: bool) -> int:
    fds = await start.calls.run(open_pair, start.target, direct)
    try:
        return await monitor.add_fdset(fds, start.opaque)
    except CommandError as error:
        if NO_DESCRIPTOR not in error.description:
            raise
        process = monitor.process.pid if monitor.process else None
        path = start.target.path
        raise BackupError(not_given(process, path, fds[1], start.place or os.path.dirname(path))) from error
    finally:
        for fd in fds:
            start.calls.close(fd)


async def set_speed(monitor: Monitor, job_id: str, speed: int) -> None:
    """Limit a job to C(speed) bytes/s, 0 for no limit; one that has nothing left to copy takes none, and needs none."""
    try:
        await monitor.execute("block-job-set-speed", {"device": job_id, "speed": speed})
    except CommandError:
        if any(job.id == job_id and not job.copied for job in await query_jobs(monitor)):
            raise


async def cancel_jobs(monitor: Monitor, job_ids: Iterable[str]) -> tuple[Job, ...]:
    """Cancel these jobs and wait for a moment until they have ended; return those that have not."""
    wanted = set(job_ids)
    deadline = time.monotonic() + SETTLE_TIMEOUT
    asked: set[str] = set()
    while True:
        running = tuple(job for job in await query_jobs(monitor) if job.id in wanted and not job.ended)
        if not running or time.monotonic() >= deadline:
            return running
        for job in running:
            if job.id not in asked:
                asked.add(job.id)
                try:
                    await monitor.execute("block-job-cancel", {"device": job.id, "force": True})
                except CommandError:
                    # It has ended since we asked, maybe with another job of its transaction. The next look tells.
                    continue
        await asyncio.sleep(SETTLE_INTERVAL)


async def stop_jobs(monitor: Monitor, job_ids: Iterable[str]) -> None:
    """Cancel these jobs; raises JobFailed where one of them does not end."""
    stubborn = ", ".join(job.id for job in await cancel_jobs(monitor, job_ids))
    if stubborn:
        raise JobFailed(
            f"{monitor.address}: job {stubborn} does not end after block-job-cancel: its target hangs. Repair the"
            " target; the next call removes the remains"
        )


async def dismiss_jobs(monitor: Monitor, job_ids: Iterable[str]) -> None:
    """Remove ended jobs from QEMU's list. Their outcome must be on disk by then: it is lost with them."""
    for job_id in job_ids:
        try:
            await monitor.execute("job-dismiss", {"id": job_id})
        except CommandError:
            # Somebody else may have done that, and one that has not ended stays.
            if any(job.id == job_id and job.ended for job in await query_jobs(monitor)):
                raise


async def remove_nodes(monitor: Monitor, names: Iterable[str]) -> None:
    """Close targets that are nodes, once their jobs have ended; one that is gone already is none to close.

    Only then is an image whole, as QEMU has kept some of it in memory, and only then can others open it.
    """
    deadline = time.monotonic() + SETTLE_TIMEOUT
    for name in names:
        while True:
            try:
                await monitor.execute("blockdev-del", {"node-name": name})
            except CommandError:
                nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
                if any(node["node-name"] == name for node in nodes):
                    if time.monotonic() >= deadline:
                        raise
                    await asyncio.sleep(SETTLE_INTERVAL)
                    continue
            break


async def close_targets(monitor: Monitor, vm: Vm, prefix: str) -> bool:
    """Close the targets that are nodes and whose tags begin with C(prefix); return whether there were any."""
    nodes = [name for name in vm.target_nodes if name.startswith(target_nodes(prefix))]
    await remove_nodes(monitor, nodes)
    return bool(nodes)


async def remove_fdsets(monitor: Monitor, vm: Vm, prefix: str) -> None:
    """Take back the fdsets that a dead module process of ours has left, found by their tag."""
    for fdset, opaques in vm.fdsets.items():
        if any(opaque.startswith(prefix) for opaque in opaques):
            try:
                await monitor.remove_fdset(fdset)
            except CommandError:
                # QEMU 7.2 lets go of a dead process's files itself, a moment after the next client was greeted.
                if any(entry["fdset-id"] == fdset for entry in await monitor.execute("query-fdsets")):
                    raise


async def resume(monitor: Monitor) -> None:
    """Let a guest go on that a failed write has stopped: the write is tried again."""
    if await query_status(monitor) == IO_ERROR:
        await monitor.execute("cont")
