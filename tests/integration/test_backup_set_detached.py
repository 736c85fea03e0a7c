# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets that a process on the hypervisor brings to their end, while nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import detached
from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import lock_directory
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.daemon_place import PLACE
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp, QmpError
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets

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
    asyncio.run(detached.stop(str(sets.path)))
    Path(detached.log_path(str(sets.path))).unlink(missing_ok=True)


def start(sets: Sets, vms: list[Qemu], *, detach: bool = True, id: str = "s1") -> dict[str, t.Any]:  # noqa: A002
    """Start the sets, one VM at a time, so slowly that they do not end by themselves."""
    plan = sets.plan(*vms, speed=SLOW, id=id)["plan"]
    return succeed("backup_set", {"plan": plan, "state": "started", "max_vms": 1, "detach": detach})


def states(result: dict[str, t.Any]) -> list[str]:
    return sorted(vm["state"] for vm in result["vms"])


def who(sets: Sets) -> detached.Who | None:
    path = detached.lock_path(str(sets.path))
    return detached._read(path) if detached._is_held(path) else None


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
    result = start(sets, three)
    assert (states(result), result["detached"]) == (["queued", "queued", "running"], True)
    process = who(sets)
    assert process
    # It belongs to nobody who could take it along.
    assert os.getsid(process.pid) == process.pid
    for _vm in three:
        release_next(three)
    wait_until(lambda: not who(sets), "the end of the process")
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")
    assert '"failed"' in Path(detached.log_path(str(sets.path))).read_text()
    # Who asks later is told, and changes nothing.
    later = sets.back_up(*three, id="s1")
    assert (states(later), later["changed"]) == (["published"] * 3, False)


def test_one_that_is_killed_is_a_killed_module(three: list[Qemu], sets: Sets, directory: Path) -> None:
    copies = [frozen(vm, directory) for vm in three]
    start(sets, three)
    process = who(sets)
    assert process
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not who(sets), "its end")
    assert [len(vm.block_jobs) for vm in three].count(1) == 1
    again = start(sets, three)
    assert (states(again), again["detached"]) == (["queued", "queued", "running"], True)
    for _vm in three:
        release_next(three)
    wait_until(lambda: not who(sets), "the end of the second process")
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")


def test_there_is_one_for_a_repository(three: list[Qemu], sets: Sets) -> None:
    start(sets, three)
    process = who(sets)
    assert process
    plan = sets.plan(*three, id="s1")["plan"]
    said = fail("backup_set", {"plan": plan, "state": "started", "detach": True})["msg"]
    assert said.startswith(f"detach: process {process.pid} makes the sets s1 in {sets.path} since ")
    # Somebody who waits may do so beside it.
    for vm in three:
        release_next([vm]) if vm.block_jobs else None
    beside = succeed("backup_set", {"plan": plan, "max_vms": 3})
    assert states(beside) == ["published"] * 3
    wait_until(lambda: not who(sets), "the end of the process")


def test_to_cancel_all_ends_it_first(three: list[Qemu], sets: Sets) -> None:
    start(sets, three)
    process = who(sets)
    assert process
    result = succeed("backup_set", {"repository": sets.path, "state": "cancelled"})
    assert states(result) == ["cancelled"]
    assert not who(sets)
    assert not [vm for vm in three if vm.block_jobs]
    assert not list(sets.path.glob("*/s1"))


def test_none_is_left_where_nothing_is_left_to_be_done(three: list[Qemu], sets: Sets) -> None:
    sets.back_up(*three, id="s1")
    result = start(sets, three)
    assert (states(result), result["detached"]) == (["published"] * 3, False)
    wait_until(lambda: not who(sets), "its end")


def test_none_is_left_by_a_module_that_is_killed(
    three: list[Qemu], sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    plan = sets.plan(*three, speed=SLOW, id="s1")["plan"]
    for vm in three:
        # It waits for their answers.
        os.kill(vm.pid, signal.SIGSTOP)
    module = start_module("backup_set", {"plan": plan, "state": "started", "detach": True})
    wait_until(lambda: bool(who(sets)), "the process")
    module.kill()
    wait_until(lambda: not who(sets), "its end")
    for vm in three:
        os.kill(vm.pid, signal.SIGCONT)


def test_it_is_for_a_start_only(three: list[Qemu], sets: Sets) -> None:
    said = fail("backup_set", {"plan": sets.plan(*three)["plan"], "detach": True})["msg"]
    assert said == "detach: only state: started leaves sets to a process of their own"


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
        "The hypervisor goes on by itself. Run the same playbook with -e vm_backup_id=s1 for the results."
        in play.output
    )
    # Whose turn it is depends on what was planned.
    wait_until(lambda: not release_all(three) and not who(sets), "the end of the process", 3 * PATIENCE)
    said = Path(detached.log_path(str(sets.path))).read_text()
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
