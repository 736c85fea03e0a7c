# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Decide which sets of a VM stay and which go: a pure function of the sets, the rules and the present time.

The rules choose sets; everything that these build on stays with them. Time is counted from the VM's newest set, never
from now: the sets of a VM that is gone do not grow old. Now is only there to tell which sets were made with a clock
that was wrong: nothing is counted from these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._repository.catalog import start_time
from .._repository.documents import Level
from .._repository.pins import reader
from .._repository.repository import FAILED, REMOVED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Manifest


PERIODS: dict[str, str] = {
    "hourly": "%Y-%m-%d %H:00",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}
"""The time of a set in this form is the same for all sets of one hour, day, week (ISO 8601), month or year."""
CLOCK_TOLERANCE = timedelta(days=1)
"""The clocks of two machines differ by no more than this. A set from further ahead was made with a wrong clock."""


@dataclass(frozen=True)
class Rules:
    """How many sets are kept: the C(last) ones, the newest one of so many hours, days and so on that have any.

    C(within) is seconds before the newest set.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: float = 0

    @property
    def empty(self) -> bool:
        return not any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly, self.within))


@dataclass(frozen=True)
class Constraints:
    """What counts besides the rules, each by set id with the reason.

    C(guarded) sets stay, C(broken) ones cannot be restored whole, C(in_use) ones are read at this moment, so that none
    that they build on may be rewritten. C(allow_remove_last) lets a VM lose its newest good set, too, and without any
    rule its broken ones.
    """

    guarded: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    in_use: Mapping[str, str] = field(default_factory=dict)
    allow_remove_last: bool = False


@dataclass(frozen=True)
class RetentionDecision:
    """What becomes of a set, and why. C(consolidate) makes it a full one, so that what it builds on can go."""

    id: str
    keep: bool
    reason: str
    consolidate: bool = False


def decide(
    sets: Sequence[Manifest], rules: Rules, constraints: Constraints, now: datetime, consolidate: bool = False
) -> tuple[RetentionDecision, ...]:
    """Decide about each of a VM's sets, oldest first."""
    chosen = _chosen(sets, rules, constraints, now)
    parents = {manifest.id: _parents(manifest) for manifest in sets}
    made_full = _to_consolidate(sets, parents, chosen, constraints) if consolidate else frozenset()
    needed = _needed_by(parents, chosen, made_full)
    decisions = []
    for manifest in sets:
        reasons = [*chosen.get(manifest.id, ())]
        if manifest.id in needed:
            reasons.append(f"set {needed[manifest.id]} builds on it")
        becomes_full = manifest.id in made_full
        reason = "; ".join(reasons) or "no rule keeps it"
        decisions.append(RetentionDecision(manifest.id, bool(reasons), reason, becomes_full))
    return tuple(decisions)


def _chosen(sets: Sequence[Manifest], rules: Rules, constraints: Constraints, now: datetime) -> dict[str, list[str]]:
    """Return the sets that are kept for their own sake, with the reasons."""
    chosen: dict[str, list[str]] = {}
    good = [manifest for manifest in reversed(sets) if manifest.id not in constraints.broken]
    for manifest, reason in _by_rules(good, rules, now):
        chosen.setdefault(manifest.id, []).append(reason)
    if good and not constraints.allow_remove_last:
        chosen.setdefault(good[0].id, ["it is the newest good set"])
    for manifest in sets:
        if manifest.id in constraints.guarded:
            chosen.setdefault(manifest.id, []).append(constraints.guarded[manifest.id])
        if manifest.id in constraints.broken and not (constraints.allow_remove_last and rules.empty):
            chosen.setdefault(manifest.id, []).append(
                f"it is broken, and left alone: {constraints.broken[manifest.id]}"
            )
    return chosen


def _by_rules(good: Sequence[Manifest], rules: Rules, now: datetime) -> Iterator[tuple[Manifest, str]]:
    """Yield the sets that the rules choose among the good ones, which are newest first."""
    for manifest in good[: rules.last]:
        yield manifest, "last"
    for period, form in PERIODS.items():
        for manifest, when in _newest_of_each(good, form, getattr(rules, period)):
            yield manifest, f"{period} {when}"
    if rules.within:
        yield from _within(good, timedelta(seconds=rules.within), now)


def _within(good: Sequence[Manifest], span: timedelta, now: datetime) -> Iterator[tuple[Manifest, str]]:
    # Whole days are told without hours.
    told = str(span).replace(", 0:00:00", "")
    newest = next((manifest for manifest in good if start_time(manifest) - now <= CLOCK_TOLERANCE), None)
    for manifest in good:
        if start_time(manifest) - now > CLOCK_TOLERANCE:
            yield manifest, f"its start {manifest.started} is in the future, so its age is unknown"
        elif newest and start_time(newest) - start_time(manifest) <= span:
            yield manifest, f"within {told} before set {newest.id}"


def _newest_of_each(good: Iterable[Manifest], form: str, count: int) -> list[tuple[Manifest, str]]:
    found: list[tuple[Manifest, str]] = []
    for manifest in good:
        # Most periods are not asked for, and to write the times of thousands of sets takes long.
        if len(found) >= count:
            break
        when = start_time(manifest).strftime(form)
        if when not in [before for _other, before in found]:
            found.append((manifest, when))
    return found


def _parents(manifest: Manifest) -> frozenset[str]:
    return frozenset(disk.parent.id for disk in manifest.disks if disk.parent)


def _needed_by(
    parents: Mapping[str, frozenset[str]], chosen: Iterable[str], made_full: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Return what the chosen sets build on, directly or not, with one that does. C(made_full) build on nothing."""
    needed: dict[str, str] = {}
    waiting = sorted(chosen)
    while waiting:
        child = waiting.pop()
        for parent in () if child in made_full else sorted(parents.get(child, ())):
            if parent not in needed:
                needed[parent] = child
                waiting.append(parent)
    return needed


def _to_consolidate(
    sets: Sequence[Manifest],
    parents: Mapping[str, frozenset[str]],
    chosen: Mapping[str, list[str]],
    constraints: Constraints,
) -> frozenset[str]:
    """Return the oldest chosen increments of their chains that, once full, let what they build on go."""
    oldest = [
        manifest.id
        for manifest in sets
        if manifest.id in chosen
        and manifest.level != Level.FULL
        and manifest.id not in constraints.broken
        and not any(below in chosen for below in _needed_by(parents, [manifest.id]))
        and not _is_read(manifest.id, parents, constraints.in_use)
    ]
    made_full: frozenset[str] = frozenset()
    while True:
        more = [name for name in oldest if name not in made_full and _frees(name, parents, chosen, made_full)]
        if not more:
            return made_full
        # With this one full, another may be the last that needs something.
        made_full |= {more[0]}


def _frees(name: str, parents: Mapping[str, frozenset[str]], chosen: Iterable[str], made_full: frozenset[str]) -> bool:
    """Return whether something that a set builds on is needed by no other set that is kept."""
    others = _needed_by(parents, [other for other in chosen if other != name], made_full | {name})
    return not parents[name] <= set(others)


def _is_read(name: str, parents: Mapping[str, frozenset[str]], in_use: Iterable[str]) -> bool:
    """Return whether a set is read at this moment, or one that builds on it."""
    return any(name == reader or name in _needed_by(parents, [reader]) for reader in in_use)


def describe(name: str, decisions: Iterable[RetentionDecision]) -> list[str]:
    """Return the decisions for people to read, newest first."""
    lines = []
    for decision in reversed(tuple(decisions)):
        word = "remove" if not decision.keep else "consolidate" if decision.consolidate else "keep"
        lines.append(f"{word:11}  {name}/{decision.id}  {decision.reason}")
    return lines


def read_constraints(catalog: VmCatalog, allow_remove_last: bool) -> Constraints:
    """Return what counts besides the rules, as the repository tells it. BackupError where it cannot tell all."""
    harmless = [name for name in catalog.odd if name.startswith(".") and name.endswith((FAILED, REMOVED))]
    silent = [reason for name, reason in catalog.odd.items() if name not in harmless]
    if silent:
        raise BackupError(
            "no set of this VM is removed, because a file that may protect a set cannot be read: " + "; ".join(silent)
        )
    guarded = {protection.id: "it is protected" for protection in catalog.annotations.protections}
    in_use = {}
    for pin in catalog.annotations.pins:
        reads = reader(pin)
        if reads:
            guarded[pin.id] = in_use[pin.id] = reads
    for intent in catalog.records.intents:
        for disk in intent.disks:
            if disk.image.parent:
                guarded[disk.image.parent.id] = f"set {intent.id}, which is being made, builds on it"
    return Constraints(guarded, {**catalog.failed_sets, **catalog.broken_sets}, in_use, allow_remove_last)
