# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many VMs on a hypervisor: who comes first, how fast, and in how many calls."""

from __future__ import annotations

import asyncio
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository
from ansible_collections.vmfleet.backup.tests.harness.backup import release, sent
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets, result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

BUDGET = 16 * MIB


@pytest.fixture
def three(vms: Vms) -> list[Qemu]:
    """VMs with small disks."""
    return [vms.start(vms.disk(number, size=8 * MIB), name=f"vm{number}") for number in range(3)]


def states(result: dict[str, t.Any]) -> dict[str, str]:
    return {vm["name"]: vm["state"] for vm in result["vms"]}


def to_the_end(plan: dict[str, t.Any], **options: t.Any) -> list[dict[str, t.Any]]:
    """Calls of backup_set with one slice each, until nothing is left to be done."""
    results = []
    deadline = time.monotonic() + PATIENCE
    while not results or {"running", "queued"} & set(states(results[-1]).values()):
        assert time.monotonic() < deadline, results[-1]
        results.append(run_module("backup_set", {"plan": plan, **options}))
    return results


def cancel(plan: dict[str, t.Any]) -> None:
    succeed("backup_set", {"plan": plan, "state": "cancelled"})


class TestOrder:
    def test_the_longest_without_a_backup_comes_first(self, three: list[Qemu], sets: Sets) -> None:
        for name, order in (("monday", (1, 2)), ("tuesday", (1,))):
            for number in order:
                sets.back_up(three[number], id=name)
                # Sets are told apart by the second.
                time.sleep(1)
        plan = sets.plan(*three, speed="64K")["plan"]
        expected = [0, 2, 1]
        for place, number in enumerate(expected):
            result = succeed("backup_set", {"plan": plan, "state": "started", "max_vms": 1})
            assert states(result) == {
                f"vm{other}": "published" if at < place else "running" if at == place else "queued"
                for at, other in enumerate(expected)
            }
            release(three[number])
            succeed("backup_set", {"plan": {**plan, "vms": [vm for vm in plan["vms"] if vm["name"] == f"vm{number}"]}})

    def test_one_that_cannot_be_backed_up_does_not_hold_the_others_up(self, three: list[Qemu], sets: Sets) -> None:
        plan = sets.plan(*three)["plan"]
        three[0].kill()
        result = fail("backup_set", {"plan": plan, "max_vms": 1})
        assert states(result) == {"vm0": "failed", "vm1": "published", "vm2": "published"}


class TestSlices:
    def test_a_call_comes_back_and_the_next_one_goes_on(self, three: list[Qemu], sets: Sets) -> None:
        plan = sets.plan(*three, speed=SLOW)["plan"]
        first = succeed("backup_set", {"plan": plan, "slice": 0.5, "max_vms": 2})
        assert sorted(states(first).values()) == ["queued", "running", "running"]
        for vm in first["vms"]:
            if vm["state"] == "running":
                assert vm["len"] == 8 * MIB
                assert 0 < vm["offset"] < vm["len"]
        jobs = [job["device"] for vm in three for job in vm.block_jobs]
        second = succeed("backup_set", {"plan": plan, "slice": 0.5, "max_vms": 2})
        assert not sent(second, "drive-backup")
        assert [job["device"] for vm in three for job in vm.block_jobs] == jobs
        for vm in three:
            release(vm)
        results = to_the_end(plan, slice=0.5, max_vms=2)
        assert set(states(results[-1]).values()) == {"published"}
        assert not any(vm.block_jobs for vm in three)

    @pytest.mark.parametrize("pace", [0.0, 0.1])
    def test_the_shortest_slice_is_long_enough_to_get_on(
        self, three: list[Qemu], sets: Sets, pace: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        intents = AsyncRepository.intents

        async def slowly(repository: AsyncRepository) -> t.Any:
            await asyncio.sleep(pace)
            return await intents(repository)

        monkeypatch.setattr(AsyncRepository, "intents", slowly)
        results = to_the_end(sets.plan(*three)["plan"], slice=0.001)
        assert len(results) < 50
        assert set(states(results[-1]).values()) == {"published"}

    def test_a_failure_is_told_at_the_end(self, three: list[Qemu], sets: Sets) -> None:
        plan = sets.plan(*three, speed=SLOW)["plan"]
        three[0].kill()
        first = succeed("backup_set", {"plan": plan, "slice": 0.5})
        assert states(first) == {"vm0": "failed", "vm1": "running", "vm2": "running"}
        for vm in three[1:]:
            release(vm)
        last = to_the_end(plan, slice=0.5)[-1]
        assert last["failed"]
        assert "vm0" in last["msg"]
        assert states(last) == {"vm0": "failed", "vm1": "published", "vm2": "published"}

    def test_standing_still_is_noticed_over_many_calls(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(name="web01")
        # It copies one piece, and rests for days.
        results = to_the_end(sets.plan(vm, speed="1")["plan"], slice=0.2, stall_timeout=2)
        assert len(results) > 2
        assert "no progress for 2 s" in result_of(results[-1], "web01")["error"]
        assert not vm.block_jobs
        sets.assert_absent("web01")

    def test_advancing_slowly_is_not_standing_still(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(name="web01")
        plan = sets.plan(vm, speed=SLOW)["plan"]
        begin = time.monotonic()
        while time.monotonic() < begin + 5:
            result = succeed("backup_set", {"plan": plan, "slice": 0.2, "stall_timeout": 3})
            assert states(result) == {"web01": "running"}
        cancel(plan)

    @pytest.mark.parametrize(
        ("option", "options"),
        [
            ("slice", {"slice": 1, "state": "started"}),
            ("slice", {"slice": -1}),
            ("max_vms", {"max_vms": -1}),
        ],
    )
    def test_what_cannot_be_meant(self, option: str, options: dict[str, t.Any], vms: Vms, sets: Sets) -> None:
        plan = sets.plan(vms.start())["plan"]
        assert fail("backup_set", {"plan": plan, **options})["msg"].startswith(f"{option}: ")
        assert not sets.path.exists()


class TestBandwidth:
    def test_it_is_kept_while_jobs_start_and_end(
        self, vms: Vms, sets: Sets, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        sizes = (16, 32, 48, 64, 64)
        machines = [vms.start(vms.disk(at, size=size * MIB), name=f"vm{at}") for at, size in enumerate(sizes)]
        plan = sets.plan(*machines)["plan"]
        begin = time.monotonic()
        process = start_module("backup_set", {"plan": plan, "bandwidth": str(BUDGET), "max_vms": 4})
        most = 0
        while process.running:
            running = speeds(machines)
            most = max(most, len(running))
            if running == speeds(machines):
                # Nothing has changed while they were asked one after another.
                assert sum(running.values()) <= BUDGET, running
        duration = time.monotonic() - begin
        assert most == 4
        assert set(states(process.result()).values()) == {"published"}
        # Half of each disk is holes, which take no time.
        assert sum(sizes) / 2 * MIB <= 1.1 * BUDGET * duration

    def test_those_that_are_left_get_what_the_others_had(self, vms: Vms, sets: Sets) -> None:
        machines = [vms.start(vms.disk(at), name=f"vm{at}") for at in range(2)]
        plan = sets.plan(*machines)["plan"]
        succeed("backup_set", {"plan": plan, "slice": 0.5, "bandwidth": "2M"})
        assert [vm.job["speed"] for vm in machines] == [MIB, MIB]
        machines[0].qmp.execute("block-job-cancel", device=machines[0].job["device"], force=True)
        result = succeed("backup_set", {"plan": plan, "slice": 1, "bandwidth": "2M"})
        assert states(result) == {"vm0": "failed", "vm1": "running"}
        assert machines[1].job["speed"] == 2 * MIB
        cancel(plan)

    def test_no_job_is_faster_than_each_may_be(self, vms: Vms, sets: Sets) -> None:
        vm = vms.start(name="web01")
        plan = sets.plan(vm, speed=SLOW)["plan"]
        succeed("backup_set", {"plan": plan, "slice": 0.5, "bandwidth": "1G"})
        assert vm.job["speed"] == MIB
        cancel(plan)

    def test_it_holds_for_copies_that_run_already(self, vms: Vms, sets: Sets) -> None:
        machines = [vms.start(vms.disk(at), name=f"vm{at}") for at in range(2)]
        plan = sets.plan(*machines, speed=SLOW)["plan"]
        succeed("backup_set", {"plan": plan, "state": "started"})
        succeed("backup_set", {"plan": plan, "slice": 0.5, "bandwidth": "1M"})
        assert [vm.job["speed"] for vm in machines] == [MIB // 2, MIB // 2]
        cancel(plan)


def speeds(machines: list[Qemu]) -> dict[str, int]:
    """The speed limits of all jobs that copy."""
    return {job["device"]: job["speed"] for vm in machines for job in vm.block_jobs if job["status"] == "running"}
