# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The metrics: what Prometheus reads is what is so."""

from __future__ import annotations

import re
import typing as t

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ansible_collections.vmfleet.backup.plugins.module_utils._report.prometheus import HELP, file_name, metrics, vms_in
from ansible_collections.vmfleet.backup.plugins.module_utils._report.status import status_from_result, status_of_absent
from ansible_collections.vmfleet.backup.tests.harness.reports import a_set, a_vm, failed

NAMES = ['a"b', "a\\", "a\\n", "a\nb", 'x"} 1\n# HELP y', "", "é", "a,b={}", "\\\\\n\\"]


def parse(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    assert text.endswith("\n")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.name in HELP
        assert (family.type, family.documentation) == ("gauge", HELP[family.name])
        assert family.name not in found, "a family in two places"
        found[family.name] = {}
        for sample in family.samples:
            labels = tuple(sample.labels.items())
            assert labels not in found[family.name], "a sample twice"
            found[family.name][labels] = sample.value
    return found


def values(vm: dict[str, t.Any]) -> dict[str, float]:
    """The values of one VM by metric, without the common beginning of their names."""
    labels = (("repository", "/srv/backup"), ("vm", vm["name"]))
    parsed = parse(metrics("/srv/backup", [vm], 1000))
    return {name.replace("vmfleet_backup_", ""): found[labels] for name, found in parsed.items() if labels in found}


def test_a_vm_that_has_its_set() -> None:
    last = a_set(duration=12.5, bytes=4096, chain=7, verified="image")
    assert values(a_vm(set=last, last=last, verified_at="2026-11-22T02:00:00Z")) == {
        "last_success_timestamp_seconds": 1795311000,
        "last_verified_timestamp_seconds": 1795312800,
        "duration_seconds": 12.5,
        "size_bytes": 4096,
        "chain_length": 7,
        "verified": 1,
        "damaged": 0,
        "failed": 0,
    }


def test_a_vm_that_failed_keeps_what_it_has() -> None:
    found = values(failed())
    assert found["failed"] == 1
    assert found["last_success_timestamp_seconds"] == 1795311000 - 86400
    assert values(failed(state="cancelled"))["failed"] == 1


def test_a_vm_that_has_no_set_counts_from_the_beginning_of_time() -> None:
    assert values(failed(last=None)) == {
        "last_success_timestamp_seconds": 0,
        "last_verified_timestamp_seconds": 0,
        "damaged": 0,
        "failed": 1,
    }


def test_of_sets_that_cannot_be_read_nothing_is_said() -> None:
    assert values(failed(last=None, damage="its sets cannot be read")) == {"damaged": 1, "failed": 1}


def test_a_vm_that_was_in_no_run_has_not_failed() -> None:
    assert "failed" not in values({**status_of_absent("web01"), "last": a_set()})
    assert values({**status_of_absent("web01"), "last": a_set()})["last_success_timestamp_seconds"] == 1795311000


def test_levels_are_one_of_a_kind() -> None:
    found = parse(metrics("/srv/backup", [a_vm()], 1000))["vmfleet_backup_level"]
    assert {dict(labels)["level"]: value for labels, value in found.items()} == {
        "full": 0,
        "incremental": 1,
        "differential": 0,
    }


def test_the_run() -> None:
    vms = [
        a_vm("a"),
        a_vm("b"),
        failed("c"),
        status_from_result({"name": "d", "state": "skipped"}),
        status_of_absent("e"),
    ]
    found = parse(metrics("/srv/backup", vms, 1000))
    assert list(found["vmfleet_backup_last_run_timestamp_seconds"].values()) == [1000]
    states = found["vmfleet_backup_last_run_vms"]
    assert {dict(labels)["state"]: value for labels, value in states.items()} == {
        "published": 2,
        "failed": 1,
        "cancelled": 0,
        "skipped": 1,
    }


@pytest.mark.parametrize("repository", ["/srv/backup", '/srv/"b"\\n\n'])
def test_names_come_back_as_they_were(repository: str) -> None:
    text = metrics(repository, [a_vm(name) for name in NAMES], 1000)
    found = parse(text)["vmfleet_backup_last_success_timestamp_seconds"]
    assert [dict(labels) for labels in found] == [{"repository": repository, "vm": name} for name in NAMES]
    assert vms_in(text) == NAMES


def test_a_name_that_is_no_utf_8_does_no_harm() -> None:
    text = metrics("/srv/backup", [a_vm("a\udc80")], 1000)
    text.encode("utf-8")
    parse(text)
    assert vms_in(text) == ["a\\udc80"]


def test_without_vms() -> None:
    assert set(parse(metrics("/srv/backup", [], 1000))) == {
        "vmfleet_backup_last_run_timestamp_seconds",
        "vmfleet_backup_last_run_vms",
    }
    assert vms_in("") == []


def test_each_repository_has_its_file() -> None:
    names = [file_name(path) for path in ("/srv/backup", "/srv-backup", "/srv/backup2", "/", "/é\udc80" * 200)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"vmfleet_backup_\w{0,48}_[0-9a-f]{8}\.prom", name) for name in names)
    assert names[0].startswith("vmfleet_backup_srv_backup_")


def test_names_and_units_are_as_prometheus_has_them() -> None:
    for name, said in HELP.items():
        assert re.fullmatch(r"vmfleet_backup_[a-z_]+", name)
        assert said.endswith(".")
        assert "\n" not in said


def test_no_label_steers_a_terminal() -> None:
    [sample, *_others] = parse(metrics("/srv/backup", [a_vm("a\x1b[2J\u202eb\ud800")], 1000))["vmfleet_backup_damaged"]
    assert dict(sample)["vm"] == r"a\x1b[2J\u202eb\ud800"


@pytest.mark.parametrize("state", ["running", "queued"])
def test_what_is_not_at_its_end_has_neither_failed_nor_not(state: str) -> None:
    found = values(a_vm(state=state, set=None, last=None))
    assert found == {"last_success_timestamp_seconds": 0, "last_verified_timestamp_seconds": 0, "damaged": 0}
