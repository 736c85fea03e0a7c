# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the inventory tells of each VM, from the reports of the last runs."""

from __future__ import annotations

import json
import os
import typing as t
from datetime import UTC, datetime

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import collect
from ansible_collections.vmfleet.backup.plugins.module_utils._report.status import status_of_absent
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import vm_directory
from ansible_collections.vmfleet.backup.plugins.plugin_utils._vm_facts import (
    ALL_FACTS,
    RUNS,
    host_names,
    read_reports,
    vm_facts,
    with_age,
)
from ansible_collections.vmfleet.backup.tests.harness.reports import ID, a_set, a_vm, failed, report, told

if t.TYPE_CHECKING:
    from pathlib import Path

LATER = "2026-11-23"


def later(errors: dict[str, str] | None = None, pending: t.Sequence[str] = (), **records: t.Any) -> dict[str, t.Any]:
    """Return the report of the next night."""
    return collect(LATER, f"{LATER}T02:45:10Z", records, errors or {}, pending, None)


def absent(name: str, **last: t.Any) -> dict[str, t.Any]:
    return {**status_of_absent(name), "last": a_set(**last)}


def facts(*reports: dict[str, t.Any]) -> dict[tuple[str, str], dict[str, t.Any]]:
    return {(one["hypervisor"], one["name"]): one for one in vm_facts(reports)}


def test_what_is_known_of_a_vm() -> None:
    blank = failed("new01", last=None)
    found = facts(report(hv1=told(a_vm(), failed(), blank)))
    assert found[("hv1", "web01")] == {
        "name": "web01",
        "hypervisor": "hv1",
        "hypervisor_error": "",
        "repository": "/srv/backup",
        "run": ID,
        "state": "published",
        "error": "",
        "reason": "",
        "damage": "",
        "newest": ID,
        "started": f"{ID}T01:30:00Z",
        "level": "incremental",
        "consistency": "crash",
        "bytes": 600 << 20,
        "chain": 3,
        "verified": "",
        "verified_at": "",
        "age": None,
    }
    db01 = found[("hv1", "db01")]
    assert (db01["state"], db01["newest"]) == ("failed", "2026-11-21")
    assert db01["error"] == "disk vda: No space left on device"
    new01 = found[("hv1", "new01")]
    assert (new01["newest"], new01["started"], new01["level"], new01["bytes"]) == ("", "", "", 0)
    # What a cache gives back is read in the same way.
    assert ALL_FACTS.read(json.loads(json.dumps(list(found.values())))) == list(found.values())


def test_the_age_is_that_of_the_moment() -> None:
    now = datetime(2026, 11, 22, 3, 30, tzinfo=UTC)
    [web01] = vm_facts([report(hv1=told(a_vm()))])
    assert with_age(web01, now)["age"] == 2 * 3600
    assert with_age({**web01, "started": f"{LATER}T01:30:00Z"}, now)["age"] == 0
    assert with_age({**web01, "started": ""}, now)["age"] is None


def test_the_last_word_of_each_hypervisor_counts() -> None:
    first = report(hv1=told(a_vm("web01")), hv2=told(a_vm("db01")), hv3=told(a_vm("app01")))
    second = later({"hv2": "no route to host"}, ["hv3"], hv1=told(failed("web01")), hv2={}, hv3={})
    found = facts(second, first)
    assert [found[("hv1", "web01")][name] for name in ("state", "run")] == ["failed", LATER]
    assert [found[("hv2", "db01")][name] for name in ("state", "run")] == ["published", ID]
    assert found[("hv2", "db01")]["hypervisor_error"] == "no route to host"
    # It may still report.
    assert (found[("hv3", "app01")]["run"], found[("hv3", "app01")]["hypervisor_error"]) == (ID, "")


def test_a_run_for_some_vms_does_not_hide_the_others() -> None:
    first = report(hv1=told(a_vm("web01"), failed("new01", last=None)))
    found = facts(later(hv1=told(a_vm("web01"))), first)
    assert {vm: one["run"] for (_host, vm), one in found.items()} == {"web01": LATER, "new01": ID}


@pytest.mark.parametrize("before", [told(a_vm()), told(absent("web01"))], ids=["in a run", "absent"])
def test_a_vm_that_has_moved_is_one(before: dict[str, t.Any]) -> None:
    first = report(hv1=before)
    found = facts(later(hv1=told(), hv2=told(failed("web01"))), first)
    assert list(found) == [("hv2", "web01")]
    # Both repositories have sets of it, and one of the two has it now.
    old = absent("web01", id="s1", started="2026-11-01T01:30:00Z")
    assert list(facts(report(hv1=told(old), hv2=told(a_vm())))) == [("hv2", "web01")]
    # None of them has: the newer set counts.
    assert list(facts(report(hv1=told(old), hv2=told(absent("web01"))))) == [("hv2", "web01")]


def test_two_of_one_name_are_two() -> None:
    vms = vm_facts([report(hv1=told(a_vm(), a_vm("db01")), hv2=told(a_vm()))])
    assert host_names(vms, ()) == ["web01@hv1", "web01@hv2", "db01"]


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("web01", "web01"),
        ("localhost", "localhost@hv1"),
        # That of a hypervisor: its tasks would run for another host, too.
        ("hv1", "hv1@hv1"),
        ("{{ lookup('pipe', 'id') }}", "lookup_pipe_id_-{mark}"),
        ("a\nb", "a_b-{mark}"),
        ("web:&db", "web_db-{mark}"),
    ],
)
def test_hosts_have_plain_names(name: str, host: str) -> None:
    [vm] = vm_facts([report(hv1=told(a_vm(name)))])
    assert vm["name"] == name
    assert host_names([vm], {"localhost"}) == [host.format(mark=vm_directory(name)[-8:])]


class TestReports:
    def write(self, directory: Path, number: int, **hypervisors: t.Any) -> Path:
        found = {**report(**hypervisors), "id": f"s{number}", "written": f"2026-11-{number:02}T02:45:10Z"}
        path = directory / f"s{number}.json"
        path.write_text(json.dumps(found))
        os.utime(path, (number, number))
        return path

    def test_the_last_run_comes_first_and_the_oldest_are_not_read(self, tmp_path: Path) -> None:
        for number in range(1, RUNS):
            self.write(tmp_path, number, hv1=told())
        self.write(tmp_path, 30, hv1=told())
        os.utime(tmp_path / "s30.json", (2, 2))
        # One that was copied here is as new as it says itself.
        assert [one["id"] for one in read_reports(str(tmp_path), False)[0]][:2] == ["s30", "s29"]
        (tmp_path / "s31.json").write_text((tmp_path / "s1.json").read_text())
        reports, left_out = read_reports(str(tmp_path), False)
        assert (len(reports), left_out) == (RUNS, [])
        assert os.stat(tmp_path / "s1.json").st_mtime == 1

    @pytest.mark.parametrize("content", ["", "[]", "{", '{"schema": 1}', "\0"])
    def test_what_is_none_is_left_out(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(Refused, match=r"report_dir: there is no report of a run in .*odd[.]json is left out"):
            read_reports(str(tmp_path), False)
        self.write(tmp_path, 1, hv1=told(a_vm()))
        reports, left_out = read_reports(str(tmp_path), False)
        assert [one["id"] for one in reports] == ["s1"]
        assert len(left_out) == 1

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        place = tmp_path / "reports"
        place.mkdir()
        (place / "s2.json").symlink_to(self.write(tmp_path, 1, hv1=told()))
        with pytest.raises(Refused, match="no report of a run"):
            read_reports(str(place), False)

    def test_a_directory_of_others(self, tmp_path: Path) -> None:
        self.write(tmp_path, 1, hv1=told())
        tmp_path.chmod(0o777)
        with pytest.raises(Refused, match=r"report_dir: .*trust_others: true"):
            read_reports(str(tmp_path), False)
        assert len(read_reports(str(tmp_path), True)[0]) == 1

    @pytest.mark.parametrize(("place", "reason"), [("gone", "cannot be read"), ("reports", "no absolute path")])
    def test_no_directory(self, tmp_path: Path, place: str, reason: str) -> None:
        directory = place if place == "reports" else str(tmp_path / place)
        with pytest.raises(Refused, match=f"report_dir: .*{reason}"):
            read_reports(directory, False)
