# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How often backup_set looks at a VM whose set is copied, and what may happen between two looks."""

from __future__ import annotations

import asyncio
import functools
import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.engine import reconcile
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import VmState
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun, Settings
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import observe
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import parse_plan
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Failure
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.harness import snapshots
from ansible_collections.vmfleet.backup.tests.harness.backup import wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, layered
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")

JOB_DISMISSED = "job-dismiss"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One name for each look at all that there is of a VM."""
    found: list[str] = []

    async def counted(monitor: Monitor, name: str = "", known: Vm | None = None) -> Vm:
        found.append(name)
        return await inspect_vm(monitor, name, known)

    monkeypatch.setattr(observe, "inspect_vm", counted)
    return found


@pytest.fixture
def history(vms: Vms, directory: Path, sets: Sets) -> History:
    """A VM with two sets, and changes since."""
    vm = vms.start(Disk(layered(directory, "a", 3, SIZE)[-1], id="drive0", node="n0"), name="web01")
    made = History(vm, sets, directory)
    made.back_up("s0")
    overwrite(vm, 1)
    made.back_up("s1")
    overwrite(vm, 2)
    return made


def complete(sets: Sets, plan: dict[str, t.Any], meanwhile: t.Callable[[], object] = lambda: None) -> list[str]:
    """Bring a set to its end in this process, and do something right after its images are on stable storage."""
    real, process = finish.finish_image, os.getpid()

    def finish_image(*arguments: t.Any) -> t.Any:
        done = real(*arguments)
        # Modules that are run meanwhile are children of this process.
        if os.getpid() == process:
            meanwhile()
        return done

    async def work() -> list[str]:
        async with ThreadedCalls(Watch(str(sets.path), writing=True)) as calls:
            repository = AsyncRepository(open_repository(str(sets.path)), calls)
            run = BackupRun.of(repository, parse_plan(plan), Settings())
            return [outcome.state for outcome in await reconcile(run)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finish, "finish_image", finish_image)
        return asyncio.run(work())


def copied(history: History, set_id: str) -> dict[str, t.Any]:
    """Start a set and wait until it is copied; return its plan."""
    history.freeze(set_id)
    plan: dict[str, t.Any] = history.sets.plan(history.vm, id=set_id)["plan"]
    succeed("backup_set", {"plan": plan, "state": "started"})
    wait_concluded(history.vm)
    return plan


def nothing(_vm: Qemu, _directory: Path) -> None:
    pass


def plug_disk(vm: Qemu, directory: Path) -> None:
    file = {"driver": "file", "filename": str(create(directory / "plugged", size=MIB))}
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="plugged", file=file)


def snapshot(vm: Qemu, directory: Path) -> None:
    snapshots.take(vm, "n0", directory / "overlay", "top", like_libvirt=False)


def snapshot_like_libvirt(vm: Qemu, directory: Path) -> None:
    snapshots.take(vm, "n0", directory / "overlay", "top")


def remove_bitmaps(vm: Qemu, _directory: Path) -> None:
    for name in vm.bitmaps("n0"):
        vm.qmp.execute("block-dirty-bitmap-remove", node="n0", name=name)


def grow(vm: Qemu, _directory: Path) -> None:
    vm.qmp.execute("block_resize", node_name="n0", size=2 * SIZE)


def shrink(vm: Qemu, _directory: Path) -> None:
    vm.qmp.execute("block_resize", node_name="n0", size=SIZE // 2)


def dismiss(vm: Qemu, _directory: Path) -> None:
    vm.qmp.execute(JOB_DISMISSED, id=vm.job["device"])


@pytest.mark.parametrize(
    ("event", "number"),
    [
        (nothing, 1),
        (plug_disk, 1),
        (snapshot, 1),
        (snapshot_like_libvirt, 1),
        (remove_bitmaps, 1),
        (grow, 1),
        (shrink, 1),
        # Whose monitor that is now is looked at.
        (dismiss, 2),
    ],
)
def test_between_the_look_at_ended_jobs_and_the_one_before_the_set_is_published(
    event: t.Callable[[Qemu, Path], None], number: int, history: History, looks: list[str], directory: Path
) -> None:
    """A set whose images are on stable storage is good, whatever happens; no write is missed by the next one."""
    vm, sets = history.vm, history.sets
    plan = copied(history, "s2")
    assert complete(sets, plan, lambda: event(vm, directory)) == [VmState.PUBLISHED]
    assert looks == ["web01"] * number
    assert vm.block_jobs == []
    assert history.note("s2") == {"drive0": "incremental"}
    named = {node["node-name"] for node in vm.qmp.execute("query-named-block-nodes", flat=True)}
    if "top" in named:
        history.vm.disks = (Disk(directory / "overlay", id="drive0", node="top"),)
    overwrite(vm, 3) if event is not shrink else vm.write("drive0", 3, 0, MIB)
    history.back_up("s3", *(["drive0"] if "plugged" in named else []), include_disks=["drive0"])
    history.check()


def test_another_process_publishes_it_meanwhile(history: History, looks: list[str]) -> None:
    plan = copied(history, "s2")

    def finish_elsewhere() -> None:
        assert run_module("backup_set", {"plan": plan})["vms"][0]["state"] == VmState.PUBLISHED

    assert complete(history.sets, plan, finish_elsewhere) == [VmState.PUBLISHED]
    # The jobs are gone when the locks are taken, and what is found then is looked at without them.
    assert looks == ["web01"] * 3
    history.note("s2")
    history.check()


def test_another_process_gives_it_up_meanwhile_and_is_killed(history: History, looks: list[str]) -> None:
    plan = copied(history, "s2")
    repository = open_repository(str(history.sets.path))
    [intent] = repository.intents()
    failure = Failure(intent.run, intent.attempt, "s2", VmState.FAILED, "of no use", intent.started, intent.started)
    record = functools.partial(staging.record_failure, repository, "web01", failure)
    assert complete(history.sets, plan, record) == [VmState.FAILED]
    # What is removed then is looked at in full, without the locks and with them, and so is the VM at the end.
    assert looks == ["web01"] * 4
    assert history.vm.block_jobs == []
    history.back_up("s2")
    history.check()
