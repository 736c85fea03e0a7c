# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One table of the VMs of several hypervisors."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._report.fleet_status import expected_vms, fleet_status

HOUR = 3600
DAY = 24 * HOUR


def row(name: str, age: int = HOUR, **more: Any) -> dict[str, Any]:
    """What backup_info tells of a VM."""
    found = {"name": name, "newest": "2026-11-22", "age": age, "level": "full", "sets": 1, "bytes": 1 << 20}
    return {**found, "verified": "", "ok": True, **more}


def here(
    name: str, *found: dict[str, Any], vms: tuple[str, ...] = (), file: str = "", left: Any = (), **more: Any
) -> dict[str, Any]:
    """What a hypervisor has to tell; C(vms) are those that it has."""
    listed = [{"name": vm, "monitor": f"/run/{vm}.qmp"} for vm in vms]
    info = {"vms": list(found), "leftovers": list(left), "totals": {"sets": sum(vm["sets"] for vm in found)}}
    place = {"name": name, "repository": "/srv/backup", "file": file, "found": info}
    return {**place, "vms": listed, "sockets": [], "running": [], "names": [], **more}


def test_the_table() -> None:
    fleet = [
        here(
            "hv1",
            row("web01", age=50 * HOUR, level="incremental", sets=12, bytes=5 << 30, verified="checksum"),
            row("Pool01", age=5399),
            vms=("web01", "Pool01", "new01"),
            left=[{"vm": "web01", "what": "set s9 is being made"}],
        ),
        here("hv2", row("db01", ok=False, age=DAY), row("old01", age=90 * 60), vms=("db01",), repository="/srv/other"),
    ]
    assert fleet_status(fleet, silent=["hv3"])["text"] == [
        "/srv/backup, /srv/other: 15 sets of 4 VMs, 5.0 GiB; without a good set: 2",
        "  VM        newest set     age  level         sets        size  verified   hypervisor",
        "! new01     none                                 0                         hv1",
        "! db01      2026-11-22    24 h  full             1     1.0 MiB  NOT GOOD   hv2",
        "  old01     2026-11-22     1 h  full             1     1.0 MiB  no         (hv2)",
        "  Pool01    2026-11-22  89 min  full             1     1.0 MiB  no         hv1",
        "  web01     2026-11-22     2 d  incremental     12     5.0 GiB  checksum   hv1",
        "web01: set s9 is being made",
        "! hv3 could not be asked",
    ]


def test_nothing_at_all() -> None:
    assert fleet_status([here("hv1")]) == {
        "text": [
            "/srv/backup: 0 sets of 0 VMs, 0 Bytes; without a good set: 0",
            "  VM        newest set     age  level         sets        size  verified   hypervisor",
        ],
        "bad": {"hv1": []},
        "unknown": [],
        "known": [],
    }


@pytest.mark.parametrize(("max_age", "bad"), [("", []), ("26h", ["a", "b"]), ("2d", ["a"]), ("1w", [])])
def test_a_limit_of_age(max_age: str, bad: list[str]) -> None:
    names = ("a", "b", "c")
    rows = (row("b", age=26 * HOUR + 1), row("a", age=2 * DAY + 1), row("c", age=26 * HOUR))
    found = fleet_status([here("hv1", *rows, vms=names)], max_age)
    limit = f" that is at most {max_age} old" if max_age else ""
    assert found["text"][0].endswith(f"; without a good set{limit}: {len(bad)}")
    assert found["bad"] == {"hv1": bad}
    # Those first that are bad, the oldest of them first.
    assert [line[2] for line in found["text"][2:]] == [*bad, *(name for name in names if name not in bad)]


def test_a_shared_repository_is_told_once_and_each_answers_for_its_own_vms() -> None:
    rows = [row("a", ok=False), row("b", ok=False), row("c"), row("gone", ok=False)]
    left = [{"vm": "a", "what": "a leftover"}]
    found = fleet_status(
        [
            here("hv1", *rows, vms=("a",), file="{uuid}", left=left),
            here("hv2", *rows, vms=("b", "c", "new"), file="{uuid}", left=left),
            here("hv3", *rows, vms=("c",), file="{another}"),
        ]
    )
    cells = [line.split() for line in found["text"][2:]]
    assert [(line[1], line[-1]) for line in cells if line[0] == "!" and line[2] != "none"] == [
        ("a", "hv1"),
        ("b", "hv2"),
        ("gone", "(hv1)"),
        ("a", "(hv3)"),
        ("b", "(hv3)"),
        ("gone", "(hv3)"),
    ]
    assert [(line[0], line[-1]) for line in cells if line[0] == "c"] == [("c", "hv2"), ("c", "hv3")]
    assert found["text"].count("a: a leftover") == 1
    assert found["text"][0].startswith("/srv/backup: 8 sets of 8 VMs, 8.0 MiB; ")
    assert found["bad"] == {"hv1": ["a", "gone"], "hv2": ["b", "new"], "hv3": ["a", "b", "gone"]}


def test_a_vm_of_two_hypervisors_is_the_matter_of_both_but_not_of_the_first() -> None:
    fleet = [here(f"hv{number}", row("a", ok=False), file="{uuid}", vms=("a",)) for number in (2, 3)]
    found = fleet_status([here("hv1", row("a", ok=False), file="{uuid}"), *fleet])
    assert found["text"][2].endswith("  hv2, hv3")
    assert found["bad"] == {"hv1": [], "hv2": ["a"], "hv3": ["a"]}


def test_a_set_of_another_vm_of_the_name_is_none_of_this_one() -> None:
    ids = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")
    running = [[{"monitor": "unix:/run/a.qmp", "name": "a", "uuid": one}] for one in (*ids, "")]
    fleet = [here(f"hv{n}", row("a", uuid=ids[0]), file="{}", running=one) for n, one in enumerate(running, 1)]
    found = fleet_status(fleet, "26h")
    assert found["bad"] == {"hv1": [], "hv2": ["a"], "hv3": []}
    assert found["text"][0].endswith(" old: 1")
    assert [line.split()[-1] for line in found["text"][2:]] == ["hv2", "hv3"]
    assert found["text"][3].endswith("  hv1, hv3")
    # Where the VM is listed under that name.
    listed = [{"name": "a", "monitor": "/run/a.qmp"}]
    called = [{"monitor": "unix:/run/a.qmp", "name": "b", "uuid": ids[1]}]
    assert fleet_status([{**here("hv1", row("a", uuid=ids[0]), running=called), "vms": listed}])["bad"] == {
        "hv1": ["a"]
    }


def test_short_names_and_ids_stand_below_their_titles() -> None:
    title, line = fleet_status([here("hv1", row("a", newest="s1"), vms=("a",))])["text"][1:]
    assert line.index("full") == title.index("level")


def worker(**more: Any) -> dict[str, Any]:
    vms = [{"state": state} for state in ("published", "failed", "running", "queued", "queued")]
    return {"running": True, "pid": 7, "id": "s2", "since": "2026-11-30T01:00:05Z", "vms": vms, **more}


def test_a_worker_is_told() -> None:
    others = [here("hv02", worker={"running": False}), here("hv01 again", worker=worker())]
    *before, line = fleet_status([here("hv01", worker=worker()), *others])["text"]
    assert line == "hv01 makes set s2 since 2026-11-30T01:00:05Z (process 7): 2 of 5 VMs done, 1 running, 2 queued"
    assert not any("makes set" in other for other in before)


@pytest.mark.parametrize("odd", [{"vms": None}, {"since": 1}, {"vms": ["web01"]}])
def test_a_worker_that_is_told_oddly(odd: dict[str, Any]) -> None:
    lines = fleet_status([here("hv01", worker=worker(**odd))])["text"]
    assert lines[-1] == "! the answer of backup_follow about hv01 cannot be used"


def test_names_limit_what_is_missing() -> None:
    found = fleet_status([here("hv1", vms=("a", "b", "c"), names=["b", "x"])])
    assert found["bad"] == {"hv1": ["b"]}


def test_names_are_patterns_and_some_are_left_out() -> None:
    fleet = [{**here("hv1", vms=("web01", "web02", "db01"), names=["web*"]), "exclude_names": ["*2"]}]
    found = fleet_status(fleet)
    assert (found["bad"], found["unknown"]) == ({"hv1": ["web01"]}, [])


def test_a_vm_without_a_set_is_missed_by_what_is_left_of_it() -> None:
    left = [{"vm": name, "what": "it failed"} for name in ("a", "gone", "new")]
    fleet = [here(name, row("a"), vms=vms, file="{uuid}", left=left) for name, vms in (("hv1", ()), ("hv2", ("new",)))]
    found = fleet_status(fleet)
    assert found["bad"] == {"hv1": ["gone"], "hv2": ["new"]}
    assert [line.split() for line in found["text"][2:4]] == [
        ["!", "new", "none", "0", "hv2"],
        ["!", "gone", "none", "0", "(hv1)"],
    ]
    assert found["text"][0].endswith("without a good set: 2")


def test_names_that_nobody_knows() -> None:
    # Each hypervisor is asked for all names, and has some of the VMs.
    names = ["a", "b", "new", "nosuch", "gone"]
    fleet = [
        here("hv1", row("a"), names=names, left=[{"vm": "gone", "what": "it failed"}]),
        here("hv2", row("b"), row("c"), vms=("new",), names=names),
    ]
    found = fleet_status(fleet)
    assert found["unknown"] == ["nosuch"]
    assert found["known"] == ["a", "b", "c", "gone", "new"]
    assert [line.split() for line in found["text"] if "nosuch" in line] == [["!", "nosuch", "none", "0"]]
    assert found["text"][0].endswith("without a good set: 3")


def test_a_long_name_moves_its_own_line_only() -> None:
    lines = fleet_status([here("hv1", row("a"), row("n" * 40), vms=("a", "n" * 40))])["text"][1:]
    places = [line.index("2026-11-22") for line in lines[1:]]
    assert places == [36, 44]
    assert lines[0].index("newest set") == 36


@pytest.mark.parametrize(
    ("listed", "sockets", "running", "expected"),
    [
        ([("/run/a.qmp", "web01")], [], [], ["web01"]),
        # What it calls itself is of no matter where the user has named it.
        ([("/run/a.qmp", "web01")], [], [("unix:/run/a.qmp", "other")], ["web01"]),
        ([("/run/a.qmp", None)], [], [("unix:/run/a.qmp", "other")], ["other"]),
        ([("tcp:[::1]:4444", "web01")], [], [("tcp:[::1]:4444", "other")], ["web01"]),
        # One that does not answer is called after its socket; a pattern is no VM.
        ([], ["/run/*.qmp"], [("unix:/run/a.b.qmp", None)], ["a.b"]),
        (
            [("libvirt:web.01", None), ("tcp:h:4444", None)],
            [],
            [("libvirt:web.01", None), ("tcp:h:4444", None)],
            ["web.01", "tcp:h:4444"],
        ),
        ([("libvirt:web01", None)], [], [("libvirt:web01", "web01")], ["web01"]),
        ([], ["/run/*.qmp", "/run/off.qmp", "/run/[ab]"], [("unix:/run/a.qmp", "web01")], ["web01", "off"]),
        ([], ["/run/a.qmp"], [("unix:/run/a.qmp", "web01")], ["web01"]),
        # Each once.
        ([("/run/a.qmp", "web01")], ["/run/b.qmp"], [("unix:/run/b.qmp", "web01")], ["web01"]),
    ],
)
def test_the_vms_that_there_should_be(
    listed: list[tuple[str, Any]], sockets: list[str], running: list[tuple[str, Any]], expected: list[str]
) -> None:
    def entries(of: list[tuple[str, Any]]) -> list[dict[str, str]]:
        return [{"monitor": monitor, **({"name": name} if name else {})} for monitor, name in of]

    assert expected_vms(entries(listed), sockets, entries(running)) == expected


def test_domains_that_want_no_backup() -> None:
    running = [{"monitor": "libvirt:a", "name": "a", "excluded": True}, {"monitor": "libvirt:b", "excluded": True}]
    assert expected_vms([], [], running) == []
    # What is listed is meant to have sets.
    assert expected_vms([{"monitor": "libvirt:a", "name": "a"}], [], running) == ["a"]


@pytest.mark.parametrize(
    "odd",
    [
        None,
        {},
        {"vms": [], "leftovers": []},
        {"vms": {}, "leftovers": [], "totals": {"sets": 0}},
        {"vms": [row("a", age="old")], "leftovers": [], "totals": {"sets": 1}},  # type: ignore[arg-type]
        {"vms": [row("a", bytes="<b>1</b>")], "leftovers": [], "totals": {"sets": 1}},
        {"vms": [row("a", ok="no")], "leftovers": [], "totals": {"sets": 1}},
        {"vms": [], "leftovers": [1], "totals": {"sets": 0}},
        {"vms": [], "leftovers": [], "totals": {"sets": "0"}},
    ],
)
def test_what_one_hypervisor_tells_oddly_costs_its_own_vms(odd: Any) -> None:
    fleet = [{**here("hv1", vms=("a",)), "found": odd}, here("hv2", row("b"), vms=("b",), repository="/srv/other")]
    found = fleet_status(fleet)
    assert found["bad"] == {"hv1": ["a"], "hv2": []}
    assert "! the answer of backup_info about hv1 cannot be used" in found["text"]
    assert [line.split()[0] for line in found["text"][2:4]] == ["!", "b"]


@pytest.mark.parametrize("odd", ["x", [None], [{}], [{"monitor": 7}], [{"monitor": "/x", "name": []}]])
def test_odd_vms_that_run(odd: Any) -> None:
    found = fleet_status([here("hv1", row("a"), vms=("a",), running=odd)])
    assert found["bad"] == {"hv1": []}
    assert "! the answer of vm_info about hv1 cannot be used" in found["text"]


def test_what_others_have_named_makes_no_line_of_its_own() -> None:
    found = fleet_status([here("hv1", row("a\n! b"), left=[{"vm": "a\x1b", "what": "x\ry"}])])
    assert found["text"][2].startswith(r"! a\x1b ")
    assert r"a\n! b" in found["text"][3]
    assert found["text"][4:] == [r"a\x1b: x\ry"]
