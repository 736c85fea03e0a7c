# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs that fail before their set is begun: that is written down, and shown, until they have their next set."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import utc_now
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")


def failures(sets: Sets, name: str) -> dict[str, dict[str, t.Any]]:
    """Return what is written down of attempts of a VM, by the id of the set."""
    found = sets.directory(name).glob(".*.failed.json")
    return {document["id"]: document for document in (json.loads(path.read_text()) for path in found)}


def told(sets: Sets) -> dict[str, str]:
    """Return what stands in the repository beside sets, by VM."""
    info = succeed("backup_info", {"repository": str(sets.path)})
    return {left["vm"]: left["what"] for left in info["leftovers"]}


def test_a_vm_that_is_off(vms: Vms, sets: Sets) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1, size=8 * MIB), name="db01")
    sets.back_up(vm)
    vm.kill()
    plan = sets.plan(vm, other, id="s2")["plan"]
    error = {one["name"]: one["reason"] for one in plan["vms"]}["web01"]
    result = fail("backup_set", {"plan": plan})
    assert result_of(result, "db01")["state"] == "published"
    assert (result_of(result, "web01")["error"], result.get("warnings", [])) == (error, [])
    document = failures(sets, "web01")["s2"]
    assert (document["run"], document["attempt"], document["state"]) == (plan["run"], "", "failed")
    assert told(sets) == {"web01": f"set s2 failed: {error}"}
    assert failures(sets, "db01") == {}
    # The run does not try again, and writes nothing again.
    before = sets.directory("web01").joinpath(".s2.failed.json").stat()
    assert result_of(fail("backup_set", {"plan": plan}), "web01")["error"] == error
    assert sets.directory("web01").joinpath(".s2.failed.json").stat() == before
    vm.restart()
    sets.back_up(vm, id="s2")
    sets.assert_tidy("web01")


def test_a_vm_that_is_off_for_long_is_told_of_once(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    sets.back_up(vm)
    plan = sets.plan(vm, id="s2", speed=SLOW, level="full")["plan"]
    fail("backup_set", {"plan": plan, "timeout": 0.2})
    vm.kill()
    for set_id in ("s3", "s4", "s5"):
        sets.fail(vm, id=set_id)
    # How a copy has failed is another matter.
    assert set(failures(sets, "web01")) == {"s2", "s5"}
    # Times are in whole seconds: what has failed in the one in which a set was begun may be newer than that.
    ended = failures(sets, "web01")["s5"]["ended"]
    wait_until(lambda: utc_now() > ended, "the next second")
    vm.restart()
    sets.back_up(vm, id="s6")
    succeed("backup_prune", {"repository": str(sets.path), "keep_last": 9})
    assert failures(sets, "web01") == {}


def test_a_vm_that_is_busy(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01")
    target = create(directory / "foreign.qcow2")
    vm.qmp.execute(
        "drive-backup", device="n0", job_id="foreign", target=str(target), sync="full", mode="existing", speed=1 << 20
    )
    result = sets.fail(vm)
    assert "busy: job foreign" in result["msg"]
    assert "busy: job foreign" in failures(sets, "web01")["s1"]["error"]
    vm.qmp.execute("block-job-cancel", device="foreign")
    wait_until(lambda: not vm.block_jobs, "the end of the job")
    sets.back_up(vm)
    sets.assert_tidy("web01")


def test_one_that_is_off_after_the_plan(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    sets.back_up(vm)
    plan = sets.plan(vm, id="s2")["plan"]
    vm.kill()
    error = result_of(fail("backup_set", {"plan": plan}), "web01")["error"]
    assert failures(sets, "web01")["s2"]["error"] == error
    vm.restart()
    # A run does not try again what it has given up.
    assert result_of(fail("backup_set", {"plan": plan}), "web01")["error"] == error
    sets.back_up(vm, id="s2")


@pytest.mark.parametrize("case", ["check mode", "skipped", "not to begin"])
def test_nothing_is_written_down(vms: Vms, sets: Sets, case: str) -> None:
    vm = vms.start(name="web01")
    sets.back_up(vm)
    vm.kill()
    offline = "skip" if case == "skipped" else "fail"
    plan = sets.plan(vm, id="s2", offline=offline)["plan"]
    arguments = {"plan": plan, "begin": case != "not to begin"}
    result = run_module("backup_set", arguments, check=case == "check mode")
    assert result["vms"][0]["state"] == ("skipped" if case == "skipped" else "failed")
    assert failures(sets, "web01") == {}


def test_what_may_be_another_vm_gets_no_directory(vms: Vms, directory: Path, sets: Sets) -> None:
    """A monitor that has never answered does not tell what its VM is called."""
    vm = vms.start(name="web01")
    sets.back_up(vm)
    result = sets.fail(f"{directory}/gone.qmp", f"{directory}/web01.qmp", id="s2")
    assert {one["name"]: one["state"] for one in result["vms"]} == {"gone": "failed", "web01": "failed"}
    assert sorted(path.name for path in sets.path.iterdir()) == ["vmfleet.json", "web01"]
    assert failures(sets, "web01") == {}
    # Listed by a name, it is known, though it never had a set.
    sets.fail(vms=[{"monitor": f"{directory}/gone.qmp", "name": "db01"}])
    assert "gone.qmp" in failures(sets, "db01")["s1"]["error"]
    assert list(told(sets)) == ["db01"]


def test_two_of_one_name(vms: Vms, sets: Sets) -> None:
    one, two = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    named = [{"monitor": str(vm.monitor), "name": "twin"} for vm in (one, two)]
    assert "another VM is called twin too" in sets.fail(vms=named)["msg"]
    assert not sets.directory("twin").exists()


def test_the_directory_of_another_vm(vms: Vms, sets: Sets) -> None:
    uuids = [f"4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6{digit}" for digit in "ef"]
    sets.back_up(vms.start(name="web01", uuid=uuids[0]))
    second = vms.start(vms.disk(1), name="db01", uuid=uuids[1])
    named = [{"monitor": str(second.monitor), "name": "web01", "include_disks": ["vdx"]}]
    assert "vdx" in sets.fail(vms=named, id="s2")["msg"]
    assert failures(sets, "web01") == {}


def test_what_cannot_be_written_costs_this_vm_only(vms: Vms, sets: Sets) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1, size=8 * MIB), name="db01")
    sets.back_up(vm)
    vm.kill()
    plan = sets.plan(vm, other, id="s2")["plan"]
    # The record cannot take the place of a directory.
    sets.directory("web01").joinpath(".s2.failed.json").mkdir()
    result = fail("backup_set", {"plan": plan})
    assert result_of(result, "db01")["state"] == "published"
    found = result_of(result, "web01")
    assert (found["state"], found["error"]) == ("failed", plan["vms"][0]["reason"])
    assert any("could not be recorded" in warning for warning in found["warnings"])


def monitor(vm: Qemu) -> dict[str, str]:
    return {"monitor": str(vm.monitor), "name": vm.monitor.stem}


def test_status_report_and_metrics_show_it(vms: Vms, directory: Path) -> None:
    hypervisor = Hypervisor(directory)
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1, size=8 * MIB), name="db01")
    listed = [monitor(vm), monitor(other)]
    assert hypervisor.run(vms=listed).rc == 0
    vm.kill()
    report, metrics = directory / "report", directory / "metrics"
    metrics.mkdir()
    play = hypervisor.run(vms=listed, id="s2", report_dir=str(report), metrics_dir=str(metrics))
    assert play.rc == 2, play.output
    assert hypervisor.sets.directory("db01").joinpath("s2").is_dir(), play.output
    [reported] = json.loads((report / "s2.json").read_text())["hypervisors"]
    states = {one["name"]: one["state"] for one in reported["vms"]}
    assert states == {"web01": "failed", "db01": "published"}
    [text] = [path.read_text() for path in metrics.iterdir()]
    [line] = [line for line in text.splitlines() if line.startswith("vmfleet_backup_failed") and "web01" in line]
    assert line.endswith(" 1")
    play = hypervisor.play("status", vms=listed)
    assert play.rc == 0, play.output
    assert "web01: set s2 failed: " in play.output
    vm.restart()
    assert hypervisor.run(vms=listed, id="s2").rc == 0
    assert "failed: " not in hypervisor.play("status", vms=listed).output
