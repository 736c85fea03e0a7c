# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Backup jobs: started in one go, cancelled, dismissed. Nothing here waits longer than a moment for a job.

Reference: QEMU QMP Reference Manual 7.2, drive-backup, transaction, block-job-cancel, job-dismiss.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._errors import CommandError
from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import query_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._target import open_pair

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Job, Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Monitor
    from ansible_collections.vmfleet.backup.plugins.module_utils._target import Target

SETTLE_TIMEOUT = 10.0
"""Seconds that a cancelled job gets to end. Only one with a hung target needs more than milliseconds."""

SETTLE_INTERVAL = 0.02

CBW_ERROR_SINCE = (10, 1)
"""The QEMU version whose backup commands have on-cbw-error: a failing target then fails the job, not the guest."""


@dataclass(frozen=True)
class BackupStart:
    """One drive-backup to start: C(arguments) are QEMU's own, those of the target and of the job's identity apart."""

    job_id: str
    node: str
    target: Target
    opaque: str
    arguments: dict[str, Any] = field(default_factory=dict)


async def start_backups(
    monitor: Monitor,
    starts: Sequence[BackupStart],
    completion_mode: str = "grouped",
    bitmap_actions: Sequence[dict[str, Any]] = (),
) -> None:
    """Start all backups at one point in time, or none; raises CommandError with QEMU's reason.

    C(bitmap_actions) are further actions of the same transaction.
    """
    direct = [start.target.direct for start in starts]
    try:
        await _start(monitor, starts, direct, completion_mode, bitmap_actions)
    except (CommandError, OSError):
        if not any(direct):
            raise
        # Some file systems, and some images on some devices, refuse O_DIRECT: the page cache serves as well.
        await _start(monitor, starts, [False] * len(starts), completion_mode, bitmap_actions)


async def _start(
    monitor: Monitor,
    starts: Sequence[BackupStart],
    direct: Sequence[bool],
    completion_mode: str,
    bitmap_actions: Sequence[dict[str, Any]],
) -> None:
    common: dict[str, Any] = {"mode": "existing", "auto-dismiss": False}
    if await _has_cbw_error(monitor):
        common["on-cbw-error"] = "break-snapshot"
    fdsets: list[int] = []
    actions: list[dict[str, Any]] = list(bitmap_actions)
    try:
        for start, is_direct in zip(starts, direct):
            filename = start.target.path
            if monitor.passes_fds:
                fdsets.append(await _pass_target(monitor, start, is_direct))
                filename = f"/dev/fdset/{fdsets[-1]}"
            data = {
                **common,
                **start.arguments,
                "job-id": start.job_id,
                "device": start.node,
                "target": start.target.node(filename, is_direct),
                "format": start.target.format,
            }
            actions.append({"type": "drive-backup", "data": data})
        if len(actions) == 1:
            await monitor.execute("drive-backup", actions[0]["data"])
        else:
            await monitor.execute(
                "transaction", {"actions": actions, "properties": {"completion-mode": completion_mode}}
            )
    finally:
        # An fdset that is left keeps its image open and locked for the rest of QEMU's life.
        for fdset in fdsets:
            await monitor.remove_fdset(fdset)


async def _pass_target(monitor: Monitor, start: BackupStart, direct: bool) -> int:
    fds = open_pair(start.target, direct)
    try:
        return await monitor.add_fdset(fds, start.opaque)
    finally:
        for fd in fds:
            os.close(fd)


async def _has_cbw_error(monitor: Monitor) -> bool:
    if tuple(int(number) for number in monitor.version.split(".")[:2]) < CBW_ERROR_SINCE:
        return False
    schema = {entry["name"]: entry for entry in await monitor.execute("query-qmp-schema")}
    arguments = schema[schema["drive-backup"]["arg-type"]]
    return any(member["name"] == "on-cbw-error" for member in arguments["members"])


async def cancel_jobs(monitor: Monitor, job_ids: Iterable[str]) -> tuple[Job, ...]:
    """Cancel these jobs and wait for a moment until they have ended; returns those that have not."""
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
                    # It ended, or a sibling's end took it along, since we asked: the next look tells.
                    continue
        await asyncio.sleep(SETTLE_INTERVAL)


async def dismiss_jobs(monitor: Monitor, job_ids: Iterable[str]) -> None:
    """Remove ended jobs from QEMU's list. Their outcome must be on disk by then: it is lost with them."""
    wanted = set(job_ids)
    for job in await query_jobs(monitor):
        if job.id in wanted and job.ended:
            await monitor.execute("job-dismiss", {"id": job.id})


async def remove_fdsets(monitor: Monitor, vm: Vm, prefix: str) -> None:
    """Take back the fdsets that a dead module process of ours has left, found by their tag."""
    for fdset, opaques in vm.fdsets.items():
        if any(opaque.startswith(prefix) for opaque in opaques):
            await monitor.remove_fdset(fdset)
