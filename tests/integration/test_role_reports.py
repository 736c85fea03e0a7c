# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report and the metrics of the role vm_backup: what they say is so."""

from __future__ import annotations

import json
import typing as t
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import ID

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "report.schema.json"
LAST_SUCCESS = "vmfleet_backup_last_success_timestamp_seconds"


@dataclass
class Fleet:
    """Hypervisors of which the reports are looked at."""

    hypervisors: Hypervisor
    reports: Path
    metrics: Path

    def run(self, *options: str, **variables: t.Any) -> Play:
        wanted = {"report_dir": str(self.reports), "metrics_dir": str(self.metrics), **variables}
        return self.hypervisors.run(*options, **wanted)

    def report(self, set_id: str = ID) -> dict[str, t.Any]:
        """The report as data; it is as described, and its page is there."""
        found: dict[str, t.Any] = json.loads((self.reports / f"{set_id}.json").read_text())
        jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
        return found

    def told(self, host: str = "hv1", set_id: str = ID) -> dict[str, t.Any]:
        [found] = [one for one in self.report(set_id)["hypervisors"] if one["name"] == host]
        return dict(found)

    def vm(self, name: str, host: str = "hv1", set_id: str = ID) -> dict[str, t.Any]:
        [found] = [one for one in self.told(host, set_id)["vms"] if one["name"] == name]
        return dict(found)

    def page(self, set_id: str = ID) -> str:
        return (self.reports / f"{set_id}.html").read_text()

    @property
    def metrics_file(self) -> Path:
        [path] = self.metrics.iterdir()
        return path

    def samples(self) -> dict[str, dict[tuple[str, ...], float]]:
        """The values of the metrics, by name and by the labels besides that of the repository."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        text = self.metrics_file.read_text()
        for family in text_string_to_metric_families(text):
            assert (family.type, bool(family.documentation)) == ("gauge", True)
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("repository") == str(self.hypervisors.sets.path)
                key = tuple(labels.values())
                assert key not in found.setdefault(sample.name, {}), f"{sample} twice"
                found[sample.name][key] = sample.value
        assert text.count("\n# TYPE ") + 1 == len(found) + 1
        return found


@pytest.fixture
def fleet(directory: Path) -> Fleet:
    (directory / "metrics").mkdir()
    return Fleet(Hypervisor(directory), directory / "reports", directory / "metrics")


def sockets(*machines: Qemu) -> list[str]:
    return [f"{vm.directory}/*.qmp" for vm in machines]


def test_nothing_is_written_unasked_nor_in_check_mode(vms: Vms, fleet: Fleet) -> None:
    vm = vms.start(name="web01")
    assert fleet.hypervisors.run(sockets=sockets(vm)).rc == 0
    assert fleet.run("--check", sockets=sockets(vm), id="s2").rc == 0
    assert not fleet.reports.exists()
    assert not list(fleet.metrics.iterdir())


def test_a_run_and_the_next(vms: Vms, fleet: Fleet) -> None:
    vm = vms.start(name="web01")
    play = fleet.run(sockets=sockets(vm))
    assert play.rc == 0, play.output
    manifest = fleet.hypervisors.sets.manifest("web01", ID)
    first = fleet.vm("web01")
    assert (
        first["set"]
        == first["last"]
        == {
            "id": ID,
            "started": manifest["started"],
            "duration": manifest["duration"],
            "bytes": sum(disk["bytes"] for disk in manifest["disks"]),
            "level": "full",
            "consistency": "crash",
            "chain": 1,
            "verified": "",
        }
    )
    assert (first["state"], first["changed"], first["damage"]) == ("published", True, "")
    assert fleet.told()["repository"] == str(fleet.hypervisors.sets.path)
    assert "The VM is backed up" in fleet.page()
    assert fleet.page() == (fleet.reports / "index.html").read_text()
    begun = datetime.fromisoformat(manifest["started"]).timestamp()
    samples = fleet.samples()
    assert samples[LAST_SUCCESS] == {("web01",): begun}
    assert samples["vmfleet_backup_duration_seconds"] == {("web01",): manifest["duration"]}
    assert samples["vmfleet_backup_size_bytes"] == {("web01",): first["set"]["bytes"]}
    assert samples["vmfleet_backup_last_run_vms"][("published",)] == 1

    # What was there already is said to have been.
    again = fleet.run(sockets=sockets(vm))
    assert again.rc == 0, again.output
    assert (fleet.vm("web01")["state"], fleet.vm("web01")["changed"]) == ("published", False)
    assert fleet.vm("web01")["set"] == first["set"]
    assert "1 set existed before this run" in fleet.page()

    vm.write("drive0", 0x77, 5 << 20, 1 << 20)
    assert fleet.run(sockets=sockets(vm), id="s2").rc == 0
    assert fleet.vm("web01", set_id="s2")["set"]["chain"] == 2
    samples = fleet.samples()
    assert samples["vmfleet_backup_chain_length"] == {("web01",): 2}
    assert samples["vmfleet_backup_level"] == {
        ("web01", "full"): 0,
        ("web01", "incremental"): 1,
        ("web01", "differential"): 0,
    }
    assert fleet.page("s2") == (fleet.reports / "index.html").read_text()
    assert "The last 2 runs" in fleet.page("s2")


def test_a_vm_that_fails_keeps_its_last_success(vms: Vms, fleet: Fleet) -> None:
    vm = vms.start(name="web01")
    other = vms.start(vms.disk(1), name="db01")
    listed = [{"monitor": str(one.monitor)} for one in (vm, other)]
    assert fleet.run(vms=listed).rc == 0
    before = fleet.samples()
    vm.quit()
    play = fleet.run(vms=listed, id="s2")
    assert play.rc != 0
    found = fleet.vm("web01", set_id="s2")
    assert (found["state"], found["set"], found["last"]["id"]) == ("failed", None, ID)
    assert found["error"] in play.output
    assert fleet.report("s2")["summary"]["failed"] == 1
    after = fleet.samples()
    assert after[LAST_SUCCESS][("web01",)] == before[LAST_SUCCESS][("web01",)]
    assert after["vmfleet_backup_failed"] == {("web01",): 1, ("db01",): 0}
    assert after["vmfleet_backup_last_run_vms"][("failed",)] == 1
    page = fleet.page("s2")
    assert "1 of 2 VMs not backed up" in page
    assert "-e vm_backup_id=s2" in page
    assert page.index("What went wrong") < page.index("Hypervisors</h2>")


def test_every_hypervisor_is_on_the_page_whatever_became_of_it(vms: Vms, fleet: Fleet) -> None:
    vm = vms.start(name="web01")
    fleet.hypervisors.hosts = {
        "hv1": {},
        "hv2": {"ansible_connection": "ssh", "ansible_ssh_common_args": "-o ProxyCommand=false"},
        "hv3": {"vm_backup_repository": "relative"},
    }
    play = fleet.run(sockets=sockets(vm))
    assert play.rc != 0
    assert {one["name"]: one["state"] for one in fleet.report()["hypervisors"]} == {
        "hv1": "reported",
        "hv2": "failed",
        "hv3": "failed",
    }
    assert "Failed to connect" in fleet.told("hv2")["error"]
    assert "vm_backup_repository is 'relative'" in fleet.told("hv3")["error"]
    assert "2 hypervisors without a result" in fleet.page()

    # A run for some of them takes nothing away from what is known of the others.
    fleet.hypervisors.hosts["hv2"] = {}
    assert fleet.run("--limit", "hv2", sockets=sockets(vm)).rc == 0
    states = {one["name"]: one["state"] for one in fleet.report()["hypervisors"]}
    assert states == {"hv1": "reported", "hv2": "reported", "hv3": "failed"}


@pytest.mark.parametrize("how", [{"serial": "1"}, {"strategy": "free"}], ids=["serial", "free"])
def test_batches_and_strategies_make_one_report(vms: Vms, fleet: Fleet, how: dict[str, str]) -> None:
    machines = [vms.start(vms.disk(number, size=8 << 20), name=f"vm{number}") for number in range(3)]
    fleet.hypervisors.hosts = {f"hv{number}": {"vm_backup_sockets": sockets(vm)} for number, vm in enumerate(machines)}
    play = fleet.run(**how)
    assert play.rc == 0, play.output
    assert [(one["name"], len(one["vms"])) for one in fleet.report()["hypervisors"]] == [
        (f"hv{number}", 1) for number in range(3)
    ]
    assert fleet.report()["summary"]["hypervisors_waiting"] == 0


def test_metrics_that_cannot_be_written_fail_the_run_and_are_on_the_page(vms: Vms, fleet: Fleet) -> None:
    vm = vms.start(name="web01")
    # As where the directory goes away after the preflight, which looks for it.
    play = fleet.run("--skip-tags", "preflight", sockets=sockets(vm), metrics_dir=str(fleet.metrics / "missing"))
    # What has become of the VMs is told all the same.
    assert "1 of 1 VMs have their set" in play.output
    assert play.rc != 0
    assert "collector.textfile.directory" in fleet.told()["error"]
    assert (fleet.vm("web01")["state"], fleet.told()["state"]) == ("published", "reported")
    assert "collector.textfile.directory" in fleet.page()


@pytest.mark.parametrize("variable", ["report_dir", "metrics_dir"])
def test_relative_places_are_refused_before_the_backup(vms: Vms, fleet: Fleet, variable: str) -> None:
    vm = vms.start(name="web01")
    play = fleet.run(sockets=sockets(vm), **{"report_dir": "", variable: "here"})
    assert play.rc != 0
    assert f"vm_backup_{variable} is 'here'" in play.output
    fleet.hypervisors.sets.assert_absent("web01")


def test_a_name_is_no_template(vms: Vms, fleet: Fleet) -> None:
    name = '{{ 7 * 7 }}<b>"'
    vm = vms.start(name=name)
    play = fleet.run(sockets=sockets(vm))
    assert play.rc == 0, play.output
    assert [one["name"] for one in fleet.told()["vms"]] == [name]
    assert set(fleet.samples()[LAST_SUCCESS]) == {(name,)}
    assert "{{ 7 * 7 }}&lt;b&gt;&quot;" in fleet.page()


def test_a_vm_has_none_of_the_sets_of_another_one_of_its_name(vms: Vms, fleet: Fleet) -> None:
    old = vms.start(vms.disk(0), name="web01", uuid="11111111-1111-4111-8111-111111111111")
    assert fleet.run(sockets=sockets(old)).rc == 0
    new = vms.start(vms.disk(1), name="web01", uuid="22222222-2222-4222-8222-222222222222")
    assert fleet.run(sockets=sockets(new)).rc == 2
    vm = fleet.vm("web01")
    assert (vm["state"], vm["set"], vm["last"]) == ("failed", None, None)
    assert fleet.samples()[LAST_SUCCESS] == {("web01",): 0}
    status = fleet.hypervisors.play("status", sockets=sockets(new), max_age="1d")
    assert status.rc == 2, status.output
    assert "no good set that is at most 1d old: web01" in status.output
