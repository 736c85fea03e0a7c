# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of a run, as data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._report.record import parse_report
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import NO_REASON, Run, collect, covered
from ansible_collections.vmfleet.backup.tests.harness.reports import (
    ID,
    MIB,
    NOW,
    a_set,
    a_vm,
    failed,
    of_a_fleet,
    report,
    told,
)


def test_a_run_without_anything() -> None:
    found = report()
    assert found["hypervisors"] == []
    assert set(found["summary"].values()) == {0, ""}
    assert Run.from_report(found) == Run(ID, NOW, 0, 0, 0, 0.0)


def test_the_summary_counts() -> None:
    frozen = a_set(consistency="filesystem", verified="image", started=f"{ID}T01:29:00Z")
    found = report(
        hv1=told(a_vm("a"), a_vm("b", set=frozen, changed=False), failed("c"), a_vm("d", state="skipped", set=None)),
        hv2=told(failed("e", state="cancelled"), a_vm("f", damage="vda.qcow2 is missing")),
        hv3={},
    )
    assert found["summary"] == {
        "hypervisors": 3,
        "hypervisors_failed": 1,
        "hypervisors_waiting": 0,
        "vms": 6,
        "published": 3,
        "failed": 1,
        "cancelled": 1,
        "skipped": 1,
        "new": 2,
        "bytes": 1800 * MIB,
        "seconds": 120.0,
        "began": f"{ID}T01:29:00Z",
        "frozen": 1,
        "verified": 1,
        "damaged": 1,
    }
    assert Run.from_report(found) == Run(ID, f"{ID}T01:30:00Z", 6, 3, 1800 * MIB, 120.0)


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0),
        ([(100, 10)], 10),
        ([(100, 10), (105, 10)], 15),
        ([(100, 60), (110, 5)], 60),
        ([(100, 10), (500, 10)], 20),
        ([(100, 10), (100, 20), (120, 5)], 25),
    ],
)
def test_time_counts_once_and_pauses_do_not(spans: list[tuple[float, float]], seconds: float) -> None:
    assert covered(spans) == seconds


def test_a_hypervisor_that_told_nothing_has_failed_or_is_to_come() -> None:
    found = collect(ID, NOW, {"a": {}, "b": {}, "c": {}}, {"a": "no route to host"}, ["a", "b"], None)
    assert [(one["name"], one["state"], one["error"]) for one in found["hypervisors"]] == [
        ("a", "failed", "no route to host"),
        ("b", "waiting", ""),
        ("c", "failed", NO_REASON),
    ]


def test_what_is_known_of_others_stays_when_a_run_is_repeated() -> None:
    before = report(hv1=told(a_vm("a")), hv2=told(a_vm("b")), hv3=told(failed("c")))
    found = collect(ID, NOW, {"hv2": {}, "hv3": told(a_vm("c"))}, {"hv2": "no route to host"}, [], before)
    by_name = {one["name"]: one for one in found["hypervisors"]}
    assert by_name["hv1"] == before["hypervisors"][0]
    # It has its sets, whether it can be reached today or not.
    assert (by_name["hv2"]["state"], by_name["hv2"]["error"]) == ("failed", "no route to host")
    assert [vm["name"] for vm in by_name["hv2"]["vms"]] == ["b"]
    assert by_name["hv3"]["vms"][0]["state"] == "published"
    assert found["summary"]["published"] == 3


@pytest.mark.parametrize(
    ("vm", "reason"),
    [
        ({**a_vm(), "name": 7}, "vms: name: 7 is not a name"),
        (a_vm(set=a_set(bytes=float("nan"))), "vms: set: bytes: nan is not a whole number from 0 on"),
        (a_vm(set=a_set(started="2026-02-30T01:30:00Z")), "vms: set: started: '2026-02-30T01:30:00Z' is not a time"),
        (a_vm(set={}), "vms: set: id: it is missing"),
        ({**a_vm(), "state": "<b>"}, "vms: state: '<b>' is not one of: published,"),
    ],
)
def test_an_odd_record_costs_that_hypervisor_only(vm: dict[str, Any], reason: str) -> None:
    found = report(hv1=told(a_vm()), hv2=told(vm))
    assert (found["summary"]["published"], found["summary"]["hypervisors_failed"]) == (1, 1)
    odd = found["hypervisors"][1]
    assert odd["error"].startswith(f"its result cannot be used: {reason}")
    assert parse_report(json.loads(json.dumps(found))) == found


def test_one_that_is_to_come_takes_nothing_away() -> None:
    before = report(hv1=told(a_vm("a")))
    assert collect(ID, NOW, {"hv1": {}}, {}, ["hv1"], before)["hypervisors"] == before["hypervisors"]


@pytest.mark.parametrize(
    "found",
    [
        {},
        [],
        {"id": ID},
        {**of_a_fleet(1, 1), "schema": 2},
        {**of_a_fleet(1, 1), "hypervisors": [{}]},
        {**of_a_fleet(1, 1), "summary": {}},
        {**of_a_fleet(1, 1), "summary": {**of_a_fleet(1, 1)["summary"], "began": "yesterday"}},
        {**of_a_fleet(1, 1), "summary": {**of_a_fleet(1, 1)["summary"], "bytes": -1}},
        {**of_a_fleet(1, 1), "summary": {**of_a_fleet(1, 1)["summary"], "vms": "all"}},
    ],
)
def test_what_is_no_report_is_none(found: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_report(found)
