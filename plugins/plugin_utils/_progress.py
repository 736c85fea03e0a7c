# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How far the sets of one hypervisor are, as lines for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import BAD, STATES, UNFINISHED, VmState
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import human
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome

WINDOW = 30.0
"""Seconds over which the rate is taken: long enough to be steady, short enough to be of now."""

SOONEST = 5.0
"""Seconds that have to be seen before anything is said of the time that is left."""

WIDTH = 20


@dataclass(frozen=True)
class Standing:
    """How far VMs are: how many are in each of STATES, and how many bytes of how many are copied.

    C(guessed) tells that nobody knows yet how many there are.
    """

    states: tuple[int, ...]
    copied: int
    total: int
    guessed: bool

    @classmethod
    def sum(cls, several: Iterable[Standing]) -> Standing:
        """All of them together."""
        among = list(several)
        return cls(
            tuple(map(sum, zip(*(each.states for each in among)))),
            sum(each.copied for each in among),
            sum(each.total for each in among),
            any(each.guessed for each in among),
        )

    @property
    def unfinished(self) -> int:
        """How many are not at their end."""
        return sum(self.states[STATES.index(state)] for state in UNFINISHED)

    @property
    def counts(self) -> str:
        """How many are where."""
        found = {state: count for state, count in zip(STATES, self.states) if count}
        done = f"{found.pop(VmState.PUBLISHED, 0)} of {sum(self.states)} VMs done"
        return ", ".join((done, *(f"{count} {state}" for state, count in found.items())))

    @property
    def amount(self) -> str:
        """How much is copied; empty where nothing is to be copied."""
        about = "about " if self.guessed else ""
        percent = _percent(self.copied, self.total)
        return f"{human(self.copied)} of {about}{human(self.total)} ({percent} %)" if self.total else ""


class _Share:
    """One VM's share of the bytes to copy."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        """What the plan says: the size of the images, which is less than what the jobs go through."""
        self.len = 0
        self.copied = 0
        self.waits = False
        """Whether nobody knows yet how much there is to copy."""

    def note(self, outcome: Outcome) -> None:
        if outcome.len:
            self.len, self.copied = outcome.len, outcome.offset
        elif outcome.state == VmState.RUNNING:
            # Its jobs are gone already, or not there yet.
            self.copied = self.len
        elif outcome.state == VmState.PUBLISHED and outcome.changed:
            self.len = self.copied = self.len or self.expected
        elif outcome.state != VmState.QUEUED:
            self.len = self.copied
        self.waits = outcome.state in UNFINISHED and not self.len


class Progress:
    """What is told of one hypervisor.

    C(label) begins every line; C(expected) are the bytes that the plan has for each VM.
    """

    def __init__(self, label: str, expected: Sequence[int]) -> None:
        self._label = label
        self._shares = [_Share(each) for each in expected]
        self._outcomes: Sequence[Outcome] = ()
        self._seen: list[tuple[float, int]] = []
        self._told: set[str] = set()

    def note(self, now: float, outcomes: Sequence[Outcome]) -> None:
        """Take in where the VMs are at a time of the monotonic clock; always all of them, in the same order."""
        self._outcomes = outcomes
        for share, outcome in zip(self._shares, outcomes):
            share.note(outcome)
        self._seen.append((now, sum(share.copied for share in self._shares)))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW:
            del self._seen[0]

    def lines(self, bars: bool) -> list[str]:
        """What there is to tell now: what has failed since the last time, all VMs in one line, and those that run."""
        running = [outcome for outcome in self._outcomes if outcome.state == VmState.RUNNING] if bars else []
        width = column(outcome.name for outcome in running)
        shares = (share for share, outcome in zip(self._shares, self._outcomes) if outcome.state == VmState.RUNNING)
        drawn = [_bar(outcome, share, width) for outcome, share in zip(running, shares)]
        return [self.about(line) for line in (*self._news(), self._overview(), *drawn)]

    @property
    def standing(self) -> Standing:
        """Where all VMs are together."""
        states = [outcome.state for outcome in self._outcomes]
        counts = tuple(states.count(state) for state in STATES)
        copied = sum(share.copied for share in self._shares)
        return Standing(counts, copied, self._total(), any(share.waits for share in self._shares))

    def about(self, text: str) -> str:
        """A line that is about this hypervisor."""
        return f"{self._label} {text}"

    def _news(self) -> list[str]:
        bad = [outcome for outcome in self._outcomes if outcome.state in BAD]
        news = [outcome for outcome in bad if outcome.name not in self._told]
        self._told.update(outcome.name for outcome in news)
        return [f"{outcome.name} {outcome.state}: {outcome.error}" for outcome in news]

    def _overview(self) -> str:
        standing = self.standing
        return "; ".join((standing.counts, *self._amounts(standing)))

    def _amounts(self, standing: Standing) -> list[str]:
        copied, total, amount = standing.copied, standing.total, standing.amount
        if not amount:
            return []
        span = self._seen[-1][0] - self._seen[0][0]
        if copied == total or span <= 0:
            return [amount]
        # A set that had to be begun anew goes backwards.
        rate = max(0.0, (copied - self._seen[0][1]) / span)
        speed = f"{human(int(rate))}/s"
        if span < SOONEST or not rate:
            return [amount, speed]
        return [amount, speed, f"{duration((total - copied) / rate)} left"]

    def _total(self) -> int:
        """All bytes there are to copy; of those that wait, guessed by how far the plan was out for the others."""
        begun = [share for share in self._shares if share.len and share.expected]
        expected = sum(share.expected for share in begun)
        scale = sum(share.len for share in begun) / expected if expected else 1.0
        return sum(share.len or int(share.expected * scale * share.waits) for share in self._shares)


def standing_of(expected: Sequence[int], outcomes: Sequence[Outcome]) -> Standing:
    """Where VMs are that nobody has followed so far."""
    progress = Progress("", expected)
    progress.note(0.0, outcomes)
    return progress.standing


def _bar(outcome: Outcome, share: _Share, width: int) -> str:
    done = _percent(share.copied, share.len)
    filled = done * WIDTH // 100
    amount = f"{human(share.copied)} of {human(share.len)}" if outcome.len else outcome.reason
    return f"  {outcome.name:{width}}  [{'#' * filled}{'.' * (WIDTH - filled)}] {done:3} %  {amount}"


def _percent(part: int, whole: int) -> int:
    """Rounded down: 100 is all of it."""
    return part * 100 // whole if whole else 0


def duration(seconds: float) -> str:
    """C(45 s), C(12 min), C(3 h 05 min), C(4 d 2 h)"""
    if seconds < 100:
        return f"{max(1.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
