# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and whose set it is: two hypervisors, two VMs, two runs, two names; taking over, adopting, untracking."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, sent, snapshot, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT, fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

UUIDS = ("4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e", "5dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e")


class Elsewhere:
    """Another hypervisor: modules run with another machine-id, boot and host name, and see all else as here."""

    SETUP = (
        'mount --bind "$1/machine-id" /etc/machine-id && mount --bind "$1/boot_id" /proc/sys/kernel/random/boot_id'
        ' && hostname hv2 && shift && exec "$@"'
    )

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        (directory / "boot_id").write_text("01234567-89ab-cdef-0123-456789abcdef\n")

    def run(self, name: str, args: dict[str, t.Any], check: bool = False) -> dict[str, t.Any]:
        """Run a module there, to whatever end."""
        module = [sys.executable, "-m", f"ansible_collections.vmfleet.backup.plugins.modules.{name}"]
        done = subprocess.run(
            ["unshare", "--mount", "--uts", "sh", "-c", self.SETUP, "sh", str(self._directory), *module],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": {**args, "_ansible_check_mode": check}}),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.stdout, done.stderr
        result: dict[str, t.Any] = json.loads(done.stdout)
        return {**result, "rc": done.returncode}

    def plan(self, sets: Sets, vm: Qemu, **options: t.Any) -> dict[str, t.Any]:
        """Plan a backup there."""
        plan: dict[str, t.Any] = self.run("backup_plan", sets.arguments(vm, **options))["plan"]
        return plan

    def back_up(self, sets: Sets, vm: Qemu, how: dict[str, t.Any] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Plan a backup there, and carry it out with the options `how` of backup_set."""
        return self.run("backup_set", {"plan": self.plan(sets, vm, **options), **(how or {})})


@pytest.fixture
def elsewhere(directory: Path) -> Elsewhere:
    if os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")
    return Elsewhere(directory)


def records(sets: Sets) -> dict[str, str]:
    """What a repository says of sets and of those that grow, whose images change by themselves."""
    found = {}
    for path in sets.path.rglob("*"):
        # Processes that look on ask the file system now and then whether it is there.
        if not path.name.startswith(".vmfleet.json."):
            found[str(path.relative_to(sets.path))] = path.read_text() if path.suffix == ".json" else ""
    return found


class TestHypervisors:
    """Two of them, one repository, and VMs of one name."""

    def test_a_vm_that_has_moved_goes_on_there(
        self, vms: Vms, sets: Sets, directory: Path, elsewhere: Elsewhere
    ) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0]), sets, directory)
        history.back_up("s1")
        history.vm.write("drive0", 0xA1, MIB, 65536)
        history.freeze("s2")
        assert elsewhere.back_up(sets, history.vm, id="s2")["rc"] == 0
        assert history.note("s2") == {"drive0": "incremental"}
        assert sets.manifest("web01", "s2")["hypervisor"]["name"] == "hv2"
        # And back.
        assert history.back_up("s3") == "incremental"
        history.check()

    def test_vms_without_a_uuid_are_two(self, vms: Vms, sets: Sets, elsewhere: Elsewhere) -> None:
        here, there = (vms.start(vms.disk(number, size=SIZE, id="drive0"), name="web01") for number in range(2))
        sets.back_up(here)
        before = snapshot(sets.path)
        for set_id, said in (("s1", "belongs to another VM of this name"), ("s2", "belongs to another VM of this na")):
            result = elsewhere.back_up(sets, there, id=set_id)
            assert result["rc"] == 1
            assert said in result["msg"]
            assert there.bitmaps("n1") == {}
        assert snapshot(sets.path) == before

    def test_slices_that_take_turns(self, vms: Vms, sets: Sets, directory: Path, elsewhere: Elsewhere) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0]), sets, directory)
        other = vms.start(vms.disk(1, size=SIZE, id="drive0"), name="web01", uuid=UUIDS[0])
        history.back_up("s1")
        overwrite(history.vm, 0xA1)
        history.freeze("s2")
        plan = sets.start(history.vm, id="s2", speed=SLOW)
        # Each of its slices looks, sees whose it is, and touches neither the set nor its own VM.
        before = records(sets)
        theirs = elsewhere.plan(sets, other, id="s2")
        assert [(vm["action"], "hypervisor" in vm["reason"]) for vm in theirs["vms"]] == [("fail", True)]
        for how in ({"state": "started"}, {"state": "completed"}, {"state": "cancelled"}, {"supersede": True}):
            result = elsewhere.run("backup_set", {"plan": theirs, **how})
            assert result["rc"] == 1
            assert result["qmp"] == []
            assert records(sets) == before
            again = succeed("backup_set", {"plan": plan, "state": "started"})
            assert result_of(again, "web01")["state"] == "running"
        assert "takeover: true" in result_of(elsewhere.run("backup_set", {"plan": theirs}), "web01")["error"]
        release(history.vm)
        succeed("backup_set", {"plan": plan})
        assert history.note("s2") == {"drive0": "incremental"}
        history.check()
        # The other one has the same uuid, and so is taken for the same VM; its disk has no record, and is a full.
        assert elsewhere.back_up(sets, other, id="s3")["rc"] == 0
        assert sets.levels("web01", "s3") == {"drive0": "full"}

    @pytest.mark.parametrize("orders", [{}, {"takeover": True}, {"supersede": True, "takeover": True}])
    def test_takeover_and_the_one_that_lost(
        self,
        vms: Vms,
        sets: Sets,
        elsewhere: Elsewhere,
        start_module: t.Callable[..., ModuleProcess],
        orders: dict[str, bool],
    ) -> None:
        here = vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0])
        there = vms.start(vms.disk(1, size=SIZE, id="drive0"), name="web01", uuid=UUIDS[0])
        plan = sets.start(here, speed=SLOW)
        attempt = here.job["device"]
        follower = start_module("backup_set", {"plan": plan, **orders})
        theirs = elsewhere.plan(sets, there, speed=SLOW)
        taken = elsewhere.run("backup_set", {"plan": theirs, "state": "started", "takeover": True})
        assert taken["rc"] == 0, taken["msg"]
        [warning] = result_of(taken, "web01")["warnings"]
        assert "the unfinished set s1 was removed: taken over by hypervisor hv2" in warning
        # The loser says so, does not take it back, and lets its own VM go.
        lost = follower.result()
        assert lost["rc"] == 1
        assert "taken over by hypervisor hv2" in lost["msg"]
        assert here.block_jobs == []
        assert here.bitmaps("n0") == {}
        assert attempt in json.dumps(lost["qmp"])
        release(there)
        assert elsewhere.run("backup_set", {"plan": theirs})["rc"] == 0
        assert sets.manifest("web01")["hypervisor"]["name"] == "hv2"
        assert there.block_jobs == []

    def test_the_one_that_lost_may_be_asleep(self, vms: Vms, sets: Sets, elsewhere: Elsewhere) -> None:
        here = vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0])
        there = vms.start(vms.disk(1, size=SIZE, id="drive0"), name="web01", uuid=UUIDS[1])
        plan = sets.start(here, speed=SLOW)
        taken = elsewhere.back_up(sets, there, {"takeover": True})
        assert taken["rc"] == 0, taken["msg"]
        lost = fail("backup_set", {"plan": plan})
        assert UUIDS[1] in lost["msg"]
        assert here.block_jobs == []
        assert here.bitmaps("n0") == {}
        assert sets.manifest("web01")["vm"]["identity"] == UUIDS[1]

    def test_an_empty_directory_is_not_taken_by_looking(self, vms: Vms, sets: Sets, elsewhere: Elsewhere) -> None:
        here = vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0])
        there = vms.start(vms.disk(1, size=SIZE, id="drive0"), name="web01", uuid=UUIDS[1])
        ours, theirs = sets.plan(here)["plan"], elsewhere.plan(sets, there)
        # Both have planned a start; the first to come gets it.
        assert [plan["vms"][0]["action"] for plan in (ours, theirs)] == ["start"] * 2
        succeed("backup_set", {"plan": ours})
        result = elsewhere.run("backup_set", {"plan": theirs})
        assert result["rc"] == 1
        assert UUIDS[0] in result["msg"]
        assert there.bitmaps("n1") == {}


class TestVms:
    """One name, one monitor, and not always the same VM behind it."""

    def test_case_42_another_vm_of_this_name_is_refused_and_adopted(
        self, vms: Vms, sets: Sets, directory: Path
    ) -> None:
        old = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0]), sets, directory)
        old.back_up("s1")
        old.vm.quit()
        # Built anew with the disk of the one before: with its bitmaps.
        history = History(vms.start(*old.vm.disks, name="web01", uuid=UUIDS[1]), sets, directory)
        planned = sets.plan(history.vm, id="s2")["plan"]
        assert [vm["action"] for vm in planned["vms"]] == ["fail"]
        assert "adopt: true" in planned["vms"][0]["reason"]
        before = snapshot(sets.path)
        assert UUIDS[0] in fail("backup_set", {"plan": planned})["msg"]
        predicted = run_module("backup_set", {"plan": planned, "adopt": True}, check=True)
        assert (predicted["changed"], result_of(predicted, "web01")["level"]) == (True, "full")
        assert snapshot(sets.path) == before
        history.freeze("s2")
        result = succeed("backup_set", {"plan": planned, "adopt": True})
        assert result_of(result, "web01")["disks"][0]["reason"] == f"set s1 is of another VM ({UUIDS[0]})"
        history.note("s2")
        # From now on the directory is its own.
        history.vm.write("drive0", 0xA1, MIB, 65536)
        assert history.back_up("s3") == "incremental"
        assert history.bitmaps() == history.recorded("s3")
        # A set that is there is the other VM's for ever.
        assert "belongs to another VM" in sets.fail(history.vm, id="s1")["msg"]
        plan = sets.plan(history.vm, id="s1")["plan"]
        assert "belongs to another VM" in fail("backup_set", {"plan": plan, "adopt": True})["msg"]

    def test_a_vm_that_was_exchanged_since_the_plan_is_left_alone(self, vms: Vms, sets: Sets, directory: Path) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0]), sets, directory)
        history.back_up("s1")
        plan = sets.plan(history.vm, id="s2")["plan"]
        history.vm.quit()
        # With the disk of the one before, and so with a bitmap on which that one's sets do not build any more.
        other = vms.start(*history.vm.disks, name="web01", uuid=UUIDS[1])
        stray = f"{next(iter(other.bitmaps('n0')))[:17]}0123456789abcdef"
        other.qmp.execute("block-dirty-bitmap-add", node="n0", name=stray)
        bitmaps = other.bitmaps("n0")
        plan["vms"][0]["monitor"] = f"unix:{other.monitor}"
        result = fail("backup_set", {"plan": plan})
        assert UUIDS[0] in result["msg"]
        assert result["changed"] is False
        assert other.bitmaps("n0") == bitmaps
        other.qmp.execute("block-dirty-bitmap-remove", node="n0", name=stray)

    def test_another_vm_behind_the_monitor_takes_over(self, vms: Vms, sets: Sets) -> None:
        one, other = (
            vms.start(vms.disk(number, size=SIZE, id="drive0"), name="web01", uuid=UUIDS[number]) for number in range(2)
        )
        sets.start(one, speed=SLOW)
        assert "being made of another VM of this name" in sets.fail(other)["msg"]
        plan = sets.plan(other)["plan"]
        succeed("backup_set", {"plan": plan, "takeover": True})
        assert sets.manifest("web01")["vm"]["identity"] == UUIDS[1]
        # The one that lost is let go by the next run that looks at it, though that has nothing to do there.
        assert UUIDS[1] in sets.fail(one)["msg"]
        assert one.block_jobs == []
        assert one.bitmaps("n0") == {}

    def test_another_qemu_of_the_same_name_and_no_uuid(self, vms: Vms, sets: Sets) -> None:
        one, other = (vms.start(vms.disk(number, size=SIZE, id="drive0"), name="web01") for number in range(2))
        plan = sets.start(one, speed=SLOW)
        before = records(sets)
        said = sets.fail(other)["msg"]
        assert f"being made of another VM of this name (pid {one.pid}, unix:{one.monitor})" in said
        assert records(sets) == before
        release(one)
        assert result_of(succeed("backup_set", {"plan": plan}), "web01")["state"] == "published"

    @pytest.mark.parametrize("uuids", [UUIDS, (None, None)], ids=["uuids", "no uuids"])
    def test_a_set_is_not_cancelled_where_another_vm_answers(
        self, vms: Vms, sets: Sets, uuids: tuple[str | None, ...]
    ) -> None:
        """Its jobs would copy on, into images that are gone."""
        one, other = (
            vms.start(vms.disk(number, size=SIZE, id="drive0"), name="web01", uuid=uuid)
            for number, uuid in enumerate(uuids)
        )
        plan = sets.start(one, speed=SLOW)
        away = one.monitor.with_suffix(".away")
        one.monitor.rename(away)
        other.monitor.rename(one.monitor)
        before = snapshot(sets.path)
        for args in ({"repository": str(sets.path), "names": ["web01"]}, {"plan": plan}):
            result = fail("backup_set", {**args, "state": "cancelled"})
            assert "is being made of another VM of this name" in result["msg"]
            assert f"another VM answers at unix:{one.monitor} now. This set is not cancelled" in result["msg"]
            assert (result["changed"], result["qmp"]) == (False, [])
        assert snapshot(sets.path) == before
        one.monitor.rename(other.monitor)
        away.rename(one.monitor)
        assert succeed("backup_set", {"plan": plan, "state": "cancelled"})["changed"] is True
        assert one.block_jobs == []

    def test_twins_stay_refused_whatever_the_orders(self, vms: Vms, sets: Sets) -> None:
        twins = [vms.start(vms.disk(number, size=SIZE, id="drive0"), name="web01") for number in range(2)]
        plan = sets.plan(*twins)["plan"]
        for orders in ({"takeover": True}, {"adopt": True}):
            result = fail("backup_set", {"plan": plan, **orders})
            assert [vm["state"] for vm in result["vms"]] == ["failed"] * 2
            assert "another VM is called web01 too" in result["msg"]
            assert result["qmp"] == []

    def test_one_vm_under_two_names(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(vms.disk(size=SIZE), name="web01")
        other = [{"name": "db01", "monitor": str(vm.monitor)}]
        sets.back_up(vms=other)
        overwrite(vm, 0xA1)
        plan = sets.start(vm, speed=SLOW)
        job, bitmaps = vm.job["device"], set(vm.bitmaps("n0"))
        # Whatever is done under the other name, the copy goes on.
        assert sets.back_up(vms=other)["changed"] is False
        assert "under the name web01" in sets.fail(vms=other, id="s2")["msg"]
        names = {"repository": str(sets.path), "names": ["db01"]}
        assert succeed("backup_set", {**names, "state": "cancelled"})["changed"] is False
        assert "under the name web01" in fail("backup_set", {**names, "state": "untracked"})["msg"]
        assert vm.job["device"] == job
        assert vm.job["status"] != "concluded"
        assert set(vm.bitmaps("n0")) == bitmaps
        release(vm)
        succeed("backup_set", {"plan": plan})


class TestRuns:
    """Yesterday's, today's, and the same one again."""

    def test_yesterdays_set_still_runs(self, vms: Vms, sets: Sets, directory: Path) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
        history.back_up("sunday")
        overwrite(history.vm, 0xA1)
        history.freeze("monday")
        monday = sets.start(history.vm, id="monday", speed=SLOW)
        history.vm.write("drive0", 0xB1, 5 * MIB, 65536)
        planned = sets.plan(history.vm, id="tuesday")["plan"]
        assert planned["vms"][0]["action"] == "finish"
        # Nothing of today's has begun, and nothing of yesterday's is disturbed.
        result = succeed("backup_set", {"plan": planned, "state": "started"})
        assert (result["changed"], result_of(result, "web01")["state"]) == (False, "running")
        assert "set monday" in result_of(result, "web01")["reason"]
        assert history.vm.job["status"] != "concluded"
        release(history.vm)
        history.freeze("tuesday")
        result = succeed("backup_set", {"plan": planned})
        assert result_of(result, "web01")["state"] == "published"
        assert history.note("monday") == {"drive0": "incremental"}
        assert history.note("tuesday") == {"drive0": "incremental"}
        history.note("sunday")
        assert history.reason("tuesday") == "changes since set monday"
        history.check()
        assert succeed("backup_set", {"plan": monday})["changed"] is False

    @pytest.mark.parametrize("orders", [{}, {"supersede": True}])
    def test_supersede(
        self,
        vms: Vms,
        sets: Sets,
        directory: Path,
        start_module: t.Callable[..., ModuleProcess],
        orders: dict[str, bool],
    ) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
        history.back_up("sunday")
        overwrite(history.vm, 0xA1)
        monday = sets.start(history.vm, id="monday", speed=SLOW)
        follower = start_module("backup_set", {"plan": monday, **orders})
        history.vm.write("drive0", 0xB1, 5 * MIB, 65536)
        history.freeze("tuesday")
        tuesday = sets.plan(history.vm, id="tuesday", speed=SLOW)["plan"]
        before = records(sets)
        assert run_module("backup_set", {"plan": tuesday, "supersede": True}, check=True)["changed"] is True
        assert records(sets) == before
        started = succeed("backup_set", {"plan": tuesday, "supersede": True, "state": "started"})
        assert result_of(started, "web01")["state"] == "running"
        assert "superseded by set tuesday" in result_of(started, "web01")["warnings"][0]
        # Yesterday's run ends with that, and does not supersede in turn.
        late = follower.result()
        assert (late["rc"], result_of(late, "web01")["state"]) == (1, "cancelled")
        assert "superseded by set tuesday" in late["msg"]
        release(history.vm)
        succeed("backup_set", {"plan": tuesday})
        history.note("tuesday")
        assert history.reason("tuesday").startswith(("changes since set sunday", "the record of the changes since"))
        assert history.bitmaps() == history.recorded("tuesday")

    @pytest.mark.parametrize("state", ["started", "completed"])
    def test_to_begin_nothing_removes_nothing(self, state: str, vms: Vms, sets: Sets) -> None:
        vm = vms.start(vms.disk(size=SIZE), name="web01")
        monday = sets.start(vm, id="monday", speed=SLOW)
        tuesday = sets.plan(vm, id="tuesday", supersede=True)["plan"]
        if state == "completed":
            # It waits for yesterday's.
            release(vm)
        seen = succeed("backup_set", {"plan": tuesday, "state": state, "begin": False, "supersede": True})
        found = result_of(seen, "web01")
        assert (found["state"], found["warnings"]) == ("running" if state == "started" else "skipped", [])
        assert bool(vm.block_jobs) == (state == "started")
        release(vm)
        done = succeed("backup_set", {"plan": monday})
        assert (result_of(done, "web01")["state"], done["changed"]) == ("published", state == "started")

    def test_a_failed_attempt_is_for_the_next_run(self, vms: Vms, sets: Sets, directory: Path) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
        history.back_up("s1")
        overwrite(history.vm, 0xA1)
        plan = sets.start(history.vm, id="s2", speed=SLOW)
        history.vm.qmp.execute("block-job-cancel", device=history.vm.job["device"])
        wait_concluded(history.vm)
        first = fail("backup_set", {"plan": plan})
        before = snapshot(sets.path)
        for state in ("started", "completed"):
            again = fail("backup_set", {"plan": plan, "state": state})
            assert (again["changed"], again["qmp"], again["msg"]) == (False, [], first["msg"])
        assert "run the backup again with id s2" in first["msg"].lower()
        assert snapshot(sets.path) == before
        assert history.back_up("s2") == "incremental"
        history.check()

    def test_the_repository_is_not_mounted(self, vms: Vms, sets: Sets, directory: Path) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
        history.back_up("s1")
        overwrite(history.vm, 0xA1)
        history.freeze("s2")
        plan = sets.start(history.vm, id="s2", speed=SLOW)
        away = directory / "away"
        sets.path.rename(away)
        sets.path.mkdir()
        names = {"repository": str(sets.path), "names": ["web01"]}
        for args in ({"plan": plan}, {**names, "state": "cancelled"}, {**names, "state": "untracked"}):
            assert "mounted?" in fail("backup_set", args)["msg"]
        assert "mounted?" in fail("backup_plan", sets.arguments(history.vm, create_repository=False))["msg"]
        assert list(sets.path.iterdir()) == []
        # The job knows its image by an open file, and nothing is lost.
        sets.path.rmdir()
        away.rename(sets.path)
        release(history.vm)
        succeed("backup_set", {"plan": plan})
        history.note("s2")
        history.check()

    def test_the_repository_is_another_one(self, vms: Vms, sets: Sets, directory: Path) -> None:
        history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
        history.back_up("s1")
        plan = sets.plan(history.vm, id="s2")["plan"]
        shutil.move(sets.path, directory / "first")
        other = Sets(sets.path)
        other.back_up(history.vm, id="s0")
        # The plan is of an increment on a set that is not in this one.
        result = succeed("backup_set", {"plan": plan})
        [disk] = result_of(result, "web01")["disks"]
        assert (disk["level"], disk["parent"]) in (("full", None), ("incremental", "s0"))


class TestUntracked:
    """No bitmaps of ours any more."""

    def test_with_names_and_with_a_plan(self, vms: Vms, sets: Sets, directory: Path) -> None:
        disks = [vms.disk(number, size=SIZE) for number in range(2)]
        history = History(vms.start(*disks, name="web01"), sets, directory)
        vm = history.vm
        names = {"repository": str(sets.path), "names": ["web01"], "state": "untracked"}
        vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="foreign")
        for number, args in enumerate((names, {"plan": sets.plan(vm)["plan"], "state": "untracked"})):
            set_id = f"s{number}"
            assert history.back_up(set_id) == "full"
            there = {node: set(vm.bitmaps(node)) for node in ("n0", "n1")}
            before = snapshot(sets.path)
            predicted = run_module("backup_set", args, check=True)
            assert (predicted["changed"], predicted["qmp"]) == (True, [])
            assert {node: set(vm.bitmaps(node)) for node in ("n0", "n1")} == there
            result = succeed("backup_set", args)
            assert result["changed"] is True
            assert result_of(result, "web01")["state"] == "untracked"
            assert "2 bitmaps removed" in result_of(result, "web01")["reason"]
            assert {node: set(vm.bitmaps(node)) for node in ("n0", "n1")} == {"n0": {"foreign"}, "n1": set()}
            again = succeed("backup_set", args)
            assert (again["changed"], again["qmp"]) == (False, [])
            assert snapshot(sets.path) == before
        assert history.back_up("s2") == "full"
        history.check()

    def test_an_internal_snapshot_can_be_loaded_after_it(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(vms.disk(size=SIZE), name="web01")

        def say(command: str) -> str:
            return str(vm.qmp.execute("human-monitor-command", command_line=command))

        say("savevm before")
        sets.back_up(vm)
        assert "Device has active dirty bitmaps" in say("loadvm before")
        succeed("backup_set", {"repository": str(sets.path), "names": ["web01"], "state": "untracked"})
        assert not say("loadvm before")

    def test_while_a_set_is_being_made(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(vms.disk(size=SIZE), name="web01")
        names = {"repository": str(sets.path), "names": ["web01"], "state": "untracked"}
        # The first set, and an increment.
        for set_id in ("s1", "s2"):
            plan = sets.start(vm, id=set_id, speed=SLOW)
            bitmaps = set(vm.bitmaps("n0"))
            for args in (names, {"plan": plan, "state": "untracked"}):
                assert f"set {set_id} is being made" in fail("backup_set", args)["msg"]
            assert set(vm.bitmaps("n0")) == bitmaps
            release(vm)
            succeed("backup_set", {"plan": plan})
            overwrite(vm, 0xA1)

    def test_of_a_vm_that_is_off_or_another(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0])
        sets.back_up(vm)
        vm.quit()
        names = {"repository": str(sets.path), "names": ["web01"], "state": "untracked"}
        assert str(vm.monitor) in fail("backup_set", names)["msg"]
        # Another VM has got the monitor's address: its records are not this one's.
        other = vms.start(vms.disk(1, size=SIZE, id="drive0"), name="db01", uuid=UUIDS[1])
        sets.back_up(other)
        other.monitor.rename(vm.monitor)
        assert UUIDS[1] in fail("backup_set", names)["msg"]
        assert len(other.bitmaps("n1")) == 1

    @pytest.mark.parametrize("state", ["cancelled", "untracked"])
    def test_no_repository_is_made_for_that(self, vms: Vms, sets: Sets, state: str) -> None:
        vm = vms.start(vms.disk(size=SIZE), name="web01")
        args = {"plan": sets.plan(vm)["plan"], "state": state}
        for check in (True, False):
            assert run_module("backup_set", args, check=check)["changed"] is False
            assert not sets.path.exists()

    def test_a_vm_that_was_never_backed_up(self, vms: Vms, sets: Sets) -> None:
        vm, other = vms.start(vms.disk(size=SIZE), name="web01"), vms.start(vms.disk(1, size=SIZE), name="other")
        sets.back_up(other)
        before = snapshot(sets.path)
        args = {"plan": sets.plan(vm)["plan"], "state": "untracked"}
        for check in (True, False):
            assert run_module("backup_set", args, check=check)["changed"] is False
            assert snapshot(sets.path) == before


@pytest.mark.parametrize("moment", ["nothing", "running", "done", "published"])
def test_check_mode_of_all_states_changes_nothing(vms: Vms, sets: Sets, moment: str) -> None:
    vm = vms.start(vms.disk(size=SIZE), name="web01")
    sets.back_up(vm, id="s0")
    overwrite(vm, 0xA1)
    if moment == "published":
        sets.back_up(vm)
    plan = sets.start(vm, speed=SLOW) if moment in ("running", "done") else sets.plan(vm)["plan"]
    if moment == "done":
        release(vm)
        wait_concluded(vm)
    names = {"repository": str(sets.path), "names": ["web01"]}

    def state() -> tuple[object, ...]:
        return records(sets), vm.bitmaps("n0"), [job["device"] for job in vm.block_jobs], vm.fdsets

    before = state()
    run_module("backup_plan", sets.arguments(vm), check=True)
    for args in (
        {"plan": plan, "state": "started"},
        {"plan": plan, "state": "completed"},
        {"plan": plan, "state": "cancelled"},
        {"plan": plan, "state": "untracked"},
        {**names, "state": "cancelled"},
        {**names, "state": "untracked"},
        {"plan": plan, "takeover": True, "supersede": True, "adopt": True},
        {"plan": {**plan, "id": "s9"}, "supersede": True},
    ):
        result = run_module("backup_set", args, check=True)
        assert not sent(result, "drive-backup")
        assert result["qmp"] == []
        assert state() == before
    if moment == "running":
        release(vm)
    if moment != "nothing":
        succeed("backup_set", {"plan": plan})
