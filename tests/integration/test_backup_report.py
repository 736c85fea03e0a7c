# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_report: what is written for one run, beside those of others."""

from __future__ import annotations

import json
import os
import re
import stat
import typing as t
from dataclasses import dataclass

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_charts import BARS
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.reports import a_set, a_vm, failed, told

if t.TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Reports:
    """The directory of the reports."""

    path: Path

    def arguments(self, set_id: str, **hypervisors: dict[str, t.Any]) -> dict[str, t.Any]:
        return {"directory": str(self.path), "id": set_id, "hypervisors": hypervisors}

    def write(self, set_id: str, check: bool = False, **hypervisors: dict[str, t.Any]) -> dict[str, t.Any]:
        return succeed("backup_report", self.arguments(set_id, **hypervisors), check=check, diff=True)

    def of_day(self, day: int) -> dict[str, t.Any]:
        """The report of a day in which all went well."""
        done = a_set(id=f"2026-11-{day:02}", started=f"2026-11-{day:02}T01:30:00Z")
        return self.write(f"2026-11-{day:02}", hv1=told(a_vm(set=done, last=done)))

    def data(self, set_id: str) -> dict[str, t.Any]:
        return dict(json.loads((self.path / f"{set_id}.json").read_text()))

    def links(self, set_id: str) -> list[str]:
        """The links at the top of a page."""
        return re.findall(r'href="([^"]*)"', self.page(set_id).partition("<nav>")[2].partition("</nav>")[0])

    def page(self, set_id: str) -> str:
        return (self.path / f"{set_id}.html").read_text()


@pytest.fixture
def reports(directory: Path) -> Reports:
    return Reports(directory / "some" / "reports")


def test_four_files_for_everybody_to_read(reports: Reports) -> None:
    found = reports.of_day(22)
    assert found["changed"]
    assert (found["page"], found["data"]) == (
        str(reports.path / "2026-11-22.html"),
        str(reports.path / "2026-11-22.json"),
    )
    files = sorted(reports.path.iterdir())
    assert [path.name for path in files] == ["2026-11-22.html", "2026-11-22.json", "_runs.html", "index.html"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}
    assert found["summary"] == reports.data("2026-11-22")["summary"] == found["diff"]["after"]
    assert found["diff"]["before"] == {}


def test_check_mode_writes_nothing(reports: Reports) -> None:
    found = reports.write("s1", check=True, hv1=told(a_vm()))
    assert found["changed"]
    assert found["summary"]["published"] == 1
    assert not reports.path.exists()


def test_the_runs_before_are_in_the_chart(reports: Reports) -> None:
    for day in (20, 21, 22):
        reports.of_day(day)
    assert "The last 3 runs" in reports.page("2026-11-22")
    assert "2026-11-20: 1 min 00 s" in reports.page("2026-11-22")
    assert reports.page("index") == reports.page("2026-11-22")


def test_each_page_leads_to_its_neighbours_and_to_all_runs(reports: Reports) -> None:
    for day in (20, 21, 23, 22):
        reports.of_day(day)
    neighbours = {day: reports.links(f"2026-11-{day}") for day in (20, 21, 22, 23)}
    assert neighbours == {
        20: ["_runs.html", "2026-11-21.html"],
        21: ["2026-11-20.html", "_runs.html", "2026-11-22.html"],
        22: ["2026-11-21.html", "_runs.html", "2026-11-23.html"],
        23: ["2026-11-22.html", "_runs.html"],
    }
    assert re.findall(r'<td><a href="([^"]*)"', reports.page("_runs")) == [
        f"2026-11-{day}.html" for day in (23, 22, 21, 20)
    ]


def test_the_list_has_runs_of_old_as_well(reports: Reports) -> None:
    ids = [f"r{number:02}" for number in range(BARS + 3)]
    reports.path.mkdir(parents=True)
    reports.of_day(1)
    for number, set_id in enumerate(ids):
        data = json.loads((reports.path / "2026-11-01.json").read_text())
        (reports.path / f"{set_id}.json").write_text(json.dumps({**data, "id": set_id}))
        (reports.path / f"{set_id}.html").touch()
        os.utime(reports.path / f"{set_id}.json", (number, number))
    # No page of a run, and nothing that could be one, is listed.
    (reports.path / "notes.json").write_text("{}")
    (reports.path / "<b>.json").write_text("{}")
    (reports.path / "<b>.html").touch()
    for name in ("notes.json", "<b>.json"):
        os.utime(reports.path / name, (1, 1))
    reports.of_day(2)
    listed = reports.page("_runs").partition("Older runs")
    assert re.findall(r'href="([^"]*)"', listed[2]) == ["r03.html", "r02.html", "r01.html", "r00.html"]
    assert listed[0].count("<td><a") == BARS + 1


def test_a_run_of_old_that_is_repeated_is_not_the_newest(reports: Reports) -> None:
    for day in (20, 22, 20):
        reports.of_day(day)
    assert "<h1>2026-11-22</h1>" in reports.page("index")
    assert "<h1>2026-11-20</h1>" in reports.page("2026-11-20")


def test_repeated_for_some_it_keeps_the_others(reports: Reports) -> None:
    reports.write("s1", hv1=told(a_vm("a")), hv2=told(failed("b")))
    found = reports.write("s1", hv2=told(a_vm("b")))
    assert found["diff"]["before"]["failed"] == 1
    assert found["summary"]["published"] == 2
    assert [one["name"] for one in reports.data("s1")["hypervisors"]] == ["hv2", "hv1"]
    assert list(reports.path.glob("*.json")) == [reports.path / "s1.json"]


def test_repeated_for_some_vms_it_keeps_the_others(reports: Reports) -> None:
    # The first has failed. Then somebody backs up another VM of that hypervisor on the same day, by its name.
    reports.write("s1", hv1=told(failed("a"), a_vm("b")))
    found = reports.write("s1", hv1=told(a_vm("b", changed=False)))
    assert (found["summary"]["vms"], found["summary"]["failed"]) == (2, 1)
    assert {vm["name"]: vm["state"] for vm in reports.data("s1")["hypervisors"][0]["vms"]} == {
        "a": "failed",
        "b": "published",
    }


def test_a_clock_that_is_behind_does_not_make_a_run_an_old_one(reports: Reports) -> None:
    reports.of_day(21)
    late = a_set(id="2026-11-22", started="1970-01-01T00:02:00Z")
    well = a_set(id="2026-11-22", started="2026-11-22T01:30:00Z")
    vms = {f"hv{n}": told(a_vm(f"vm{n}", set=well, last=well)) for n in range(5)}
    reports.write("2026-11-22", **vms, odd=told(a_vm("x", set=late, last=late), failed("db01")))
    assert "<h1>2026-11-22</h1>" in reports.page("index")


def test_runs_at_the_same_time_add_to_each_other(reports: Reports) -> None:
    processes = [
        ModuleProcess("backup_report", reports.arguments("s1", **{f"hv{number}": told(a_vm(f"vm{number}"))}))
        for number in range(6)
    ]
    assert {process.result()["rc"] for process in processes} == {0}
    assert sorted(one["name"] for one in reports.data("s1")["hypervisors"]) == [f"hv{number}" for number in range(6)]
    assert [path for path in reports.path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": "s0"}', '{"schema": 99, "id": "s0"}'])
@pytest.mark.parametrize("name", ["s0", "s1"])
def test_what_is_no_report_does_no_harm(reports: Reports, name: str, text: str) -> None:
    reports.path.mkdir(parents=True)
    (reports.path / f"{name}.json").write_text(text)
    found = reports.write("s1", hv1=told(a_vm()))
    [warning] = found["warnings"]
    assert f"{name}.json is left out" in warning
    assert reports.data("s1")["summary"]["published"] == 1


def test_a_directory_that_cannot_be_made(reports: Reports) -> None:
    reports.path.parent.write_text("in the way")
    assert str(reports.path) in fail("backup_report", reports.arguments("s1"))["msg"]


def test_an_id_leads_nowhere_else(reports: Reports) -> None:
    assert "is no id of a set" in fail("backup_report", reports.arguments("../up"))["msg"]
    assert not reports.path.parent.exists()
