# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What one hypervisor tells, and what stands in the directory of the reports, costs that record, and not the report."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.hostile import ask, said
from ansible_collections.vmfleet.backup.tests.harness.reports import ID, a_set, a_vm, failed, of_a_fleet, told

if t.TYPE_CHECKING:
    from pathlib import Path

NUMBERS = (-1, 1.5, True, "1", None, 2**63, 2**64, [])
TIMES = ("now", "2026-02-30T01:00:00Z", 1, None)

SETS: dict[str, tuple[t.Any, ...]] = {
    "id": ("", "../s1", "a/b", 1, None),
    "started": (*TIMES, ""),
    "duration": (-1, "1", None),
    "bytes": NUMBERS,
    "level": (1, "<b>", None),
    "consistency": ("", "none", 1),
    "chain": (*NUMBERS, 0),
    "verified": ("<script>", 1, None),
}
VMS: dict[str, tuple[t.Any, ...]] = {
    "name": ("", 1, None, []),
    "state": ("", "done", 1, None),
    "changed": ("yes", 1, None),
    "error": (1, None, ["x"], "x" * 70000),
    "warnings": ("x", [1], None, {}),
    "frozen_ms": NUMBERS,
    "set": ([], "x", {}, 1),
    "last": ([], "x", {}, 1),
    "damage": (1, None),
    "verified_at": TIMES,
}
RECORDS: dict[str, tuple[t.Any, ...]] = {
    "repository": (1, None),
    "id": ("../up", 1, None),
    "written": TIMES,
    "error": (1, None),
    "vms": (None, {}, "x", [None], [[]], ["x"]),
}
ODD = [
    *(told(a_vm(set=a_set(**{name: value}))) for name, values in SETS.items() for value in values),
    *(told({**a_vm(), name: value}) for name, values in VMS.items() for value in values),
    *({**told(), name: value} for name, values in RECORDS.items() for value in values),
    *({name: value for name, value in told(a_vm()).items() if name != missing} for missing in RECORDS),
    *([], ["x"], "x", 1, True),
]
"""What no honest hypervisor tells."""
REPORTS = {
    "nothing": b"",
    "half": b'{"schema": 1',
    "a list": b"[]",
    "null": b"null",
    "bytes": bytes(range(256)),
    "deep": b'{"schema": 1, "id": ' + b"[" * 100000,
    "newer": json.dumps({**of_a_fleet(1, 1), "schema": 2}).encode(),
    "another id": json.dumps({**of_a_fleet(1, 1), "id": "another"}).encode(),
    "leads out": json.dumps({**of_a_fleet(1, 1), "id": "../up"}).encode(),
    "no summary": json.dumps({**of_a_fleet(1, 1), "summary": {}}).encode(),
    "odd number": json.dumps({**of_a_fleet(1, 1), "summary": {**of_a_fleet(1, 1)["summary"], "bytes": -1}}).encode(),
    "not a number": json.dumps({**of_a_fleet(1, 1), "written": float("nan")}).encode(),
    "odd hypervisor": json.dumps({**of_a_fleet(1, 1), "hypervisors": [{"name": 1}]}).encode(),
}


@pytest.mark.usefixtures("canary")
def test_odd_records_of_hypervisors(directory: Path) -> None:
    """All of them in one run, beside one that is honest."""
    assert len(ODD) > 90
    hypervisors = {"hv": told(a_vm(), failed()), **{f"odd{number}": record for number, record in enumerate(ODD)}}
    result = ask("backup_report", {"directory": str(directory / "reports"), "id": ID, "hypervisors": hypervisors})
    assert not result["rc"], result
    report = json.loads((directory / "reports" / f"{ID}.json").read_text())
    found = {one["name"]: one for one in report["hypervisors"]}
    assert (found["hv"]["state"], len(found["hv"]["vms"])) == ("reported", 2)
    for number, record in enumerate(ODD):
        one = found[f"odd{number}"]
        assert (one["state"], one["vms"]) == ("failed", []), record
        # Nothing at all is what one tells that could not be reached.
        assert not record or "cannot be used" in one["error"], record
    assert report["summary"]["vms"] == 2
    page = (directory / "reports" / f"{ID}.html").read_text()
    assert "<script>" not in page.partition("<body")[2]
    # The next run of the day reads it, and so does one that repeats this one.
    for set_id in (ID, "next"):
        args = {"directory": str(directory / "reports"), "id": set_id, "hypervisors": {"hv": told(a_vm())}}
        again = ask("backup_report", args)
        assert (again["rc"], again.get("warnings", [])) == (0, [])


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("content", REPORTS.values(), ids=list(REPORTS))
def test_odd_reports_in_the_directory(directory: Path, content: bytes) -> None:
    place = directory / "reports"
    place.mkdir()
    args = {"directory": str(place), "hypervisors": {"hv": told(a_vm())}}
    for name in ("older", ID):
        (place / f"{name}.json").write_bytes(content)
    result = ask("backup_report", {**args, "id": ID})
    assert not result["rc"], result
    for name in ("older", ID):
        assert f"{place}/{name}.json is left out" in said(result), result
    assert json.loads((place / f"{ID}.json").read_text())["summary"]["published"] == 1
    assert (place / "index.html").exists()


@pytest.mark.parametrize("result", [1, "x", [], {}, {"name": 1, "state": "published"}, {"name": "a", "state": "done"}])
def test_odd_results_are_no_metrics(directory: Path, result: t.Any) -> None:
    args = {"repository": str(directory), "id": ID, "results": [result], "directory": str(directory)}
    found = ask("backup_metrics", args)
    assert found["rc"]
    assert "results" in found["msg"]
    assert not list(directory.glob("*.prom"))
