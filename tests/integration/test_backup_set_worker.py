# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets that are left to a worker: a process on the hypervisor that brings them to their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import Who, WorkerPlace
from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import lock_directory
from ansible_collections.vmfleet.backup.plugins.module_utils._host.scope import offers_scopes
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.daemon_place import PLACE
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp, QmpError
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets
from ansible_collections.vmfleet.backup.tests.harness.workers import end_worker

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def three(vms: Vms) -> list[Qemu]:
    """VMs with small disks."""
    return [vms.start(vms.disk(number, size=8 * MIB), name=f"vm{number}") for number in range(3)]


@pytest.fixture
def sets(sets: Sets) -> t.Iterator[Sets]:
    """A repository, whose process ends with the test."""
    yield sets
    end_worker(sets.path)
    for path in place(sets)[1:]:
        Path(path).unlink(missing_ok=True)


def place(sets: Sets) -> WorkerPlace:
    return WorkerPlace.of(str(sets.path))


def leave(sets: Sets, vms: list[Qemu], **options: t.Any) -> dict[str, t.Any]:
    """Leave the sets to a worker, one VM at a time, so slowly that they do not end by themselves."""
    plan = sets.plan(*vms, speed=SLOW, id="s1")["plan"]
    return succeed("backup_set", {"plan": plan, "state": "started", "max_vms": 1, "detach": "required", **options})


def follow(sets: Sets, *key: str, wait: float = 0) -> dict[str, t.Any]:
    return succeed("backup_follow", {"repository": str(sets.path), "wait": wait, **({"worker": key[0]} if key else {})})


def states(result: dict[str, t.Any]) -> list[str]:
    return sorted(vm["state"] for vm in result["vms"])


def who(sets: Sets) -> Who | None:
    return place(sets).who() if place(sets).is_held() else None


def frozen(vm: Qemu, directory: Path) -> dict[str, Path]:
    """Copies of its disks as they are, by name."""
    return {disk.name: vm.freeze(disk, directory / f"{vm.pid}-{disk.name}.qcow2") for disk in vm.disks}


def release_next(vms: list[Qemu]) -> None:
    """Let the copy go on that is running, or will be."""

    def running() -> list[Qemu]:
        return [vm for vm in vms if vm.block_jobs]

    wait_until(lambda: bool(running()), "the copy of the next VM")
    [vm] = running()
    release(vm)
    wait_until(lambda: not vm.block_jobs, "the end of its job")


def release_all(vms: list[Qemu]) -> None:
    """Let all copies go on that run at this moment, also those of VMs that are off."""
    for vm in vms:
        release(vm)
    for path in Path(lock_directory()).glob(f"{PLACE}*/qmp"):
        # It may have just ended, or talk to somebody else.
        with contextlib.suppress(OSError, QmpError), contextlib.closing(Qmp(path)) as qmp:
            for job in qmp.execute("query-block-jobs"):
                qmp.execute("block-job-set-speed", device=job["device"], speed=0)


def test_all_get_their_turn_though_nobody_waits(three: list[Qemu], sets: Sets, directory: Path) -> None:
    copies = [frozen(vm, directory) for vm in three]
    result = leave(sets, three, nice=7)
    assert (states(result), bool(result["worker"]), result["changed"]) == (["queued", "queued", "running"], True, True)
    process = who(sets)
    assert process
    # It belongs to nobody who could take it along.
    assert os.getsid(process.pid) == process.pid
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 7
    for _vm in three:
        release_next(three)
    wait_until(lambda: not who(sets), "the end of the worker")
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")
    # Who comes late is told what it has done, and a second time.
    for _time in range(2):
        found = follow(sets, result["worker"], wait=60)
        assert (states(found), found["changed"]) == (["published"] * 3, True)
        assert found["headline"].startswith("3 of 3 VMs have their set, 0 failed, 0 skipped, ")
    # Who asks the repository later changes nothing.
    later = sets.back_up(*three, id="s1")
    assert (states(later), later["changed"]) == (["published"] * 3, False)


@pytest.mark.parametrize(
    ("ionice", "expected"), [("best-effort", "best-effort: prio 7"), ("idle", "idle"), ("none", "")]
)
def test_its_io_gives_way(ionice: str, expected: str, three: list[Qemu], sets: Sets) -> None:
    def priority(pid: int) -> str:
        return subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=True).stdout.strip()

    leave(sets, three, ionice=ionice)
    process = who(sets)
    assert process
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert [priority(process.pid), priority(int(child))] == [expected or priority(os.getpid())] * 2
    succeed("backup_set", {"repository": sets.path, "state": "cancelled"})


@pytest.mark.skipif(offers_scopes(), reason="it has a unit of its own here")
def test_there_is_no_weight_without_a_unit(three: list[Qemu], sets: Sets) -> None:
    result = leave(sets, three, cpu_weight=20)
    assert [warning.split(":")[0] for warning in result["warnings"]] == ["cpu_weight"]
    # Who gives another weight does not mean this worker.
    plan = sets.plan(*three, speed=SLOW, id="s1")["plan"]
    other = {"plan": plan, "state": "started", "max_vms": 1, "detach": "required"}
    assert fail("backup_set", {**other, "cpu_weight": 30})["msg"].startswith("detach: process ")
    assert succeed("backup_set", {**other, "cpu_weight": 20})["worker"] == result["worker"]
    succeed("backup_set", {"repository": sets.path, "state": "cancelled"})


def test_who_follows_is_told_how_far_it_is(three: list[Qemu], sets: Sets) -> None:
    found = follow(sets)
    assert (found["running"], "vms" in found) == (False, False)
    result = leave(sets, three)
    found = follow(sets, result["worker"])
    process = who(sets)
    assert process
    assert (found["running"], found["pid"], found["id"], found["since"]) == (True, process.pid, "s1", process.since)
    assert states(found) == ["queued", "queued", "running"]
    assert [vm["name"] for vm in found["vms"]] == ["vm0", "vm1", "vm2"]

    def copied() -> int:
        return sum(vm["offset"] for vm in follow(sets)["vms"])

    before = copied()
    [vm] = [vm for vm in three if vm.block_jobs]
    [job] = vm.block_jobs
    with contextlib.closing(Qmp(vm.monitor)) as qmp:
        qmp.execute("block-job-set-speed", device=job["device"], speed=4 * MIB)
    wait_until(lambda: copied() > before or not vm.block_jobs, "what is told to change")
    # Of another worker nothing is said.
    assert follow(sets, "0" * 16, wait=60)["running"] is False


def test_one_that_is_killed_is_a_killed_module(three: list[Qemu], sets: Sets, directory: Path) -> None:
    copies = [frozen(vm, directory) for vm in three]
    first = leave(sets, three)
    process = who(sets)
    assert process
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not who(sets), "its end")
    found = follow(sets, first["worker"], wait=60)
    assert (found["running"], "vms" in found) == (False, False)
    assert [len(vm.block_jobs) for vm in three].count(1) == 1
    again = leave(sets, three)
    assert states(again) == ["queued", "queued", "running"]
    assert again["worker"] not in ("", first["worker"])
    for _vm in three:
        release_next(three)
    wait_until(lambda: not who(sets), "the end of the second worker")
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")


def test_there_is_one_for_a_repository(three: list[Qemu], sets: Sets) -> None:
    first = leave(sets, three)
    process = who(sets)
    assert process
    # Who wants the same sets, or some of them, follows it.
    assert leave(sets, three)["worker"] == leave(sets, three[:1])["worker"] == first["worker"]
    # Who wants others does not.
    other = sets.plan(*three, speed=SLOW, id="s2")["plan"]
    said = fail("backup_set", {"plan": other, "state": "started", "detach": "required"})["msg"]
    assert said.startswith(f"detach: process {process.pid} makes the sets s1 in {sets.path} since ")
    alone = succeed("backup_set", {"plan": other, "state": "started", "detach": "preferred"})
    assert (states(alone), "worker" in alone) == (["running"] * 3, False)
    # Nor does who gives an order that the worker has not got.
    said = fail("backup_set", {"plan": sets.plan(*three, id="s1")["plan"], **ORDERED})["msg"]
    assert said.startswith(f"detach: process {process.pid} makes")
    # Somebody who waits may do so beside it.
    plan = sets.plan(*three, id="s1")["plan"]
    for vm in three:
        release_next([vm]) if vm.block_jobs else None
    assert states(succeed("backup_set", {"plan": plan, "max_vms": 3})) == ["published"] * 3
    wait_until(lambda: not who(sets), "the end of the worker")


ORDERED = {"state": "started", "detach": "required", "supersede": True}


def test_to_cancel_all_ends_it_first(three: list[Qemu], sets: Sets) -> None:
    leave(sets, three)
    assert who(sets)
    result = succeed("backup_set", {"repository": sets.path, "state": "cancelled"})
    assert states(result) == ["cancelled"]
    assert not who(sets)
    assert not [vm for vm in three if vm.block_jobs]
    assert not list(sets.path.glob("*/s1"))


def test_what_is_done_at_once_is_told_at_once(three: list[Qemu], sets: Sets) -> None:
    sets.back_up(*three, id="s1")
    result = leave(sets, three, slice=60)
    assert (states(result), "worker" in result, result["changed"]) == (["published"] * 3, False, False)
    assert not who(sets)


def test_a_module_that_is_killed_takes_no_worker_along(
    three: list[Qemu], sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    plan = sets.plan(*three, speed=SLOW, id="s1")["plan"]
    for vm in three:
        # It waits for their answers.
        os.kill(vm.pid, signal.SIGSTOP)
    module = start_module("backup_set", {"plan": plan, "state": "started", "max_vms": 1, "detach": "required"})
    wait_until(lambda: bool(who(sets)), "the worker")
    module.kill()
    for vm in three:
        os.kill(vm.pid, signal.SIGCONT)
    for _vm in three:
        release_next(three)
    wait_until(lambda: not who(sets), "its end")
    assert {path.parent.parent.name for path in sets.path.glob("*/s1/manifest.json")} == {"vm0", "vm1", "vm2"}


def test_what_it_fails_with_is_the_result(three: list[Qemu], sets: Sets) -> None:
    plan = sets.plan(*three, id="s1")["plan"]
    wrong = {"plan": plan, "state": "started", "detach": "required", "slice": 60, "timeout": "soon"}
    assert fail("backup_set", wrong)["msg"].startswith("timeout: ")
    three[1].quit()
    found = fail("backup_set", {"plan": plan, "state": "started", "detach": "required", "slice": 60})
    assert states(found) == ["failed", "published", "published"]
    assert found["msg"]


def test_sets_that_are_to_end_are_left_to_nobody(sets: Sets) -> None:
    said = fail("backup_set", {"repository": sets.path, "state": "cancelled", "detach": "preferred"})["msg"]
    assert said == "detach: a worker can only make sets, and this state makes none; leave the option out"


def test_the_role_leaves_all_to_it(three: list[Qemu], sets: Sets, vms: Vms, directory: Path) -> None:
    hypervisor = Hypervisor(directory)
    assert hypervisor.sets.path == sets.path
    # What is needed for a VM that is off is loaded when its turn comes: Ansible has removed the module by then.
    off = vms.disk(9, size=8 * MIB)
    variables: dict[str, t.Any] = {
        "id": "s1",
        "max_vms": 1,
        "vms": [
            *({"monitor": str(vm.monitor)} for vm in three),
            {
                "name": "off9",
                "monitor": f"{directory}/off.qmp",
                "disks": [{"name": "drive9", "file": str(off.path), "format": "qcow2"}],
            },
        ],
    }
    # As a command line gives it.
    play = hypervisor.run("-e", "vm_backup_detach=true", **variables, speed=SLOW)
    assert play.rc == 0, play.output
    assert "0 of 4 VMs have their set, 0 failed, 0 skipped, nothing written, 1 running, 3 queued" in play.output
    assert (
        "The hypervisor continues without Ansible. Run the same playbook with -e vm_backup_id=s1 for the results."
        in play.output
    )
    # Whose turn it is depends on what was planned.
    wait_until(lambda: not release_all(three) and not who(sets), "the end of the worker", 3 * PATIENCE)
    said = Path(place(sets).log).read_text()
    assert {path.parent.parent.name for path in sets.path.glob("*/s1/manifest.json")} == {
        "vm0",
        "vm1",
        "vm2",
        "off9",
    }, said
    again = hypervisor.run(**variables)
    assert again.rc == 0, again.output
    assert "4 of 4 VMs have their set, 0 failed, 0 skipped, nothing written" in again.output
    assert again.recap()["changed"] == 0
