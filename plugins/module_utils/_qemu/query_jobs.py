# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask QEMU about the block jobs of a VM.

Reference: QEMU QMP Reference Manual 7.2, chapters "Block devices" and "Background jobs".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .model import Job

if TYPE_CHECKING:
    from typing import Any

    from .monitor import Monitor


async def query_jobs(monitor: Monitor) -> tuple[Job, ...]:
    """Ask a VM for its block jobs."""
    block_jobs, jobs = await asyncio.gather(monitor.execute("query-block-jobs"), monitor.execute("query-jobs"))
    return merge_jobs(block_jobs, jobs)


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
                error=other.get("error", entry.get("error", "")),
            )
        )
    return tuple(merged)
