# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: whoever dies in the middle, the next call gives a good image and leaves nothing behind."""

from __future__ import annotations

import fcntl
import itertools
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    partial,
    receipt,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical
from ansible_collections.vmfleet.backup.tests.harness.matrix import WHOLE, assert_listed, deal, dice
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

# The points, by what is done there, and in what calls that is done.
LOCK = {
    "lock: mkdir",
    "lock: create",
}
BEGIN = {
    "sweep receipts > remove: remove",
    "create receipt > remove: remove",
    "create receipt: create",
    "create receipt: pwrite",
    "create receipt: truncate",
    "create receipt: fsync",
    "create receipt: link",
    "create receipt > sync directory: fsync",
    "try holes: truncate",
    "make image: create",
    "reserve > allocate: fallocate",
    "update receipt: create",
    "update receipt: pwrite",
    "update receipt: truncate",
    "update receipt: fsync",
    "update receipt: renameat2",
    "update receipt > sync directory: fsync",
}
START = {
    "start: pass a file",
    "start: add-fd",
    "start: drive-backup",
    "start: remove-fd",
}
FINISH = {
    "flush: fsync",
    "flush: truncate",
    "take name: fsync",
    "finish receipt: rename",
    "finish receipt > remove: remove",
    "finish receipt > sync directory: fsync",
    "dismiss jobs: job-dismiss",
}
NEW_NAME = {
    "take name: link",
    "take name: remove",
}
OLD_NAME = {"take name: rename"}
POINTS: dict[str, set[str]] = {
    "called": LOCK | BEGIN | START | FINISH | NEW_NAME,
    "cancelled": LOCK | BEGIN | START,
    "overwriting": LOCK | BEGIN | START | FINISH | OLD_NAME,
}

QEMU = -2
"""Stands for it among the victims."""

# The points of a call are dealt out to so many tests, that these can run side by side. QEMU is killed at some only.
HANDS = 4
STRIKES = [
    pytest.param((victims, hand), id=f"{name}-{hand}")
    for name, victims in {"module": (crash.MODULE,), "qemu": (QEMU,), "both": (QEMU, crash.MODULE)}.items()
    for hand in range(HANDS if WHOLE or QEMU not in victims else 1)
]


class Strikes:
    """Kills the victims at their share of the points of a call, one by one."""

    def __init__(
        self, victims: tuple[int, ...], hand: int, directory: Path, start: t.Callable[..., ModuleProcess]
    ) -> None:
        self._victims = victims
        self._hand = hand
        self._record = directory / "points"
        self._start = start

    def run(
        self, name: str, vm: Qemu, next_call: t.Callable[[], dict[str, t.Any]], recover: t.Callable[[], None]
    ) -> None:
        """`name` is that of the list of points; `recover` looks what the next call makes of it."""

        def play(at: crash.Point | int, victims: tuple[int, ...]) -> list[crash.Point]:
            self._record.unlink(missing_ok=True)
            pids = [vm.pid if victim == QEMU else victim for victim in victims]
            process = self._start("drive_backup", next_call(), crash_at=at, victims=pids, record=self._record)
            if crash.MODULE in victims:
                process.wait()
                assert process.killed
            else:
                process.result()
            if QEMU in victims:
                vm.kill()
                vm.restart()
            recover()
            return crash.read(self._record)

        chance = dice()
        points = play(0, ())
        assert_listed(points, POINTS[name], f"POINTS[{name!r}] of {__name__.rpartition('.')[2]}.py")
        hands, share = (1, 0.15) if QEMU in self._victims and not WHOLE else (HANDS, 1)
        for point in deal(points, chance, self._hand, hands, share):
            print(point)
            assert point in play(point, self._victims), f"The call did not come to this point: {point}"


@pytest.fixture
def strikes(request: pytest.FixtureRequest, directory: Path, start_module: t.Callable[..., ModuleProcess]) -> Strikes:
    victims, hand = request.param
    return Strikes(victims, hand, directory, start_module)


everywhere = pytest.mark.parametrize("strikes", STRIKES, indirect=True)


@everywhere
def test_killed_and_called_again(
    vms: Vms, directory: Path, target: Path, clean: t.Callable[[], None], strikes: Strikes
) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")

    def recover() -> None:
        backup(vm, target)
        assert_good(target, copy)
        clean()
        target.unlink()
        receipt(target).unlink()
        assert not list(target.parent.iterdir())

    strikes.run("called", vm, lambda: arguments(vm, target), recover)


@everywhere
def test_killed_and_cancelled(vms: Vms, target: Path, clean: t.Callable[[], None], strikes: Strikes) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB))

    def recover() -> None:
        result = backup(vm, target, state="cancelled")
        clean()
        if result["jobs"][0]["state"] == "completed":
            target.unlink()
            receipt(target).unlink()
        assert not list(target.parent.iterdir())

    strikes.run("cancelled", vm, lambda: arguments(vm, target, state="started"), recover)


@everywhere
def test_killed_and_overwriting(
    vms: Vms, directory: Path, target: Path, clean: t.Callable[[], None], strikes: Strikes
) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB), vms.disk(1, size=8 * MIB))
    copies = {disk.id: vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    devices = itertools.cycle(["drive0", "drive1"])
    backup(vm, target, device="drive1")
    asked: list[dict[str, t.Any]] = []

    def next_call() -> dict[str, t.Any]:
        asked.append(arguments(vm, target, overwrite=True, device=next(devices)))
        return asked[-1]

    def recover() -> None:
        # The old image stands until the new one is good: there is no moment without one of them.
        assert any(identical(copy, target) for copy in copies.values())
        succeed("drive_backup", asked[-1])
        assert_good(target, copies[asked[-1]["device"]])
        clean()

    strikes.run("overwriting", vm, next_call, recover)


def test_killed_at_random_moments(
    vms: Vms,
    directory: Path,
    target: Path,
    clean: t.Callable[[], None],
    start_module: t.Callable[..., ModuleProcess],
) -> None:
    chance = dice()
    vm = vms.start(vms.disk(0, size=16 * MIB), vms.disk(1, size=16 * MIB))
    copies = [vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks]
    targets = [target.with_name(f"{disk.id}.qcow2") for disk in vm.disks]
    drives = [{"device": disk.id, "target": str(path)} for disk, path in zip(vm.disks, targets, strict=True)]
    for _round in range(4):
        # Several in a row, one after the other's wreck.
        for _attempt in range(chance.randint(1, 3)):
            process = start_module("drive_backup", arguments(vm, drives=drives, speed=16 * MIB))
            time.sleep(chance.uniform(0.2, 1.5))
            process.kill()
        backup(vm, drives=drives)
        for path, copy in zip(targets, copies, strict=True):
            assert_good(path, copy)
            path.unlink()
            receipt(path).unlink()
        clean()


@pytest.mark.parametrize("number", [1, 2, 15], ids=["SIGHUP", "SIGINT", "SIGTERM"])
def test_interrupted_by_signal_goes_on_with_the_next_call(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], number: int
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    process = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: vm.block_jobs and vm.job["offset"] > MIB, "some progress")
    process.signal(number)
    process.wait()
    job = vm.job["device"]
    release(vm)
    assert backup(vm, target)["jobs"][0]["id"] == job
    assert_good(target, copy)


def test_killed_while_following_goes_on_with_the_next_call(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    started = start_slowly(vm, target)
    for _attempt in range(3):
        process = start_module("drive_backup", arguments(vm, target, speed=SLOW))
        wanted = vm.job["offset"] + MIB
        while vm.job["offset"] < wanted:
            time.sleep(0.01)
        process.kill()
    release(vm)
    result = backup(vm, target)
    assert result["jobs"][0]["id"] == started["jobs"][0]["id"]
    assert_good(target, copy)


def test_killed_when_the_job_is_done_goes_on_with_the_next_call(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    process = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: vm.block_jobs, "the job")
    process.kill()
    release(vm)
    wait_concluded(vm)
    result = backup(vm, target)
    assert not sent(result, "drive-backup")
    assert_good(target, copy)


def test_fdset_of_a_dead_module_is_taken_back(vm: Qemu, directory: Path, target: Path) -> None:
    # What a module leaves that dies between add-fd and remove-fd, on a QEMU that keeps it (10.0 and newer).
    started = start_slowly(vm, target)
    vm.qmp.execute("block-job-cancel", device=vm.job["device"], force=True)
    wait_concluded(vm)
    digest = started["jobs"][0]["id"].rsplit(".", 1)[1]
    strange = create(directory / "strange.qcow2")
    for path, opaque in ((partial(target), f"vmfleet:db:{digest}:0"), (strange, "serial0-source")):
        vm.qmp.pass_file(path, opaque)
    fail_backup(vm, target)
    assert [fd["opaque"] for fdset in vm.fdsets for fd in fdset["fds"]] == ["serial0-source"]
    assert backup(vm, target)["changed"] is True


def test_qemu_killed_while_it_is_followed(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    start_slowly(vm, target)
    process = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: not process.running or vm.job["offset"] > 2 * MIB, "some progress")
    vm.kill()
    result = process.result()
    assert result["failed"] is True
    assert "VM is off" in result["msg"] or "has ended" in result["msg"]
    assert str(vm.monitor) in result["msg"]
    assert [job["state"] for job in result["jobs"]] == ["failed"]
    assert not target.exists()
    vm.restart()
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    again = backup(vm, target)
    assert again["changed"] is True
    assert any(str(target) in warning for warning in again["warnings"])
    assert_good(target, copy)


@pytest.mark.parametrize("end", ["kill", "quit"])
def test_qemu_restarted_while_nobody_watched(vm: Qemu, directory: Path, target: Path, end: str) -> None:
    start_slowly(vm, target)
    getattr(vm, end)()
    result = fail_backup(vm, target)
    assert "VM is off" in result["msg"]
    assert not target.exists()
    vm.restart()
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert_good(target, copy)


def test_cancelled_after_qemu_was_restarted(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    vm.kill()
    vm.restart()
    assert backup(vm, target, state="cancelled")["changed"] is True
    assert_absent(target)


def test_case_11_vm_is_off(vm: Qemu, target: Path) -> None:
    vm.quit()
    result = fail_backup(vm, target)
    assert str(vm.monitor) in result["msg"]
    assert "VM is off" in result["msg"]
    assert_absent(target)


def test_case_11_there_is_no_socket(vm: Qemu, target: Path) -> None:
    result = fail_backup(vm, target, monitor="/nonexistent/vm.qmp")
    assert "/nonexistent/vm.qmp" in result["msg"]
    assert_absent(target)


def test_two_calls_at_once_for_one_disk(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    calls = [start_module("drive_backup", arguments(vm, target)) for _number in range(3)]
    results = [call.result() for call in calls]
    assert vm.alive
    assert all(result["rc"] == 0 for result in results), results
    assert sum(len(sent(result, "drive-backup")) for result in results) == 1
    assert_good(target, copy)


def test_a_call_waits_for_whoever_works_on_the_vm(
    vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    backup(vm, target, state="started", speed=SLOW)
    backup(vm, target, state="cancelled")
    started = Path(f"/proc/{vm.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    path = Path(f"/run/vmfleet-locks/{vm.pid}-{started}.lock")
    with path.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_module("drive_backup", arguments(vm, target))
        wait_until(lambda: path in process.open_files, "the module at the lock")
        # Time enough for one that does not care about locks.
        time.sleep(0.5)
        assert process.running
        assert not vm.block_jobs
        assert not list(target.parent.iterdir())
    assert process.result()["changed"] is True


def test_two_calls_at_once_for_two_targets(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    targets = [target, target.with_name("second.qcow2")]
    calls = [
        start_module("drive_backup", arguments(vm, path, device=name))
        for path, name in zip(targets, ["drive0", "n0"], strict=True)
    ]
    results = [call.result() for call in calls]
    assert vm.alive
    # One of them may have found the other's job; then it says which, and has made nothing.
    for path, result in zip(targets, results, strict=True):
        if result["rc"]:
            assert "vmfleet.db." in result["msg"]
            assert_absent(path)
            backup(vm, path)
        assert_good(path, copy)
    assert any(result["rc"] == 0 for result in results)


def test_second_call_while_the_first_waits(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    calls = [start_module("drive_backup", arguments(vm, target, speed=2 * SLOW)) for _number in range(2)]
    wait_until(lambda: not all(call.running for call in calls) or vm.job["offset"] > 4 * MIB, "some progress")
    assert all(call.running for call in calls)
    release(vm)
    assert [call.result()["jobs"][0]["state"] for call in calls] == ["completed", "completed"]
    assert_good(target, copy)
