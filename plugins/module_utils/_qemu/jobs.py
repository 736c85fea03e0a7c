# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask QEMU about the block jobs of a VM, and judge them: whether they stand still, and keep their guest from running.

Reference: QEMU QMP Reference Manual 7.2, chapters "Block devices" and "Background jobs".
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.redaction import redact_text
from .model import IO_ERROR, OFF, Job

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .monitor import Monitor


async def query_status(monitor: Monitor) -> str:
    """Ask a VM for its status. One whose disks a storage daemon has open is off."""
    if monitor.address.daemon:
        return OFF
    found: str = (await monitor.execute("query-status"))["status"]
    return found


async def query_jobs(monitor: Monitor) -> tuple[Job, ...]:
    """Ask a VM for its block jobs."""
    block_jobs, jobs = await asyncio.gather(monitor.execute("query-block-jobs"), monitor.execute("query-jobs"))
    return merge_jobs(block_jobs, jobs)


async def query_lengths(monitor: Monitor) -> dict[str, int]:
    """Ask a VM how much each of its block jobs has to copy, in bytes, by the id of the job."""
    return {entry["device"]: entry["len"] for entry in await monitor.execute("query-block-jobs")}


def merge_jobs(block_jobs: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> tuple[Job, ...]:
    """Return the jobs of query-block-jobs, with what query-jobs adds. A job that ends in between is in one only."""
    general = {job["id"]: job for job in jobs}
    merged = []
    for entry in block_jobs:
        other = general.get(entry["device"], {})
        merged.append(
            Job(
                id=entry["device"],
                type=entry["type"],
                status=other.get("status", entry["status"]),
                offset=entry["offset"],
                len=entry["len"],
                speed=entry["speed"],
                paused=entry["paused"],
                busy=entry["busy"],
                io_status=entry["io-status"],
                error=redact_text(other.get("error", entry.get("error", ""))),
            )
        )
    return tuple(merged)


@dataclass
class StallClock:
    """Measure for how long jobs have made no progress. C(since) is in seconds, on the clock of who asks."""

    since: float
    copied: int = -1

    def observe(self, copied: int, now: float) -> None:
        """Note how many bytes are copied by now."""
        if copied != self.copied:
            self.copied, self.since = copied, now

    def restart(self, now: float) -> None:
        """Begin anew: what cannot be seen, or has been told to wait, does not stall."""
        self.copied, self.since = -1, now

    def stalled(self, timeout: float, now: float) -> str:
        """Return what is wrong with jobs that stand still for so long; empty otherwise. 0 waits without end."""
        return f"no progress for {timeout:g} s" if timeout and now - self.since >= timeout else ""


def has_stopped(status: str, before: str) -> bool:
    """Return whether an I/O error has stopped the guest since its backup began, when its status was C(before)."""
    return status == IO_ERROR != before


def is_backup_fault(jobs: Iterable[Job], reserved: bool) -> bool:
    """Return whether the target of these jobs can be why writes of the guest fail: only then is it ours to resume it.

    A target whose space is not reserved may have been full for a moment: neither it nor the job tells of that later. To
    resume a guest that has stopped for another reason does no harm: it tries its write again, and stops again.
    """
    return not reserved or any(job.in_error for job in jobs)
