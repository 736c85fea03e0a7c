# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which sets stay, and why: every rule by example, and all of them together on random histories, against a model."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import (
    PERIODS,
    Constraints,
    RetentionDecision,
    Rules,
    decide,
    describe,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image, manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest

MONDAY = datetime(2026, 11, 16, 1, 30, tzinfo=UTC)
DAY = timedelta(days=1)


def made(
    set_id: str, parents: Mapping[str, str | None] | str | None = None, when: datetime = MONDAY, number: int = 1
) -> Manifest:
    """A set of which each disk builds on a set, or on none; of one disk where `parents` is no mapping."""
    below = {"vda": parents} if parents is None or isinstance(parents, str) else parents
    started = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    images = [image(disk, parent) for disk, parent in below.items()]
    return manifest(set_id, *images, sequence=number, started=started)


def daily(*plan: str) -> list[Manifest]:
    """A set a day from Monday on, each told as `id` or `id<parent`."""
    sets = []
    for number, entry in enumerate(plan):
        set_id, _sign, parent = entry.partition("<")
        sets.append(made(set_id, parent or None, MONDAY + number * DAY, number + 1))
    return sets


def kept(decisions: Sequence[RetentionDecision]) -> list[str]:
    return [decision.id for decision in decisions if decision.keep]


def reason(decisions: Sequence[RetentionDecision], set_id: str) -> str:
    return next(decision.reason for decision in decisions if decision.id == set_id)


NOTHING = Constraints()
NOW = MONDAY + 1000 * DAY


class TestRules:
    """Each rule alone."""

    def test_last(self) -> None:
        decisions = decide(daily("a", "b", "c", "d"), Rules(last=2), NOTHING, NOW)
        assert kept(decisions) == ["c", "d"]
        assert [decision.reason for decision in decisions] == ["no rule keeps it", "no rule keeps it", "last", "last"]

    @pytest.mark.parametrize(
        ("rules", "step", "expected", "why"),
        [
            (Rules(hourly=2), timedelta(minutes=20), ["c", "f"], "hourly 2026-11-16 01:00"),
            (Rules(daily=2), timedelta(hours=8), ["c", "f"], "daily 2026-11-16"),
            (Rules(weekly=2), timedelta(days=3), ["e", "f"], "weekly 2026-W48"),
            (Rules(monthly=2), timedelta(days=10), ["e", "f"], "monthly 2026-12"),
            (Rules(yearly=2), timedelta(days=20), ["c", "f"], "yearly 2026"),
        ],
        ids=["hourly", "daily", "weekly", "monthly", "yearly"],
    )
    def test_the_newest_of_each_period(self, rules: Rules, step: timedelta, expected: list[str], why: str) -> None:
        start = MONDAY.replace(minute=0)
        sets = [made(name, None, start + number * step, number) for number, name in enumerate("abcdef")]
        decisions = decide(sets, rules, NOTHING, NOW)
        assert kept(decisions) == expected
        assert reason(decisions, expected[0]) == why

    def test_periods_without_a_set_do_not_count(self) -> None:
        sets = [made("a"), made("b", None, MONDAY + 100 * DAY), made("c", None, MONDAY + 300 * DAY)]
        assert kept(decide(sets, Rules(daily=2), NOTHING, NOW)) == ["b", "c"]

    def test_a_week_at_the_turn_of_the_year_is_one_week(self) -> None:
        eve = datetime(2026, 12, 31, tzinfo=UTC)
        decisions = decide([made("a", None, eve), made("b", None, eve + DAY)], Rules(weekly=5), NOTHING, NOW)
        assert kept(decisions) == ["b"]
        assert reason(decisions, "b") == "weekly 2026-W53"

    def test_within_is_counted_from_the_newest_good_set_and_never_from_now(self) -> None:
        decisions = decide(daily("a", "b", "c", "d"), Rules(within=86400), NOTHING, NOW)
        assert kept(decisions) == ["c", "d"]
        assert reason(decisions, "c") == "within 1 day before set d"
        decisions = decide(daily("a", "b", "c", "d"), Rules(within=86400), Constraints(broken={"d": "x"}), NOW)
        assert kept(decisions) == ["b", "c", "d"]

    def test_nothing_is_counted_from_a_set_of_the_future(self) -> None:
        sets = [*daily("a", "b", "c", "d"), made("e", "d", MONDAY.replace(year=2036), 5)]
        now = MONDAY + 4 * DAY
        decisions = decide(sets, Rules(within=86400), NOTHING, now)
        assert kept(decisions) == ["c", "d", "e"]
        assert reason(decisions, "c") == "within 1 day before set d"
        assert reason(decisions, "e") == "its start 2036-11-16T01:30:00Z is in the future, so its age is unknown"
        # Other rules count, whatever the clocks said, and it can be forgotten.
        assert kept(decide([*sets, made("f", None, now, 6)], Rules(last=1), NOTHING, now)) == ["f"]
        assert kept(decide(sets, Rules(), Constraints(allow_remove_last=True), now)) == []
        # Where it has become the present, it counts.
        assert kept(decide(sets, Rules(within=86400), NOTHING, MONDAY.replace(year=2037))) == ["d", "e"]

    def test_clocks_may_differ_by_a_day(self) -> None:
        sets = daily("a", "b", "c")
        for now, expected in ((MONDAY + DAY, ["b", "c"]), (MONDAY + DAY - timedelta(seconds=1), ["a", "b", "c"])):
            assert kept(decide(sets, Rules(within=86400), NOTHING, now)) == expected

    def test_a_machine_whose_clock_is_far_behind_removes_nothing_by_its_age(self) -> None:
        past = datetime(1970, 1, 1, tzinfo=UTC)
        assert kept(decide(daily("a", "b", "c"), Rules(within=86400), NOTHING, past)) == ["a", "b", "c"]

    def test_rules_add_up(self) -> None:
        decisions = decide(daily("a", "b", "c", "d"), Rules(last=1, daily=2, yearly=1), NOTHING, NOW)
        assert kept(decisions) == ["c", "d"]
        assert reason(decisions, "d") == "last; daily 2026-11-19; yearly 2026"

    def test_the_order_is_that_of_the_making_whatever_the_clocks_said(self) -> None:
        sets = [made("z", None, MONDAY + 9 * DAY, 1), made("y", None, MONDAY, 2), made("x", None, MONDAY, 3)]
        assert kept(decide(sets, Rules(last=1), NOTHING, NOW)) == ["x"]
        assert kept(decide(sets, Rules(daily=2), NOTHING, NOW)) == ["z", "x"]
        # What is from the future is not older than a day.
        assert kept(decide(sets, Rules(within=86400), NOTHING, NOW)) == ["z", "y", "x"]

    def test_no_sets(self) -> None:
        assert decide([], Rules(last=1, within=1), NOTHING, NOW, consolidate=True) == ()

    def test_which_rules_say_nothing(self) -> None:
        assert Rules().empty
        assert not any(Rules(**{name: 1}).empty for name in ("last", "within", *PERIODS))


class TestGuards:
    """What keeps sets besides the rules."""

    def test_what_a_kept_set_builds_on(self) -> None:
        decisions = decide(
            daily("a", "b<a", "c<b", "d", "e<d"), Rules(), Constraints(guarded={"b": "it is protected"}), NOW
        )
        assert kept(decisions) == ["a", "b", "d", "e"]
        assert [reason(decisions, name) for name in "abde"] == [
            "set b builds on it",
            "it is protected",
            "set e builds on it",
            "it is the newest good set",
        ]

    def test_each_disk_has_its_own_chain(self) -> None:
        sets = [made("a", {"vda": None, "vdb": None}), made("b", {"vda": "a", "vdb": None}), made("c", {"vdb": "b"})]
        assert kept(decide(sets, Rules(last=1), NOTHING, NOW)) == ["a", "b", "c"]

    def test_the_newest_good_set_goes_only_where_it_may(self) -> None:
        sets = daily("a", "b")
        assert kept(decide(sets, Rules(), NOTHING, NOW)) == ["b"]
        assert kept(decide(sets, Rules(), Constraints(allow_remove_last=True), NOW)) == []
        assert kept(decide(sets, Rules(last=1), Constraints(allow_remove_last=True), NOW)) == ["b"]

    def test_broken_sets_do_not_count_and_are_left_alone(self) -> None:
        decisions = decide(daily("a", "b", "c<b"), Rules(last=1), Constraints(broken={"c": "image gone"}), NOW)
        assert kept(decisions) == ["b", "c"]
        assert reason(decisions, "c") == "it is broken, and left alone: image gone"
        assert reason(decisions, "b") == "last; set c builds on it"
        decisions = decide(daily("a", "b", "c"), Rules(daily=1), Constraints(broken={"c": "image gone"}), NOW)
        assert kept(decisions) == ["b", "c"]

    def test_a_vm_that_is_forgotten_loses_its_broken_sets_and_no_guarded_ones(self) -> None:
        condition = Constraints(
            guarded={"b": "it is protected"}, broken={"d": "gone", "b": "gone"}, allow_remove_last=True
        )
        assert kept(decide(daily("a", "b<a", "c", "d"), Rules(), condition, NOW)) == ["a", "b"]
        # With a rule, somebody still cares for this VM.
        assert kept(decide(daily("a", "b<a", "c", "d"), Rules(last=1), condition, NOW)) == ["a", "b", "c", "d"]


class TestConsolidation:
    """Increments that become full."""

    def consolidated(self, sets: Sequence[Manifest], rules: Rules, condition: Constraints = NOTHING) -> list[str]:
        return [
            decision.id for decision in decide(sets, rules, condition, NOW, consolidate=True) if decision.consolidate
        ]

    def test_the_oldest_that_is_kept_and_what_it_builds_on_goes(self) -> None:
        decisions = decide(daily("a", "b<a", "c<b", "d<c"), Rules(last=2), NOTHING, NOW, consolidate=True)
        assert kept(decisions) == ["c", "d"]
        assert [decision.id for decision in decisions if decision.consolidate] == ["c"]
        assert kept(decide(daily("a", "b<a", "c<b", "d<c"), Rules(last=2), NOTHING, NOW)) == ["a", "b", "c", "d"]

    def test_not_where_nothing_could_go(self) -> None:
        assert self.consolidated(daily("a", "b<a"), Rules(last=2)) == []
        assert self.consolidated(daily("a", "b<a", "c<a"), Rules(last=2)) == []
        assert self.consolidated(daily("a", "b<a", "c<b"), Rules(last=1), Constraints(guarded={"a": "x"})) == []

    def test_not_what_is_broken_nor_under_it(self) -> None:
        sets = daily("a", "b<a", "c<b", "d<c")
        assert self.consolidated(sets, Rules(last=1), Constraints(broken={"c": "x"})) == []
        assert self.consolidated(sets, Rules(last=1), Constraints(broken={"d": "x"})) == ["c"]

    def test_not_what_is_read_at_this_moment(self) -> None:
        sets = daily("a", "b<a", "c<b", "d<c")
        for read in ("c", "d"):
            condition = Constraints(guarded={read: "x"}, in_use={read: "x"})
            assert self.consolidated(sets, Rules(last=2), condition) == []

    def test_one_of_each_chain(self) -> None:
        sets = daily("a", "b<a", "c<b", "x", "y<x", "z<y")
        rules = Rules()
        guarded = Constraints(guarded={"b": "p", "c": "p", "y": "p"})
        assert self.consolidated(sets, rules, guarded) == ["b", "y"]

    def test_one_makes_way_for_another(self) -> None:
        sets = [
            made("a", {"vda": None, "vdb": None}),
            made("b", {"vda": None, "vdb": "a"}),
            made("c", {"vda": "a"}),
            made("d", {"vda": "b"}),
        ]
        # As long as d needs b, and b needs a, nothing would be won by a full c.
        assert self.consolidated(sets, Rules(last=2)) == ["c", "d"]

    def test_of_two_disks_one_is_full_already(self) -> None:
        sets = [made("a", {"vda": None, "vdb": None}), made("b", {"vda": "a", "vdb": None})]
        assert self.consolidated(sets, Rules(last=1)) == ["b"]


def test_text_for_people_is_newest_first() -> None:
    decisions = decide(daily("a", "b<a", "c<b"), Rules(last=2), NOTHING, NOW, consolidate=True)
    assert describe("web01", decisions) == [
        "keep         web01/c  last",
        "consolidate  web01/b  last; set c builds on it",
        "remove       web01/a  no rule keeps it",
    ]


# Random histories


def random_sets(chance: random.Random) -> list[Manifest]:
    """A history of up to four disks: fulls, increments and differentials, sets that lack disks, clocks that jump."""
    when = MONDAY
    sets: list[Manifest] = []
    for number in range(chance.randint(0, 12)):
        when += chance.choice([timedelta(), timedelta(hours=1), DAY, DAY, 8 * DAY, 40 * DAY, timedelta(hours=-30)])
        parents: dict[str, str | None] = {}
        for disk in chance.sample(["vda", "vdb", "vdc", "vdd"], chance.randint(1, 3)):
            others = [before for before in sets if before.disk(disk)]
            fulls = [before for before in others if before.disk(disk).level == "full"]  # type: ignore[union-attr]
            kind = chance.choice(["full", "incremental", "incremental", "incremental", "differential"])
            base = {"full": [], "incremental": others, "differential": fulls}[kind]
            parents[disk] = base[-1].id if base else None
        sets.append(made(f"s{number}", parents, when, number + 1))
    return sets


def random_rules(chance: random.Random) -> Rules:
    counts = {name: chance.choice([0, 0, 0, 1, 2, 4]) for name in ("last", *PERIODS)}
    return Rules(**counts, within=chance.choice([0, 0, 3600, 86400, 30 * 86400]))


def random_condition(chance: random.Random, sets: Sequence[Manifest]) -> Constraints:
    def some(likely: float) -> dict[str, str]:
        return {one.id: "so" for one in sets if chance.random() < likely}

    in_use = some(0.05)
    return Constraints({**some(0.1), **in_use}, some(0.15), in_use, allow_remove_last=chance.random() < 0.2)


class Model:
    """The same said in another way: for each set alone, with sets and recursion, and without any care for speed."""

    def __init__(
        self, sets: Sequence[Manifest], rules: Rules, condition: Constraints, now: datetime, consolidate: bool
    ) -> None:
        self.sets = sets
        self.now = now
        self.rules = rules
        self.condition = condition
        self.below = {one.id: {disk.parent.id for disk in one.disks if disk.parent} for one in sets}
        self.own = {one.id for number, one in enumerate(sets) if self._for_its_own_sake(number)}
        self.full: set[str] = set()
        while consolidate:
            more = {one.id for one in reversed(sets) if one.id not in self.full and self._becomes_full(one)}
            if not more:
                break
            self.full.add(max(more))
        self.kept = self.own | self._needs(self.own, self.full)

    def _needs(self, names: set[str], full: set[str]) -> set[str]:
        direct = {parent for name in names - full for parent in self.below[name]}
        return direct | self._needs(direct, full) if direct else set()

    def _for_its_own_sake(self, number: int) -> bool:
        one, rules, condition = self.sets[number], self.rules, self.condition
        if one.id in condition.guarded:
            return True
        if one.id in condition.broken:
            return not condition.allow_remove_last or not rules.empty
        newer = [other for other in self.sets[number + 1 :] if other.id not in condition.broken]
        return (
            (not newer and not condition.allow_remove_last)
            or len(newer) < rules.last
            or any(self._newest_of_its(period, one, newer) for period in PERIODS)
            or bool(rules.within and (self._ahead(one) or self._is_within(one, newer)))
        )

    def _ahead(self, one: Manifest) -> bool:
        return moment(one) > self.now + DAY

    def _is_within(self, one: Manifest, newer: Sequence[Manifest]) -> bool:
        newest = [one, *(other for other in newer if not self._ahead(other))][-1]
        return moment(one) >= moment(newest) - timedelta(seconds=self.rules.within)

    def _newest_of_its(self, period: str, one: Manifest, newer: Sequence[Manifest]) -> bool:
        later = {part(period, other) for other in newer}
        return part(period, one) not in later and len(later) < getattr(self.rules, period)

    def _becomes_full(self, one: Manifest) -> bool:
        name = one.id
        readers = set(self.condition.in_use)
        still_needed = self._needs(self.own - {name}, self.full | {name})
        return (
            name in self.own
            and name not in self.condition.broken
            and name not in readers | self._needs(readers, set())
            and not self._needs({name}, set()) & self.own
            and bool(self.below[name] - still_needed)
        )


def moment(one: Manifest) -> datetime:
    return datetime.strptime(one.started, "%Y-%m-%dT%H:%M:%S%z")


def part(period: str, one: Manifest) -> object:
    lengths = {"hourly": 13, "daily": 10, "monthly": 7, "yearly": 4}
    return moment(one).isocalendar()[:2] if period == "weekly" else one.started[: lengths[period]]


def after(sets: Sequence[Manifest], decisions: Sequence[RetentionDecision]) -> list[Manifest]:
    """The sets as they are when all has been done."""
    fate_of = {decision.id: decision for decision in decisions}
    left = []
    for one in sets:
        if fate_of[one.id].consolidate:
            disks = tuple(replace(disk, parent=None, level="full") for disk in one.disks)
            left.append(replace(one, disks=disks, level="full"))
        elif fate_of[one.id].keep:
            left.append(one)
    return left


def check_promises(
    sets: Sequence[Manifest], rules: Rules, condition: Constraints, now: datetime, consolidate: bool
) -> None:
    decisions = decide(sets, rules, condition, now, consolidate)
    assert [decision.id for decision in decisions] == [one.id for one in sets]
    stay = set(kept(decisions))
    full = {decision.id for decision in decisions if decision.consolidate}
    # What a kept set needs is there when all has been done.
    left = after(sets, decisions)
    for one in left:
        assert {disk.parent.id for disk in one.disks if disk.parent} <= {other.id for other in left}
    good = [one.id for one in sets if one.id not in condition.broken]
    if good and not condition.allow_remove_last:
        assert good[-1] in stay
    assert set(condition.guarded) & {one.id for one in sets} <= stay
    assert full <= stay - set(condition.broken)
    assert all(decision.reason for decision in decisions)
    model = Model(sets, rules, condition, now, consolidate)
    assert full.isdisjoint(condition.in_use)
    for name in (*condition.in_use, *full):
        # Nobody reads what is rewritten, and of one chain only one is.
        assert full.isdisjoint(model._needs({name}, set()))
    assert (stay, full) == (model.kept, model.full)
    # A second run has nothing to do.
    again = decide(left, rules, condition, now, consolidate)
    assert kept(again) == [one.id for one in left]
    assert not any(decision.consolidate for decision in again)


@pytest.mark.parametrize("consolidate", [False, True])
def test_random_histories_and_rules(consolidate: bool) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    for number in range(400):
        chance = random.Random(seed + number)
        sets = random_sets(chance)
        condition, rules = random_condition(chance, sets), random_rules(chance)
        now = chance.choice([NOW, MONDAY + chance.randint(-2, 100) * DAY])
        try:
            check_promises(sets, rules, condition, now, consolidate)
        except AssertionError:
            print(f"history {number}: {rules} {condition} {now}")
            for one in sets:
                print(one.id, one.started, {disk.name: disk.parent and disk.parent.id for disk in one.disks})
            raise
