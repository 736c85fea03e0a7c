# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One summary of what several hypervisors have noted."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._report.fleet_summary import fleet_summary

HERE = {"repository": "/srv/backup", "number": 1}
AGAIN = (
    "Remove the reasons, then run it again with the same options and -e vm_backup_id=s1."
    " Sets that exist are not changed:"
)


def vm(name: str, state: str = "published", error: str = "", reason: str = "") -> dict[str, Any]:
    return {"name": name, "state": state, "error": error, "reason": reason}


def done(*vms: dict[str, Any], size: int = 0, **more: Any) -> dict[str, Any]:
    """What backup_set has returned."""
    return {"vms": list(vms), "summary": {"bytes": size}, **more}


def noted(problem: str = "", told: Any = None, use: Any = None, **of_set: Any) -> dict[str, Any]:
    """The variables of a hypervisor that has taken part."""
    return {
        "__vm_backup_use": {"id": "s1", **HERE, **(use or {})},
        "__vm_backup_done": of_set,
        "__vm_backup_told": {} if told is None else {"hypervisor": told},
        "__vm_backup_problem": problem,
        "ansible_host": "192.0.2.1",
    }


def summary(lost: tuple[str, ...] = (), own: bool = True, **hosts: dict[str, Any]) -> dict[str, Any]:
    active = [name for name in hosts if name not in lost]
    return fleet_summary(hosts, list(hosts), active, "s1", HERE if own else None, [] if own else ["my inventory"])


def test_all_is_well() -> None:
    found = summary(
        hv1=noted(**done(vm("a"), vm("b", "skipped", reason="off"), size=3 << 20)),
        hv2=noted(**done(vm("c"), size=1 << 20)),
    )
    assert found["hosts"] == ["hv1", "hv2"]
    assert found["text"] == [
        "Backup s1 of 2 hypervisors: 2 of 3 VMs have their set, 0 failed, 1 skipped, 4.0 MiB written"
    ]


def test_what_went_wrong_comes_last_with_the_way_to_repeat_it() -> None:
    found = summary(
        hv1=noted(**done(vm("a", "failed", error="target full"), vm("b", "cancelled", reason="asked"), msg="2 of 2")),
        hv2=noted("there is no qemu-img"),
        hv3=noted(),
        hv4=noted(**done(vm("c"))),
        hv5=noted("its report could not be written", **done(vm("d"))),
    )
    head, *lines, again, command = found["text"]
    assert head == "Backup s1 of 5 hypervisors: 2 of 4 VMs have their set, 2 failed, 0 skipped, 0 Bytes written"
    assert lines == [
        "FAILED  hv1, a: target full",
        "FAILED  hv1, b: asked",
        "FAILED  hv2: there is no qemu-img",
        "FAILED  hv3: the state of its VMs is unknown; its error is above",
        "FAILED  hv5: its report could not be written",
    ]
    assert again == AGAIN
    assert command == "the playbook of this play, with -e vm_backup_id=s1 --limit hv1,hv2,hv3,hv5"


def test_the_playbook_of_the_collection_is_known_with_its_inventories() -> None:
    found = summary(own=False, hv1=noted("no"), hv2=noted(**done(vm("a"))))
    command = "ansible-playbook -i 'my inventory' vmfleet.backup.backup -e vm_backup_id=s1 --limit hv1"
    assert found["text"][-1] == command


def test_a_vm_that_is_still_copied_has_no_failure() -> None:
    found = summary(hv1=noted(**done(vm("a", "running"))), hv2=noted(**done(vm("b", "queued"))))
    [line] = found["text"]
    assert line.startswith("Backup s1 of 2 hypervisors: 0 of 2 VMs have their set, 0 failed, 0 skipped, ")
    assert line.endswith(", 1 running, 1 queued")


def test_a_problem_of_many_lines_makes_many_lines() -> None:
    found = summary(hv1=noted("first\r\nsecond"), hv2=noted(**done(vm("a"))))
    assert found["text"][1:3] == ["FAILED  hv1: first", "second"]


@pytest.mark.parametrize(
    ("use", "takes_part"),
    [
        ({}, True),
        # It has come later, or with another repository in the same task.
        ({"number": 2}, True),
        ({"repository": "/other"}, True),
        ({"number": 2, "repository": "/other"}, False),
        ({"id": "s0"}, False),
    ],
)
def test_who_takes_part_in_a_use_of_the_role(use: dict[str, Any], takes_part: bool) -> None:
    found = summary(hv1=noted(**done(vm("a"))), hv2=noted(use=use, told={"id": "s0"}, **done(vm("b"))))
    assert found["hosts"] == ["hv1", "hv2"][: 1 + takes_part]
    # One that has taken part in another use is not in the report of this one.
    assert set(found["hypervisors"]) == set(found["hosts"])


def test_all_take_part_in_the_playbook_of_the_collection() -> None:
    found = summary(own=False, hv1=noted(**done(vm("a"))), hv2=noted(use={"id": "s0", "number": 7}, **done(vm("b"))))
    assert found["hosts"] == ["hv1", "hv2"]
    assert "2 of 2 VMs" in found["text"][0]


def test_who_was_lost_before_is_to_be_repeated() -> None:
    found = summary(lost=("hv1",), hv1={}, hv2=noted(**done(vm("a"))))
    assert found["text"][1] == "FAILED  hv1: it failed before; its error is above"
    assert found["text"][-1].endswith("--limit hv1")
    assert (found["hypervisors"], found["errors"], found["pending"]) == (
        {"hv1": {}, "hv2": {}},
        {"hv1": "", "hv2": ""},
        [],
    )


def test_what_is_told_of_another_use_is_not_told_of_this_one() -> None:
    lost = noted(
        "of another use", told={"id": "s0"}, use={"id": "s0"}, **done(vm("b", "failed", error="of another use"))
    )
    found = summary(lost=("hv1",), hv1=lost, hv2=noted(**done(vm("a"))))
    assert found["text"][1] == "FAILED  hv1: it failed before; its error is above"
    assert "1 of 1 VMs" in found["text"][0]
    assert (found["hypervisors"]["hv1"], found["errors"]["hv1"]) == ({}, "")


def test_for_the_report() -> None:
    """Later batches have noted nothing, and are in the play; so may be one whose results are still to come."""
    found = summary(hv1=noted(told={"id": "s1"}, **done(vm("a"))), hv2=noted("no route"), hv3={}, hv4=noted(told=None))
    assert found["hosts"] == ["hv1", "hv2", "hv4"]
    assert found["hypervisors"] == {"hv1": {"id": "s1"}, "hv2": {}, "hv3": {}, "hv4": {}}
    assert found["errors"] == {"hv1": "", "hv2": "no route", "hv3": "", "hv4": ""}
    assert found["pending"] == ["hv2", "hv3", "hv4"]


@pytest.mark.parametrize(
    "odd",
    [
        {"vms": "x"},
        {"vms": None},
        {"vms": [None], "summary": {"bytes": 0}},
        {"vms": [{"name": "a"}], "summary": {"bytes": 0}},
        {"vms": [vm("a", state=7)], "summary": {"bytes": 0}},  # type: ignore[arg-type]
        {"vms": [vm("a", "failed", error=["x"])], "summary": {"bytes": 0}},  # type: ignore[arg-type]
        {"vms": [vm("a")], "summary": {"bytes": "1"}},
        {"vms": [vm("a")], "summary": {"bytes": True}},
        {"vms": [vm("a")], "summary": {"bytes": -1}},
        {"vms": [vm("a")], "summary": []},
        {"vms": [vm("a")]},
    ],
)
def test_odd_notes_cost_their_own_hypervisor(odd: dict[str, Any]) -> None:
    found = summary(hv1=noted(**odd), hv2=noted(**done(vm("b"), size=1024)))
    assert found["text"][:2] == [
        "Backup s1 of 2 hypervisors: 1 of 1 VMs have their set, 0 failed, 0 skipped, 1.0 KiB written",
        "FAILED  hv1: the result of backup_set for its VMs cannot be used",
    ]


def test_what_others_have_named_makes_no_line_of_its_own() -> None:
    found = summary(hv1=noted(**done(vm("a\nFAILED  hv2: b\x1b[2J", "failed", error="c\u2028d"))))
    assert found["text"][1] == r"FAILED  hv1, a\nFAILED  hv2: b\x1b[2J: c\u2028d"


@pytest.mark.parametrize(
    ("names", "unknown"),
    [
        ({"hv1": ["a", "b"], "hv2": ["b", "c"]}, ["b"]),
        ({"hv1": ["a"], "hv2": []}, []),
        # One that could not be asked may have it.
        ({"hv1": ["a"], "hv2": None}, []),
        ({"hv1": ["a"], "hv2": "odd"}, []),
    ],
)
def test_a_name_that_no_hypervisor_knows(names: dict[str, Any], unknown: list[str]) -> None:
    hosts = {name: {**noted(), "__vm_backup_planned": {"unknown": found}} for name, found in names.items()}
    assert summary(**hosts)["unknown"] == unknown


def test_one_that_was_lost_may_have_it() -> None:
    hosts = {"hv1": {**noted(), "__vm_backup_planned": {"unknown": ["a"]}}, "hv2": {}}
    assert summary(lost=("hv2",), **hosts)["unknown"] == []
