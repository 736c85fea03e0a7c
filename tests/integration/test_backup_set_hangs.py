# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set when somebody does not answer, or never comes back: the repository, a monitor, QEMU, the module itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import engine, finish
from ansible_collections.vmfleet.backup.plugins.module_utils._host import probe, worker
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import planner
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import (
    block_jobs,
    connection,
    qmp_client,
    target_image,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import monitor as qemu_monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import repository as repository_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.tests.harness.backup import release, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.filesystems import DeadServer
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.moments import Moment
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets, result_of

if t.TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

    Start = t.Callable[..., ModuleProcess]

pytestmark = pytest.mark.usefixtures("clean")

# After its first piece, a copy at this speed rests for longer than any test takes.
AT_REST = "1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are forks of this process: they do not wait long for what never comes."""
    monkeypatch.setattr(probe, "TIMEOUT", 5.0)
    monkeypatch.setattr(probe, "INTERVAL", 0.2)
    monkeypatch.setattr(worker, "MOMENT", 0.2)
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 3.0)
    monkeypatch.setattr(block_jobs, "SETTLE_TIMEOUT", 2.0)
    monkeypatch.setattr(engine, "UNREACHABLE_PATIENCE", 1.0)


@contextlib.contextmanager
def frozen(file_system: FileSystem) -> Iterator[None]:
    """Every write to the file system waits in the kernel, and nothing can interrupt it."""
    subprocess.run(["fsfreeze", "--freeze", str(file_system.path)], stdin=subprocess.DEVNULL, check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(file_system.path)], stdin=subprocess.DEVNULL, check=True)


@pytest.fixture
def mounted(storage: Storage) -> FileSystem:
    return storage.mount("ext4", 256 * MIB)


@pytest.fixture
def sets(mounted: FileSystem) -> Sets:
    return Sets(mounted.path / "repository")


def copy_of(vm: Qemu, directory: Path) -> dict[str, Path]:
    """A frozen copy of the VM's only disk."""
    return {str(vm.disks[0].id): vm.freeze(vm.disks[0], directory / f"frozen-{vm.pid}.qcow2")}


def wait_for_copies(sets: Sets, *names: str) -> None:
    """Wait until the sets of these VMs copy, and nothing of their start is left to be done."""

    def copying(name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            intent = json.loads((sets.path / name / f".{ID}.staging" / "intent.json").read_text())
            return bool(intent["phase"] == "copying")
        return False

    wait_until(lambda: all(copying(name) for name in names), "the start of the copies")


def attempt(sets: Sets, name: str, set_id: str = ID) -> str:
    """Which attempt has made a set."""
    return str(sets.manifest(name, set_id)["attempt"])


def test_nothing_is_begun_in_a_repository_that_hangs(
    vm: Qemu, directory: Path, mounted: FileSystem, sets: Sets, start_module: Start
) -> None:
    sets.back_up(vm, id="s0")
    bitmaps = vm.bitmaps("n0")
    plan = sets.plan(vm)["plan"]
    names = {"repository": str(sets.path), "names": ["vm"]}
    calls = [
        ("backup_plan", sets.arguments(vm)),
        # One that is to be made there.
        ("backup_plan", Sets(mounted.path / "below" / "another").arguments(vm)),
        ("backup_set", {"plan": plan}),
        ("backup_set", {"plan": plan, "state": "started"}),
        ("backup_set", {**names, "state": "cancelled"}),
        ("backup_set", {**names, "state": "untracked"}),
    ]
    with frozen(mounted):
        processes = [start_module(name, args) for name, args in calls]
        results = [process.result() for process in processes]
    for result in results:
        assert result["failed"] is True
        assert "does not answer within 5 s: its file system hangs; bring it back, or unmount it" in result["msg"]
        assert not result.get("qmp")
    assert vm.bitmaps("n0") == bitmaps
    assert not (mounted.path / "below").exists()
    assert {path.name for path in (sets.path / "vm").iterdir()} == {".lock", "s0"}
    copies = copy_of(vm, directory)
    succeed("backup_set", {"plan": plan})
    sets.assert_good("vm", copies, levels={"drive0": "incremental"})


def test_a_new_repository_is_not_made_where_writing_hangs(
    vm: Qemu, mounted: FileSystem, sets: Sets, start_module: Start
) -> None:
    plan = sets.plan(vm)["plan"]
    with frozen(mounted):
        assert "its file system hangs" in start_module("backup_set", {"plan": plan}).result()["msg"]
    assert not sets.path.exists()
    succeed("backup_set", {"plan": plan})


def test_a_copy_that_rests_does_not_stop_qemu(
    vms: Vms, directory: Path, mounted: FileSystem, sets: Sets, start_module: Start
) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="web02")
    copies = {each.monitor.stem: copy_of(each, directory) for each in (vm, other)}
    plan = sets.plan(vm, other, speed=AT_REST)["plan"]
    process = start_module("backup_set", {"plan": plan})
    wait_for_copies(sets, "web01", "web02")
    wait_until(lambda: vm.job["offset"] and other.job["offset"], "the first pieces")
    with frozen(mounted):
        result = process.result()
        for each, disk in ((vm, "drive0"), (other, "drive1")):
            found = result_of(result, each.monitor.stem)
            assert found["state"] == "failed"
            assert "its file system hangs" in found["error"]
            assert found["error"].endswith(
                "the next run continues with them. Run the backup again when the repository answers"
            )
            # If the job were cancelled, QEMU would close its image, and wait for the repository with all that it does.
            assert each.status == "running"
            # Into a part that is copied already: the others wait, as the copy has to come first.
            each.write(disk, 7, 0, 65536)
        assert "its file system hangs" in start_module("backup_set", {"plan": plan}).result()["msg"]
    release(vm)
    release(other)
    succeed("backup_set", {"plan": plan})
    for each in (vm, other):
        sets.assert_good(each.monitor.stem, copies[each.monitor.stem])


@pytest.mark.slow
def test_a_guest_in_the_middle_of_a_copy_goes_on_when_the_repository_is_back(
    directory: Path, mounted: FileSystem, sets: Sets, start_module: Start
) -> None:
    (directory / "vm").mkdir()
    with Guest(directory / "vm") as guest:
        # So fast that pieces are on their way at any time: what QEMU waits for, no command can take back.
        process = start_module("backup_set", {"plan": sets.plan(guest, speed="8M")["plan"]})
        wait_for_copies(sets, "guest")
        with frozen(mounted):
            result = process.result()
            assert "its file system hangs" in result["msg"]
            assert "its jobs were cancelled, but cannot end until the repository answers" in result["msg"]
            assert guest.status == "running"
            assert "its file system hangs" in start_module("backup_plan", sets.arguments(guest)).result()["msg"]
        wait_until(lambda: all(job["status"] == "concluded" for job in guest.block_jobs), "the end of the jobs")
        rounds = guest.rounds
        wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")
        assert guest.status == "running"
        sets.back_up(guest)
        assert guest.block_jobs == []
        assert guest.fdsets == []
        sets.assert_tidy("guest")


def is_copying(_repository: t.Any, intent: t.Any) -> bool:
    return bool(intent.phase == "copying")


# Whatever comes first of what two VMs do there at the same time.
STARTING = {
    "lock": (repository_repository, "_check_lock"),
    "begin": (staging, "begin"),
    "make an image": (target_image, "_make_file"),
    "reserve": (target_image, "reserve"),
    "hand over": (block_jobs, "open_pair"),
    "right after the start": (staging, "update", is_copying),
}
ENDING = {
    "finish": (finish, "finish_image"),
    "describe": (staging, "describe"),
    "publish": (staging, "publish"),
}


@pytest.mark.parametrize("moment", [*first(2, STARTING), *first(1, ENDING)])
def test_the_repository_hangs_from_a_moment_on(
    vms: Vms,
    directory: Path,
    mounted: FileSystem,
    sets: Sets,
    start_module: Start,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="web02")
    copies = {each.monitor.stem: copy_of(each, directory) for each in (vm, other)}
    # No copy is to end while the file system hangs: QEMU closes the image then, and stands still until it is back.
    plan = sets.plan(vm, other, speed="2M")["plan"]
    if moment in ENDING:
        succeed("backup_set", {"plan": plan, "state": "started"})
        for each in (vm, other):
            release(each)
            wait_concluded(each)
    there = Moment(monkeypatch, directory, *{**STARTING, **ENDING}[moment])
    process = start_module("backup_set", {"plan": plan})
    with there.reached(frozen(mounted)):
        result = process.result()
        assert result["rc"] == 1
        assert not process.running
        for each in (vm, other):
            found = result_of(result, each.monitor.stem)
            assert found["state"] == "failed"
            assert "its file system hangs" in found["error"]
        # Nobody is left on the monitors.
        monitors = [str(each.monitor) for each in (vm, other)]
        shown = succeed("vm_info", {"monitors": monitors})["vms"]
        assert [one.get("status") for one in shown] == ["running", "running"], shown
    succeed("backup_set", {"plan": sets.plan(vm, other)["plan"]})
    for name, frozen_copies in copies.items():
        sets.assert_good(name, frozen_copies)


def test_the_repository_does_not_answer_any_more_when_a_copy_that_is_too_late_is_given_up(
    vm: Qemu, directory: Path, sets: Sets, start_module: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sets.plan(vm, speed="2M")["plan"]
    succeed("backup_set", {"plan": plan, "state": "started", "timeout": "0.1s"})
    # It is given up in the first step of this call, and for that the locks are needed.
    there = Moment(monkeypatch, directory, *STARTING["lock"])
    process = start_module("backup_set", {"plan": plan})
    with there.reached(DeadServer(sets.path)):
        assert "its jobs were cancelled" in process.result()["msg"]
        wait_until(lambda: vm.job["status"] == "concluded", "the end of the job")
    monkeypatch.undo()
    sets.back_up(vm)
    sets.assert_tidy("vm")


def test_the_repository_does_not_answer_any_more_while_jobs_copy(
    vm: Qemu, directory: Path, sets: Sets, start_module: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = copy_of(vm, directory)
    # Slow enough to be seen at work, and not so slow that its jobs are left alone.
    process = start_module("backup_set", {"plan": sets.plan(vm, speed="2M")["plan"]})
    wait_for_copies(sets, "vm")
    with DeadServer(sets.path):
        result = process.result()
        assert "its file system hangs" in result["msg"]
        assert "its jobs were cancelled" in result["msg"]
        assert not process.running
        # What QEMU has open is not what hangs here.
        wait_until(lambda: vm.job["status"] == "concluded", "the end of the job")
    monkeypatch.undo()
    sets.back_up(vm)
    sets.assert_good("vm", copies)


@pytest.mark.parametrize("failing", ["fork", "child"])
def test_nobody_can_be_sent_to_ask_while_jobs_copy(
    failing: str,
    vm: Qemu,
    directory: Path,
    sets: Sets,
    start_module: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nobody = directory / "nobody"
    start, ask = probe._start, probe._ask

    def start_or_fail(path: str, writing: bool) -> tuple[int, int]:
        if nobody.exists():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(path, writing)

    def ask_or_die(path: str, writing: bool) -> int:
        if nobody.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(path, writing)

    monkeypatch.setattr(probe, "TIMEOUT", 1.0)
    if failing == "fork":
        monkeypatch.setattr(probe, "_start", start_or_fail)
    else:
        monkeypatch.setattr(probe, "_ask", ask_or_die)
    copies = copy_of(vm, directory)
    process = start_module("backup_set", {"plan": sets.plan(vm, speed="2M")["plan"]})
    wait_for_copies(sets, "vm")
    nobody.touch()
    time.sleep(4)
    assert process.running
    release(vm)
    result = process.result()
    assert [found["state"] for found in result["vms"]] == ["published"]
    assert [
        warning.endswith("; that it hangs could not have been seen for more than 1 s") for warning in result["warnings"]
    ]
    sets.assert_good("vm", copies)


@pytest.mark.parametrize(
    "name", first(2, ["backup_verify", "backup_plan", "backup_info", "backup_prune", "backup_restore"])
)
def test_others_that_look_into_the_repository(
    vm: Qemu, directory: Path, sets: Sets, start_module: Start, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sets.back_up(vm)
    repository = {"repository": str(sets.path)}
    options = {
        "backup_plan": sets.arguments(vm, id="s2"),
        "backup_prune": {**repository, "keep_last": 1},
        "backup_restore": {**repository, "vm": "vm", "directory": str(directory)},
    }
    there = Moment(monkeypatch, directory, repository_repository.Repository, "records")
    process = start_module(name, options.get(name, repository))
    with there.reached(DeadServer(sets.path)):
        result = process.result()
        assert result["rc"] == 1
        assert "its file system hangs" in result["msg"]
        assert succeed("vm_info", {"monitors": [str(vm.monitor)]})["vms"][0]["status"] == "running"
    succeed(name, options.get(name, repository))


@pytest.mark.parametrize(
    ("name", "place", "function"),
    [("backup_plan", planner, "space_in"), ("backup_prune", repository_repository, "_check_lock")],
)
def test_others_that_write_into_the_repository(
    vm: Qemu,
    directory: Path,
    mounted: FileSystem,
    sets: Sets,
    start_module: Start,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: t.Any,
    function: str,
) -> None:
    sets.back_up(vm)
    args = sets.arguments(vm, id="s2") if name == "backup_plan" else {"repository": str(sets.path), "keep_last": 1}
    there = Moment(monkeypatch, directory, place, function)
    process = start_module(name, args)
    with there.reached(frozen(mounted)):
        assert "its file system hangs" in process.result()["msg"]
        assert not process.running
    succeed(name, args)


def test_what_takes_long_in_a_repository_that_answers_is_not_cut_off(
    vm: Qemu, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = repository_repository.Repository.records

    def slow_records(*args: t.Any) -> t.Any:
        time.sleep(10 * worker.MOMENT)
        return records(*args)

    monkeypatch.setattr(repository_repository.Repository, "records", slow_records)
    sets.back_up(vm)
    assert len(succeed("backup_info", {"repository": str(sets.path)})["sets"]) == 1


def test_neither_repository_nor_monitor_answer(
    vm: Qemu, mounted: FileSystem, sets: Sets, start_module: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel_jobs = block_jobs.cancel_jobs

    async def hang_and_cancel(*args: t.Any) -> t.Any:
        vm.hang()
        return await cancel_jobs(*args)

    monkeypatch.setattr(block_jobs, "cancel_jobs", hang_and_cancel)
    monkeypatch.setattr(qmp_client, "COMMAND_TIMEOUT", 2.0)
    process = start_module("backup_set", {"plan": sets.plan(vm, speed=AT_REST)["plan"]})
    wait_for_copies(sets, "vm")
    try:
        with frozen(mounted):
            result = process.result()
    finally:
        vm.wake()
    assert "its file system hangs" in result["msg"]
    assert "its jobs could not be cancelled" in result["msg"]
    monkeypatch.undo()
    # Nothing has become of the copy: it goes on.
    release(vm)
    sets.back_up(vm)


def test_a_monitor_that_hangs_beside_others(vms: Vms, sets: Sets) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="other")
    plan = sets.plan(vm, other)["plan"]
    vm.hang()
    try:
        result = fail("backup_set", {"plan": plan})
        assert [found["state"] for found in result["vms"]] == ["failed", "published"]
        assert f"(process {vm.pid} is stopped)" in result_of(result, "web01")["error"]
        planned = sets.plan(vm, other, id="s2")["plan"]["vms"]
        assert sorted(found["action"] for found in planned) == ["fail", "start"]
    finally:
        vm.wake()
    assert result_of(succeed("backup_set", {"plan": plan}), "web01")["state"] == "published"


def test_a_monitor_that_hangs_while_its_jobs_copy(vms: Vms, sets: Sets, start_module: Start) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="other")
    plan = sets.plan(vm, other, speed="16M")["plan"]
    process = start_module("backup_set", {"plan": plan})
    wait_for_copies(sets, "web01", "other")
    vm.hang()
    try:
        result = process.result()
    finally:
        vm.wake()
    assert result_of(result, "other")["state"] == "published"
    assert result_of(result, "web01")["state"] == "failed"
    assert "the set is unfinished: run the backup again to continue it" in result_of(result, "web01")["error"]
    assert succeed("backup_set", {"plan": plan})["summary"]["published"] == 2
    sets.assert_tidy("web01")


@pytest.mark.parametrize("handed_over", [0, 1])
def test_qemu_ends_while_it_is_handed_the_targets(
    vms: Vms, sets: Sets, start_module: Start, monkeypatch: pytest.MonkeyPatch, handed_over: int
) -> None:
    vm, other = vms.start(vms.disk(0), vms.disk(1), name="web01"), vms.start(vms.disk(2), name="other")
    plan = sets.plan(vm, other)["plan"]
    add_fdset, pid, left = qemu_monitor.Monitor.add_fdset, vm.pid, [handed_over]

    async def kill_and_hand_over(monitor: qemu_monitor.Monitor, *args: t.Any) -> int:
        if monitor.process and monitor.process.pid == pid:
            left[0] -= 1
            if left[0] < 0:
                # A zombie until the test looks: its pid is nobody else's.
                os.kill(pid, signal.SIGKILL)
        return await add_fdset(monitor, *args)

    monkeypatch.setattr(qemu_monitor.Monitor, "add_fdset", kill_and_hand_over)
    result = start_module("backup_set", {"plan": plan}).result()
    monkeypatch.undo()
    assert result_of(result, "other")["state"] == "published"
    assert result_of(result, "web01")["state"] == "failed"
    assert "the VM is off" in result_of(result, "web01")["error"]
    sets.assert_absent("web01")
    vm.kill()
    vm.restart()
    sets.back_up(vm)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_module_that_is_ended_leaves_its_jobs_to_the_next(
    vms: Vms, directory: Path, sets: Sets, start_module: Start, number: signal.Signals
) -> None:
    vm = vms.start(name="web01")
    copies = copy_of(vm, directory)
    process = start_module("backup_set", {"plan": sets.plan(vm, speed=AT_REST)["plan"]})
    wait_for_copies(sets, "web01")
    process.signal(number)
    process.wait()
    assert vm.job["status"] == "running"
    made_by = vm.job["device"].split(".")[2]
    vm.write("drive0", 9, 0, 65536)
    release(vm)
    sets.back_up(vm)
    sets.assert_good("web01", copies)
    assert attempt(sets, "web01") == made_by
