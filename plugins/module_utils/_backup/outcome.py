# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell what has become of the VMs of a run: as return values, as a summary, and for people to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from .._common.formats import Word, counted, human
from .._repository.names import column

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence
    from typing import Any


class VmState(Word):
    """What has become of a VM in a run."""

    PUBLISHED = "published"
    RUNNING = "running"
    QUEUED = "queued"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"
    UNTRACKED = "untracked"


STATES = tuple(VmState)
BAD = (VmState.FAILED, VmState.CANCELLED)
UNFINISHED = (VmState.RUNNING, VmState.QUEUED)
STOPPING = (VmState.CANCELLED, VmState.UNTRACKED)
"""What may be asked for instead of sets."""
MANY = 4
"""VMs of which the same warning is told in one line of its own."""


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
    """What has become of one VM's set. C(consistency) is empty where there is none.

    C(offset) of C(len) bytes have been copied, where the jobs still run.
    """

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
    offset: int = 0
    len: int = 0

    def describe(self, width: int, told: Container[str] = ()) -> list[str]:
        """Return it for people to read, with as much room for names as the longest one takes.

        C(told) are warnings that are said of many VMs at once.
        """
        said = self.error or self.reason
        if self.state == VmState.PUBLISHED:
            frozen = f" (frozen for {self.frozen_ms} ms)" if self.frozen_ms else ""
            written = f"{human(self.bytes)} in {self.duration:.1f} s"
            said = f"{self.level}, {self.consistency} consistent{frozen}, {written}, {self.path}"
            if not self.changed:
                said += " (was there)"
        indent = " " * (9 + 2 + width + 2)
        return [
            f"{self.state:9}  {self.name:{width}}  {said}",
            *(f"{indent}{one}" for one in self.warnings if one not in told),
        ]


def results(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return outcomes as return values."""
    return [asdict(outcome) for outcome in outcomes]


def outcome_of(result: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a VM that the module has returned, or a worker that may be of another version."""
    disks = tuple(DiskOutcome(**_known(DiskOutcome, disk)) for disk in result["disks"])
    return Outcome(**{**_known(Outcome, result), "warnings": tuple(result["warnings"]), "disks": disks})


def _known(kind: type, found: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: found[each.name] for each in fields(kind) if each.name in found}


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count how many VMs are in which state, and what was written."""
    # The action plugin returns this too, and Ansible warns of variables that are not of its own types.
    counts: dict[str, Any] = {str(state): sum(outcome.state == state for outcome in outcomes) for state in STATES}
    counts["changed"] = sum(outcome.changed for outcome in outcomes)
    counts["bytes"] = sum(outcome.bytes for outcome in outcomes if outcome.changed)
    return counts


def headline(outcomes: Sequence[Outcome], wanted: str, check_mode: bool = False) -> str:
    """Return what has become of all VMs, in one line; a second one says of which kinds their sets are."""
    counts = summarize(outcomes)
    if wanted in STOPPING:
        stopped = len(outcomes) - counts[VmState.FAILED]
        things = counted(stopped, "set" if wanted == VmState.CANCELLED else "VM")
        verb = "would be" if check_mode else ""
        nothing = "no set is being made" if wanted == VmState.CANCELLED else "no VM is named"
        return " ".join(filter(None, (things, verb, wanted))) if outcomes else nothing
    written = human(counts["bytes"]) if counts["bytes"] else "nothing"
    failed = counts[VmState.FAILED] + counts[VmState.CANCELLED]
    first = (
        f"{counts[VmState.PUBLISHED]} of {len(outcomes)} VMs have their set, {failed} failed,"
        f" {counts[VmState.SKIPPED]} skipped, {written} written{unfinished(counts)}"
    )
    return "\n".join(filter(None, (first, _kinds(outcomes))))


def told(outcomes: Sequence[Outcome], wanted: str, check_mode: bool = False) -> dict[str, Any]:
    """Return what has become of all VMs, as return values and for people to read."""
    return {
        "vms": results(outcomes),
        "summary": summarize(outcomes),
        "headline": headline(outcomes, wanted, check_mode),
        "text": describe(outcomes),
    }


def unfinished(counts: Mapping[str, int]) -> str:
    """Return how many sets are not at their end, where there are some, to be put after a sentence."""
    return "".join(f", {counts[state]} {state}" for state in UNFINISHED if counts[state])


def _kinds(outcomes: Iterable[Outcome]) -> str:
    """Return how many sets of which level there are, and how many are consistent in which way."""
    published = [outcome for outcome in outcomes if outcome.state == VmState.PUBLISHED]
    levels = [outcome.level for outcome in published]
    consistencies = [f"{outcome.consistency} consistent" for outcome in published]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kinds in (levels, consistencies) for kind in sorted(set(kinds)))


def describe(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the results for people to read, what went wrong last. What many VMs are warned of is said once."""
    width = column(outcome.name for outcome in outcomes)
    counts = Counter(warning for outcome in outcomes for warning in set(outcome.warnings))
    many = {warning: count for warning, count in counts.items() if count >= MANY}
    kept, lost = ([one for one in outcomes if (one.state in BAD) is bad] for bad in (False, True))
    return [
        *(line for outcome in kept for line in outcome.describe(width, many)),
        *(f"Warning: {count} of {len(outcomes)} VMs: {warning}" for warning, count in many.items()),
        *(line for outcome in lost for line in outcome.describe(width, many)),
    ]


def diff(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Return the sets before and after; nothing differs where nothing has changed."""
    before, after = "", ""
    for outcome in outcomes:
        was = "not published" if outcome.changed else outcome.state
        before += f"{outcome.name}/{outcome.id}: {was}\n"
        after += f"{outcome.name}/{outcome.id}: {outcome.state}\n"
    return {"before": before, "after": after}


def failure(outcomes: Sequence[Outcome], set_id: str, wanted: str) -> str:
    """Return what the module says when not every VM is where it should be; empty where all are."""
    bad_states = (VmState.FAILED,) if wanted in STOPPING else BAD
    bad = [outcome for outcome in outcomes if outcome.state in bad_states]
    if not bad:
        return ""
    if wanted in STOPPING:
        return f"{len(bad)} of {len(outcomes)} VMs could not be {wanted}: {_reasons(bad)}"
    return (
        f"{len(bad)} of {len(outcomes)} VMs have no set {set_id}: {_reasons(bad)}. Run the backup again with id"
        f" {set_id}: it does not change sets that exist"
    )


def _reasons(outcomes: Iterable[Outcome]) -> str:
    return "; ".join(f"{outcome.name}: {outcome.error}" for outcome in outcomes)
