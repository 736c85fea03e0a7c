# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""What has become of the VMs of a run: as return values, as a summary, and for people to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._units import human

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import DiskImage

PUBLISHED = "published"
RUNNING = "running"
QUEUED = "queued"
FAILED = "failed"
CANCELLED = "cancelled"
SKIPPED = "skipped"
UNTRACKED = "untracked"
STATES = (PUBLISHED, RUNNING, QUEUED, FAILED, CANCELLED, SKIPPED, UNTRACKED)


@dataclass(frozen=True)
class DiskOutcome:
    """One disk of a set: its level and why it has that. C(bytes) is the size of its image."""

    name: str
    level: str
    reason: str
    parent: str | None
    bytes: int


@dataclass(frozen=True)
class Outcome:
    """What has become of one VM's set. C(consistency) is empty where there is none."""

    name: str
    id: str
    state: str
    level: str = ""
    bytes: int = 0
    duration: float = 0.0
    consistency: str = ""
    consistency_reason: str = ""
    frozen_ms: int = 0
    path: str = ""
    error: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    disks: tuple[DiskOutcome, ...] = ()
    changed: bool = False

    def describe(self, width: int) -> list[str]:
        said = self.error or self.reason
        if self.state == PUBLISHED:
            frozen = f" (frozen for {self.frozen_ms} ms)" if self.frozen_ms else ""
            written = f"{human(self.bytes)} in {self.duration:.1f} s"
            said = f"{self.level}, {self.consistency} consistent{frozen}, {written}, {self.path}"
            if not self.changed:
                said += " (was there)"
        indent = " " * (9 + 2 + width + 2)
        return [f"{self.state:9}  {self.name:{width}}  {said}", *(f"{indent}{warning}" for warning in self.warnings)]


def of_disks(images: Iterable[DiskImage]) -> tuple[DiskOutcome, ...]:
    return tuple(
        DiskOutcome(image.name, image.level, image.reason, image.parent.id if image.parent else None, image.bytes)
        for image in images
    )


def results(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [asdict(outcome) for outcome in outcomes]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many VMs are in which state, and what was written."""
    counts: dict[str, Any] = {state: sum(outcome.state == state for outcome in outcomes) for state in STATES}
    counts["changed"] = sum(outcome.changed for outcome in outcomes)
    counts["bytes"] = sum(outcome.bytes for outcome in outcomes if outcome.changed)
    return counts


def describe(outcomes: Sequence[Outcome]) -> list[str]:
    """The results for people to read, what went wrong last."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    ordered = sorted(outcomes, key=lambda one: one.state in (FAILED, CANCELLED))
    return [line for outcome in ordered for line in outcome.describe(width)]
