# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge backup jobs while they run: whether they stand still, and whether they keep their guest from running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .model import IO_ERROR

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .model import Job


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
