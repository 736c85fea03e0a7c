# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which sets of a VM stay and which go, and why: a pure function of the sets, the rules and the present time.

The rules choose sets; everything that these build on stays with them. Time is counted from the VM's newest set, never
from now: the sets of a VM that is gone do not grow old. Now is only there to tell which sets were made with a clock
that was wrong: nothing is counted from these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from .._repository.annotations import is_read
from .._repository.catalog import begun
from .._repository.chain import Level

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
"""What two sets of the same hour, day, week (ISO 8601), month or year have in common."""
AHEAD = timedelta(days=1)
"""By how much the clocks of two machines may differ at most."""


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
    that they build on may be rewritten. C(may_go) lets a VM lose its newest good set, too, and without any rule its
    broken ones.
    """

    guarded: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    in_use: Mapping[str, str] = field(default_factory=dict)
    may_go: bool = False


@dataclass(frozen=True)
class RetentionDecision:
    """What becomes of a set. C(consolidate) makes a full one of it, so that what it builds on can go."""

    id: str
    keep: bool
    reason: str
    consolidate: bool = False


def decide(
    sets: Sequence[Manifest], rules: Rules, condition: Constraints, now: datetime, consolidate: bool = False
) -> tuple[RetentionDecision, ...]:
    """The fate of each of a VM's sets, which are in the order of their making."""
    chosen = _chosen(sets, rules, condition, now)
    parents = {manifest.id: _parents(manifest) for manifest in sets}
    made_full = _to_consolidate(sets, parents, chosen, condition) if consolidate else frozenset()
    needed = _needed_by(parents, chosen, made_full)
    fates = []
    for manifest in sets:
        reasons = [*chosen.get(manifest.id, ())]
        if manifest.id in needed:
            reasons.append(f"set {needed[manifest.id]} builds on it")
        becomes_full = manifest.id in made_full
        reason = "; ".join(reasons) or "no rule keeps it"
        fates.append(RetentionDecision(manifest.id, bool(reasons), reason, becomes_full))
    return tuple(fates)


def _chosen(sets: Sequence[Manifest], rules: Rules, condition: Constraints, now: datetime) -> dict[str, list[str]]:
    """The sets that are kept for their own sake, with the reasons."""
    chosen: dict[str, list[str]] = {}
    good = [manifest for manifest in reversed(sets) if manifest.id not in condition.broken]
    for manifest, reason in _by_rules(good, rules, now):
        chosen.setdefault(manifest.id, []).append(reason)
    if good and not condition.may_go:
        chosen.setdefault(good[0].id, ["it is the newest good set"])
    for manifest in sets:
        if manifest.id in condition.guarded:
            chosen.setdefault(manifest.id, []).append(condition.guarded[manifest.id])
        if manifest.id in condition.broken and not (condition.may_go and rules.empty):
            chosen.setdefault(manifest.id, []).append(f"it is broken, and left alone: {condition.broken[manifest.id]}")
    return chosen


def _by_rules(good: Sequence[Manifest], rules: Rules, now: datetime) -> Iterator[tuple[Manifest, str]]:
    """The sets that the rules choose, among the good ones, newest first."""
    for manifest in good[: rules.last]:
        yield manifest, "last"
    for period, form in PERIODS.items():
        for manifest, when in _newest_of_each(good, form, getattr(rules, period)):
            yield manifest, f"{period} {when}"
    if rules.within:
        yield from _within(good, timedelta(seconds=rules.within), now)


def _within(good: Sequence[Manifest], span: timedelta, now: datetime) -> Iterator[tuple[Manifest, str]]:
    # A part of a day that is none is not told.
    told = str(span).replace(", 0:00:00", "")
    newest = next((manifest for manifest in good if begun(manifest) - now <= AHEAD), None)
    for manifest in good:
        if begun(manifest) - now > AHEAD:
            yield manifest, f"it is from the future ({manifest.started}), and so its age is not known"
        elif newest and begun(newest) - begun(manifest) <= span:
            yield manifest, f"within {told} before set {newest.id}"


def _newest_of_each(good: Iterable[Manifest], form: str, count: int) -> list[tuple[Manifest, str]]:
    found: list[tuple[Manifest, str]] = []
    for manifest in good:
        when = begun(manifest).strftime(form)
        if len(found) < count and when not in [before for _other, before in found]:
            found.append((manifest, when))
    return found


def _parents(manifest: Manifest) -> frozenset[str]:
    return frozenset(disk.parent.id for disk in manifest.disks if disk.parent)


def _needed_by(
    parents: Mapping[str, frozenset[str]], chosen: Iterable[str], made_full: frozenset[str] = frozenset()
) -> dict[str, str]:
    """What the chosen sets build on, directly or not, with one that does; C(made_full) build on nothing any more."""
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
    condition: Constraints,
) -> frozenset[str]:
    """The oldest chosen increments of their chains, where with them what they build on can go."""
    oldest = [
        manifest.id
        for manifest in sets
        if manifest.id in chosen
        and manifest.level != Level.FULL
        and manifest.id not in condition.broken
        and not any(below in chosen for below in _needed_by(parents, [manifest.id]))
        and not _is_read(manifest.id, parents, condition.in_use)
    ]
    made_full: frozenset[str] = frozenset()
    while True:
        more = [name for name in oldest if name not in made_full and _frees(name, parents, chosen, made_full)]
        if not more:
            return made_full
        # With this one full, others may be the last ones that need something.
        made_full |= {more[0]}


def _frees(name: str, parents: Mapping[str, frozenset[str]], chosen: Iterable[str], made_full: frozenset[str]) -> bool:
    """Whether something that a set builds on is needed by no other one that is kept."""
    others = _needed_by(parents, [other for other in chosen if other != name], made_full | {name})
    return not parents[name] <= set(others)


def _is_read(name: str, parents: Mapping[str, frozenset[str]], in_use: Iterable[str]) -> bool:
    """Whether somebody reads a set at this moment, or one that builds on it."""
    return any(name == reader or name in _needed_by(parents, [reader]) for reader in in_use)


def describe(name: str, fates: Iterable[RetentionDecision]) -> list[str]:
    """The fates for people to read, newest first."""
    lines = []
    for fate in reversed(tuple(fates)):
        word = "remove" if not fate.keep else "consolidate" if fate.consolidate else "keep"
        lines.append(f"{word:11}  {name}/{fate.id}  {fate.reason}")
    return lines


def condition(held: VmCatalog, may_go: bool) -> Constraints:
    """What keeps sets besides the rules."""
    guarded = {mark.id: "it is protected" for mark in held.marks.protections}
    in_use = {}
    for pin in held.marks.pins:
        if is_read(pin):
            guarded[pin.id] = in_use[pin.id] = f"{pin.path} on {pin.host} reads it"
    for intent in held.shelf.intents:
        for disk in intent.disks:
            if disk.image.parent:
                guarded[disk.image.parent.id] = f"set {intent.id}, which is being made, builds on it"
    return Constraints(guarded, {**held.failed_sets, **held.broken_sets}, in_use, may_go)
