# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many calls that are to look like one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import (
    DiskOutcome,
    Outcome,
    describe,
    diff,
    failure,
    headline,
    results,
    summarize,
)
from ansible_collections.vmfleet.backup.plugins.plugin_utils._slices import UNWATCHED, WATCHED, Slices, outcome_of

PLAN = {
    "id": "s1",
    "repository": "/srv",
    "create_repository": True,
    "vms": [{"name": name, "bytes": 10} for name in ("a", "b", "c")],
}


def call(*outcomes: Outcome, **more: Any) -> dict[str, Any]:
    """What a call of the module returns."""
    error = failure(outcomes, "s1", "completed")
    over = not any(outcome.state in ("running", "queued") for outcome in outcomes)
    return {
        "changed": any(outcome.changed for outcome in outcomes),
        "vms": results(outcomes),
        "summary": summarize(outcomes),
        "headline": headline(outcomes, "completed"),
        "text": describe(outcomes),
        "diff": diff(outcomes),
        "qmp": [],
        "invocation": {"module_args": {"slice": len(outcomes)}},
        **({"failed": True, "msg": error, "exception": "of the module"} if error and over else {}),
        **more,
    }


def published(name: str, **more: Any) -> Outcome:
    return Outcome(name, "s1", "published", "full", 10, path=f"/srv/{name}/s1", **more)


def names(slices: Slices) -> list[str]:
    return [vm["name"] for vm in slices.arguments["plan"]["vms"]]


def test_the_first_call_is_the_users_own() -> None:
    assert Slices(PLAN).arguments == {"plan": PLAN, "slice": WATCHED[0]}


@pytest.mark.parametrize("lengths", [WATCHED, UNWATCHED])
def test_sets_can_be_followed_for_days(lengths: tuple[float, float]) -> None:
    slices = Slices(PLAN, lengths)
    for _call in range(2000):
        slices.note(call(*(Outcome(name, "s1", "running") for name in "abc")))
    assert slices.arguments["slice"] == lengths[1]
    assert sum("vms" in one for one in slices._calls) == 1


@pytest.mark.parametrize("expected", [WATCHED, UNWATCHED])
def test_slices_grow(expected: tuple[float, float]) -> None:
    first, longest = expected
    slices, lengths = Slices(PLAN, expected), []
    for _number in range(12):
        lengths.append(slices.arguments["slice"])
        slices.note(call(*(Outcome(name, "s1", "running") for name in "abc")))
    assert lengths[:4] == [first, 1.5 * first, 2.25 * first, 3.375 * first]
    assert lengths[-2:] == [longest, longest]
    assert lengths == sorted(lengths)


def test_a_vm_at_its_end_is_not_asked_again() -> None:
    slices = Slices(PLAN)
    slices.note(call(Outcome("a", "s1", "running"), published("b", changed=True), Outcome("c", "s1", "queued")))
    assert names(slices) == ["a", "c"]
    assert slices.unfinished == ["a", "c"]
    slices.note(call(Outcome("a", "s1", "failed", error="full"), Outcome("c", "s1", "running")))
    assert names(slices) == ["c"]
    assert [outcome.name for outcome in slices.outcomes] == ["a", "b", "c"]


def test_a_repository_that_has_gone_away_is_not_made_again() -> None:
    slices = Slices(PLAN)
    slices.note(call(*(Outcome(name, "s1", "running") for name in "abc")))
    plan = slices.arguments["plan"]
    assert plan == {**PLAN, "create_repository": False}
    assert PLAN["create_repository"]


def test_one_call_is_returned_as_it_came() -> None:
    slices, only = Slices(PLAN), call(*(published(name) for name in "abc"), warnings=["w"], more=1)
    slices.note(only)
    assert slices.result() == only


def test_many_calls_return_what_one_would_have() -> None:
    slices = Slices(PLAN)
    slices.note(
        call(
            Outcome("a", "s1", "running", warnings=("disk vda is full",), changed=True, offset=1, len=2),
            published("b", changed=True),
            Outcome("c", "s1", "queued"),
            qmp=[{"execute": "transaction"}],
            warnings=["python", "a: disk vda is full"],
            deprecations=["old"],
        )
    )
    # It was published by a process that has not begun it.
    slices.note(
        call(published("a", warnings=("not frozen",)), Outcome("c", "s1", "running", changed=True), warnings=["python"])
    )
    slices.note(call(published("c"), qmp=[{"execute": "job-dismiss"}], warnings=["c: late"], ansible_facts={"x": 1}))
    outcomes = [
        published("a", changed=True, warnings=("disk vda is full", "not frozen")),
        published("b", changed=True),
        published("c", changed=True),
    ]
    assert slices.result() == {
        **call(*outcomes),
        "qmp": [{"execute": "transaction"}, {"execute": "job-dismiss"}],
        "warnings": ["python", "a: disk vda is full", "c: late"],
        "deprecations": ["old"],
        "ansible_facts": {"x": 1},
    }


def test_the_failure_is_that_of_all_vms() -> None:
    slices = Slices(PLAN)
    failed = Outcome("a", "s1", "failed", error="busy")
    slices.note(call(failed, Outcome("b", "s1", "running"), published("c")))
    slices.note(call(published("b", changed=True)))
    result = slices.result()
    assert result["failed"]
    assert result["msg"] == failure([failed, published("b"), published("c")], "s1", "completed")
    assert "exception" not in result


def test_a_failure_of_the_last_call_speaks_of_the_others_too() -> None:
    slices = Slices(PLAN)
    slices.note(call(published("a"), Outcome("b", "s1", "running"), published("c")))
    slices.note(call(Outcome("b", "s1", "failed", error="full")))
    assert slices.result()["msg"].startswith("1 of 3 VMs have no set s1: b: full.")
    assert "exception" not in slices.result()


def test_two_of_one_name_are_told_apart() -> None:
    plan = {**PLAN, "vms": [{"name": "a"}, {"name": "a"}, {"name": "c"}]}
    slices = Slices(plan)
    slices.note(call(Outcome("a", "s1", "failed", error="1"), Outcome("a", "s1", "failed", error="2"), published("c")))
    assert [outcome.error for outcome in slices.outcomes] == ["1", "2", ""]


def test_a_first_call_that_fails_as_a_whole_is_returned_as_it_came() -> None:
    error = {"failed": True, "msg": "plan: this is not the plan", "exception": "e"}
    assert Slices(PLAN).broken_off(error) == error


def test_a_later_call_that_fails_as_a_whole_says_what_is_unfinished() -> None:
    slices = Slices(PLAN)
    slices.note(call(Outcome("a", "s1", "running"), published("b", changed=True), Outcome("c", "s1", "queued")))
    result = slices.broken_off({"failed": True, "msg": "repository: gone", "module_stderr": "trace", "rc": 1})
    assert result["failed"]
    assert result["msg"] == (
        "repository: gone; 2 of 3 VMs are unfinished, and their copies may still run: a, c."
        " Run the backup again with id s1 to continue them"
    )
    assert [vm["state"] for vm in result["vms"]] == ["running", "published", "queued"]
    assert (result["changed"], result["module_stderr"], result["summary"]["published"]) == (True, "trace", 1)


def test_what_was_returned_can_be_read_back() -> None:
    disks = (DiskOutcome("vda", "full", "why", None, 7),)
    outcomes = [
        Outcome("web01", "s1", "failed", error="target full", changed=True),
        Outcome("db01", "s1", "published", "full", 3 << 20, 1.25, "crash", path="/srv/db01/s1", changed=True),
        Outcome("db02", "s1", "running", warnings=("careful",), disks=disks, offset=1, len=2),
    ]
    assert [outcome_of(json.loads(json.dumps(found))) for found in results(outcomes)] == outcomes
