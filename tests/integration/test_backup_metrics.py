# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_metrics: what is told of a VM is what the repository holds, whatever its run has told."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import typing as t
from dataclasses import dataclass
from datetime import datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Library, prepared
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed

if t.TYPE_CHECKING:
    from pathlib import Path

LAST_SUCCESS = "vmfleet_backup_last_success_timestamp_seconds"


@dataclass
class Collector:
    """A repository with the sets s1, s2 and s3 of web01, and the directory that node_exporter looks into."""

    library: Library
    directory: Path

    def arguments(self, *names: str, state: str = "published", **options: t.Any) -> dict[str, t.Any]:
        results = [{"name": name, "state": state, "changed": True} for name in names]
        given = {"repository": str(self.library.path), "id": "s3", "directory": str(self.directory)}
        return {**given, "results": results, **options}

    def run(self, *names: str, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
        return succeed("backup_metrics", self.arguments(*names, **options), check=check, diff=True)

    def fail(self, *names: str, **options: t.Any) -> dict[str, t.Any]:
        return fail("backup_metrics", self.arguments(*names, **options))

    @property
    def text(self) -> str:
        [path] = self.directory.iterdir()
        return path.read_text()

    def values(self, metric: str) -> dict[str, float]:
        """By VM."""
        families = {family.name: family for family in text_string_to_metric_families(self.text)}
        found = families.get(f"vmfleet_backup_{metric}")
        return {sample.labels["vm"]: sample.value for sample in found.samples} if found else {}

    def add(self, name: str) -> None:
        """Another VM with the same sets."""
        shutil.copytree(self.library.path / NAME, self.library.path / name)
        for path in (self.library.path / name).glob("*/manifest.json"):
            manifest = json.loads(path.read_text())
            path.write_text(json.dumps({**manifest, "vm": {**manifest["vm"], "name": name}}))


@pytest.fixture(scope="module")
def template() -> t.Iterator[Library]:
    with prepared() as chain:
        yield chain.library


@pytest.fixture
def collector(template: Library, directory: Path) -> Collector:
    (directory / "metrics").mkdir()
    return Collector(template.copy(directory / "repository"), directory / "metrics")


def test_all_that_is_told(collector: Collector) -> None:
    before = collector.library.content()
    found = collector.run(NAME)
    manifest = collector.library.manifest(NAME, "s3")
    [vm] = found["hypervisor"]["vms"]
    newest = {
        "id": "s3",
        "started": manifest["started"],
        "duration": manifest["duration"],
        "bytes": sum(disk["bytes"] for disk in manifest["disks"]),
        "level": "incremental",
        "consistency": "crash",
        "chain": 3,
        "verified": "",
    }
    assert (vm["name"], vm["state"], vm["set"], vm["last"], vm["damage"]) == (NAME, "published", newest, newest, "")
    assert collector.values("last_success_timestamp_seconds") == {
        NAME: datetime.fromisoformat(manifest["started"]).timestamp()
    }
    assert collector.values("duration_seconds") == {NAME: manifest["duration"]}
    assert collector.values("size_bytes") == {NAME: newest["bytes"]}
    assert collector.values("chain_length") == {NAME: 3}
    [path] = collector.directory.iterdir()
    assert found["path"] == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert collector.library.content() == before


def test_the_file_is_another_one_each_time(collector: Collector) -> None:
    """A reader that has it open reads the old one to its end."""
    collector.run(NAME)
    [path] = collector.directory.iterdir()
    text = path.read_text()
    with path.open() as reader:
        collector.run(NAME, state="failed")
        assert reader.read() == text
    assert path.read_text() != text


def test_check_mode_tells_the_same_and_writes_nothing(collector: Collector) -> None:
    found = collector.run(NAME, check=True)
    assert found["changed"]
    assert found["diff"]["before"] == ""
    assert not list(collector.directory.iterdir())
    collector.run(NAME)
    assert found["diff"]["after"].splitlines()[3:] == collector.text.splitlines()[3:]


def test_without_a_directory_it_only_tells(collector: Collector) -> None:
    found = collector.run(NAME, directory=None)
    assert (found["changed"], found["path"]) == (False, "")
    assert found["hypervisor"]["vms"][0]["last"]["id"] == "s3"


def test_a_verification_counts_until_it_fails(collector: Collector) -> None:
    verify = {"repository": str(collector.library.path), "names": [NAME]}
    succeed("backup_verify", verify)
    collector.run(NAME)
    assert collector.values("verified") == {NAME: 1}
    [when] = collector.values("last_verified_timestamp_seconds").values()
    assert when > collector.values("last_success_timestamp_seconds")[NAME] - 1
    image = collector.library.images(NAME, "s3")["drive0"]
    image.chmod(0o600)
    with image.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    fail("backup_verify", verify)
    found = collector.run(NAME)["hypervisor"]["vms"][0]
    # The one before is what there is now.
    assert (found["set"]["id"], found["last"]["id"]) == ("s3", "s2")
    assert "drive0" in found["damage"]
    assert collector.values("damaged") == {NAME: 1}


def test_a_vm_that_is_gone_grows_old_until_it_is_forgotten(collector: Collector) -> None:
    collector.add("db01")
    collector.run(NAME, "db01")
    before = collector.values("last_success_timestamp_seconds")
    found = collector.run(NAME, id="s4")
    assert [vm["name"] for vm in found["hypervisor"]["vms"]] == [NAME]
    assert collector.values("last_success_timestamp_seconds") == before
    assert collector.values("failed") == {NAME: 0}
    # Still so the next time.
    collector.run(NAME, id="s5")
    assert collector.values("last_success_timestamp_seconds") == before
    shutil.rmtree(collector.library.path / "db01")
    collector.run(NAME, id="s6")
    assert set(collector.values("last_success_timestamp_seconds")) == {NAME}


def test_a_vm_without_a_set_stays_where_a_run_is_for_others(collector: Collector) -> None:
    bad = {"name": "db01", "state": "failed", "error": "no space"}
    collector.run(results=[bad])
    assert collector.values("last_success_timestamp_seconds") == {"db01": 0}
    place = collector.library.path / "db01"
    place.mkdir()
    (place / ".s3.failed.json").write_text("{}")
    collector.run(NAME)
    assert collector.values("last_success_timestamp_seconds")["db01"] == 0
    shutil.rmtree(place)
    collector.run(NAME)
    assert set(collector.values("last_success_timestamp_seconds")) == {NAME}


def test_the_sets_of_another_vm_of_the_name_are_not_those_of_this_one(collector: Collector) -> None:
    identity = collector.library.manifest(NAME, "s3")["vm"]["identity"]
    results = [{"name": NAME, "state": "failed", "error": "set s3 belongs to another VM of this name"}]
    found = collector.run(results=results, identities={NAME: "22222222-2222-4222-8222-222222222222"})
    [vm] = found["hypervisor"]["vms"]
    assert (vm["set"], vm["last"], vm["damage"]) == (None, None, "")
    assert collector.values("last_success_timestamp_seconds") == {NAME: 0}
    for identities in ({NAME: identity}, {NAME: ""}, {}):
        [vm] = collector.run(results=results, identities=identities)["hypervisor"]["vms"]
        assert vm["set"] == vm["last"]
        assert vm["last"]["id"] == "s3"


def test_a_vm_that_has_moved_is_the_matter_of_another(collector: Collector) -> None:
    collector.add("db01")
    collector.run(NAME, "db01")
    place = collector.library.path / "db01"
    newest = place / "s3" / "manifest.json"
    newest.write_text(json.dumps({**json.loads(newest.read_text()), "schema": 99}))
    reason = f"{newest}: its schema 99 is newer than this collection; update vmfleet.backup"
    for names in ((NAME, "db01"), (NAME,)):
        found = collector.run(*names)
        assert any(reason in warning for warning in found["warnings"])
        assert [vm["damage"] for vm in found["hypervisor"]["vms"]] == ["", reason][: len(names)]
        assert collector.values("damaged") == {NAME: 0, "db01": 1}
    # Here nothing can be read at all.
    shutil.rmtree(place)
    place.write_text("")
    for names in ((NAME, "db01"), (NAME,)):
        found = collector.fail(*names)
        assert "VM db01: its sets cannot be read" in found["msg"]
        assert found["hypervisor"]["error"] == found["msg"]
        assert [vm["name"] for vm in found["hypervisor"]["vms"]] == list(names)
        assert set(collector.values("last_success_timestamp_seconds")) == {NAME}
        assert collector.values("damaged") == {NAME: 0, "db01": 1}


def test_two_repositories_have_a_file_each(collector: Collector, directory: Path) -> None:
    collector.run(NAME)
    text = collector.text
    other = collector.library.copy(directory / "other")
    collector.run(NAME, repository=str(other.path) + "/")
    texts = [path.read_text() for path in collector.directory.iterdir()]
    assert len(texts) == 2
    assert text in texts
    assert any(f'repository="{other.path}"' in one for one in texts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"directory": "/nowhere/metrics"}, "--collector.textfile.directory"),
        ({"repository": "/nowhere/backup"}, "is not a repository"),
    ],
)
def test_what_the_run_has_told_is_told_all_the_same(collector: Collector, options: dict[str, str], said: str) -> None:
    found = collector.fail(NAME, **options)
    assert said in found["msg"]
    assert found["hypervisor"]["error"] == found["msg"]
    assert [(vm["name"], vm["state"]) for vm in found["hypervisor"]["vms"]] == [(NAME, "published")]
    assert not list(collector.directory.iterdir())


def test_what_is_no_result_is_refused(collector: Collector) -> None:
    assert "is no result of backup_set" in collector.fail(results=[{"name": NAME}])["msg"]
    assert "is no id of a set" in collector.fail(NAME, id="../up")["msg"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool")
def test_promtool_has_nothing_to_say(collector: Collector) -> None:
    collector.run(NAME, 'a"\\\n')
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=collector.text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
