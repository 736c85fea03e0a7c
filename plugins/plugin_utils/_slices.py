# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many calls of backup_set, each for those that the one before has left unfinished, as if they had been one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import (
    UNFINISHED,
    Outcome,
    diff,
    failure,
    outcome_of,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

WATCHED = (2.0, 30.0)
"""Seconds of the first slice, and of the longest, where somebody looks on: most sets are small."""

UNWATCHED = (10.0, 60.0)
"""The same where nobody does: each slice is one more call of the module."""

GROWTH = 1.5
KEPT = ("changed", "qmp", "warnings", "deprecations", "invocation")
"""What is told in the end of each call."""


class Slices:
    """The calls for one plan, as backup_plan has returned it; C(lengths) is WATCHED or UNWATCHED."""

    def __init__(self, plan: Mapping[str, Any], lengths: tuple[float, float] = WATCHED) -> None:
        self._plan = plan
        self.length, self._longest = lengths
        """The seconds of the next call."""
        self._calls: list[Mapping[str, Any]] = []
        self._outcomes: dict[int, Outcome] = {}
        """By the VM's place in the plan."""
        self._next = list(range(len(plan["vms"])))

    @property
    def id(self) -> str:
        """The id of the sets."""
        return str(self._plan["id"])

    @property
    def outcomes(self) -> list[Outcome]:
        """Where every VM is now, in the plan's order; nothing before the first call has come back."""
        return [outcome for _place, outcome in sorted(self._outcomes.items())]

    @property
    def unfinished(self) -> list[str]:
        """The VMs that are not at their end."""
        return [outcome.name for outcome in self.outcomes if outcome.state in UNFINISHED]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the next call is about."""
        if not self._calls:
            return {"plan": self._plan, "slice": self.length}
        # What was to be made is made by now: a repository that is missing has gone away.
        rest = {"vms": [self._plan["vms"][place] for place in self._next], "create_repository": False}
        return {"plan": {**self._plan, **rest}, "slice": self.length}

    def note(self, result: Mapping[str, Any]) -> None:
        """Take in what such a call has returned, which may be about more VMs."""
        # Of those before, what is not told in the end is let go: there may be thousands, each with all VMs.
        self._calls[-1:] = [{key: call[key] for key in KEPT if key in call} for call in self._calls[-1:]]
        self._calls.append(result)
        self.length = min(self.length * GROWTH, self._longest)
        # Several may have the same name, and fail for that.
        found: dict[str, list[Outcome]] = {}
        for one in map(outcome_of, result["vms"]):
            found.setdefault(one.name, []).append(one)
        for place in self._next:
            outcome, before = found[self._plan["vms"][place]["name"]].pop(0), self._outcomes.get(place)
            if before:
                # A call knows of itself only.
                warnings = tuple(dict.fromkeys((*before.warnings, *outcome.warnings)))
                outcome = replace(outcome, changed=before.changed or outcome.changed, warnings=warnings)
            self._outcomes[place] = outcome
        self._next = [place for place in self._next if self._outcomes[place].state in UNFINISHED]

    def result(self) -> dict[str, Any]:
        """What one call to the end would have returned."""
        [*before, last] = self._calls
        # A worker may have made other sets as well, or have been stopped.
        if not before and "headline" in last and len(last["vms"]) == len(self._plan["vms"]):
            return dict(last)
        return self._merged(self._calls[-1], failure(self.outcomes, self.id, "completed"))

    def broken_off(self, error: Mapping[str, Any]) -> dict[str, Any]:
        """What is returned where a call has failed as a whole."""
        if not self._calls:
            return dict(error)
        return self._merged(error, f"{error['msg']}; {self.how_to_go_on()}")

    def how_to_go_on(self) -> str:
        """What is to be said where nobody follows the sets any more."""
        names = self.unfinished
        return (
            f"{len(names)} of {len(self.outcomes)} VMs are unfinished, and their copies may still run:"
            f" {', '.join(names)}. Run the backup again with id {self.id} to continue them"
        )

    def _merged(self, last: Mapping[str, Any], error: str) -> dict[str, Any]:
        outcomes = self.outcomes
        calls = [*self._calls, last] if last is not self._calls[-1] else self._calls
        merged: dict[str, Any] = {
            **last,
            "invocation": self._calls[0].get("invocation", {}),
            "changed": any(call.get("changed") for call in calls),
            **told(outcomes, "completed"),
            "qmp": [command for call in calls for command in call.get("qmp", ())],
            "diff": diff(outcomes),
        }
        for key in ("warnings", "deprecations"):
            said: list[Any] = []
            for each in (one for call in calls for one in call.get(key, ())):
                if each not in said:
                    said.append(each)
            if said:
                merged[key] = said
        # These speak of the last call only.
        for key in ("failed", "msg", "exception"):
            merged.pop(key, None)
        return {**merged, "failed": True, "msg": error} if error else merged
