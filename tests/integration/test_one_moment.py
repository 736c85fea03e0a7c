# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Somebody takes an external snapshot after the disks were looked at, and before their copies start.

The node that is copied is then a layer below the one that the guest writes to. What it has written since is missing.
"""

from __future__ import annotations

import contextlib
import signal
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import launch as launching
from ansible_collections.vmfleet.backup.plugins.module_utils._backup import start as start_step
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import start as drive_start
from ansible_collections.vmfleet.backup.tests.harness.backup import arguments, assert_absent, release
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, assert_pattern
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.moments import Moment
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, result_of

if t.TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

    Start = Callable[..., ModuleProcess]

pytestmark = pytest.mark.usefixtures("clean")

WRITTEN, AT, LENGTH = 0xEE, MIB, 65536
DISKS = ("drive0", "drive1")


@pytest.fixture
def snapshot(directory: Path) -> Callable[[Qemu], None]:
    """Takes a snapshot of the first disk, below its filters; then the guest writes to both."""

    def take(vm: Qemu) -> None:
        overlay = {"snapshot-node-name": "overlay", "snapshot-file": str(directory / "overlay.qcow2")}
        vm.qmp.execute("blockdev-snapshot-sync", **{"node-name": "n0", **overlay})
        for disk in DISKS:
            vm.write(disk, WRITTEN, AT, LENGTH)

    return take


@contextlib.contextmanager
def after(deed: Callable[..., object], *args: object) -> Iterator[None]:
    deed(*args)
    yield


def started(vms: Vms, **options: t.Any) -> Qemu:
    return vms.start(*(vms.disk(number, size=SIZE, **options) for number in range(2)), name="web01")


@pytest.mark.parametrize(
    "options", [{}, {"format": "raw"}, {"throttle": 1 << 30}], ids=["qcow2", "raw", "behind a throttle"]
)
def test_the_copies_are_begun_again(
    vms: Vms,
    sets: Sets,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_module: Start,
    snapshot: Callable[[Qemu], None],
    options: dict[str, t.Any],
) -> None:
    vm = started(vms, **options)
    moment = Moment(monkeypatch, directory, start_step, "launch")
    module = start_module("backup_set", {"plan": sets.plan(vm)["plan"]})
    with moment.reached(after(snapshot, vm)):
        found = result_of(module.result(), "web01")
    assert found["state"] == "published", found
    assert "disk drive0 got another image on top" in str(found["warnings"])
    for name in DISKS:
        assert_pattern(sets.images("web01")[name], "qcow2", WRITTEN, AT, LENGTH)
    sets.assert_tidy("web01")


def test_it_fails_where_that_happens_again(
    vms: Vms, sets: Sets, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = started(vms)
    launch = start_step.launch

    async def launch_after_a_snapshot(locked: t.Any, monitor: t.Any, draft: t.Any, intent: t.Any, speed: int) -> t.Any:
        path = str(directory / f"{intent.attempt}.qcow2")
        await monitor.execute("blockdev-snapshot-sync", {"device": "drive0", "snapshot-file": path})
        return await launch(locked, monitor, draft, intent, speed)

    monkeypatch.setattr(start_step, "launch", launch_after_a_snapshot)
    said = result_of(sets.fail(vm), "web01")["error"]
    assert said.startswith("disk drive0 got another image on top, or was detached, at the moment")
    sets.assert_absent("web01")
    assert not vm.block_jobs
    monkeypatch.undo()
    sets.back_up(vm)


@pytest.mark.parametrize("taken", [False, True], ids=["no snapshot", "snapshot"])
def test_the_module_is_killed_before_it_has_looked(
    vms: Vms,
    sets: Sets,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_module: Start,
    snapshot: Callable[[Qemu], None],
    taken: bool,
) -> None:
    vm = started(vms)
    plan = sets.plan(vm, speed=SLOW)["plan"]
    with monkeypatch.context() as patch:
        (directory / "start").mkdir()
        look = Moment(patch, directory / "start", start_step, "launch")
        (directory / "check").mkdir()
        check = Moment(patch, directory / "check", launching, "_check_moment")
        module = start_module("backup_set", {"plan": plan, "state": "started"})
        with look.reached(after(snapshot, vm) if taken else contextlib.nullcontext()):
            pass
        with check.reached(after(module.signal, signal.SIGKILL)):
            module.wait()
    jobs = {job["device"] for job in vm.block_jobs}
    assert len(jobs) == len(DISKS)
    succeed("backup_set", {"plan": plan, "state": "started"})
    # What is of one moment goes on, and what is not is begun again.
    assert ({job["device"] for job in vm.block_jobs} == jobs) is not taken
    release(vm)
    succeed("backup_set", {"plan": plan})
    if taken:
        for name in DISKS:
            assert_pattern(sets.images("web01")[name], "qcow2", WRITTEN, AT, LENGTH)
    sets.assert_tidy("web01")


def test_a_snapshot_after_the_start_changes_nothing(
    vms: Vms, sets: Sets, directory: Path, snapshot: Callable[[Qemu], None]
) -> None:
    vm = started(vms)
    copies = {disk.name: vm.freeze(disk, directory / f"frozen-{disk.name}.qcow2") for disk in vm.disks}
    plan = sets.start(vm)
    snapshot(vm)
    release(vm)
    succeed("backup_set", {"plan": plan})
    sets.assert_good("web01", copies)


@pytest.mark.parametrize("drives", [1, 2])
def test_drive_backup_is_no_backup_then(
    vms: Vms,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_module: Start,
    snapshot: Callable[[Qemu], None],
    drives: int,
) -> None:
    vm = started(vms)
    targets = {name: directory / f"{name}.backup.qcow2" for name in DISKS[:drives]}
    wanted = [{"device": name, "target": str(target)} for name, target in targets.items()]
    moment = Moment(monkeypatch, directory, drive_start, "_launch")
    module = start_module("drive_backup", arguments(vm, drives=wanted))
    with moment.reached(after(snapshot, vm)):
        result = module.result()
    assert result["failed"] is True
    assert "disk drive0 to" in result["msg"]
    assert "got another image on top, or was detached, at the moment when the backup was started" in result["msg"]
    for target in targets.values():
        assert_absent(target)
    succeed("drive_backup", arguments(vm, drives=wanted))
    for target in targets.values():
        assert_pattern(target, "qcow2", WRITTEN, AT, LENGTH)


def test_drive_backup_with_a_bitmap_that_is_cleared_in_any_case(
    vms: Vms,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_module: Start,
    snapshot: Callable[[Qemu], None],
) -> None:
    """What it has copied, no other would have."""
    vm = started(vms)
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
    vm.write("drive0", 0xDD, 2 * MIB, LENGTH)
    target = directory / "increment.qcow2"
    how = {"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "always"}
    moment = Moment(monkeypatch, directory, drive_start, "_launch")
    module = start_module("drive_backup", arguments(vm, target, **how))
    with moment.reached(after(snapshot, vm)):
        result = module.result()
    assert "failed" not in result, result
    assert "got another image on top" in str(result["warnings"])
    assert_pattern(target, "qcow2", 0xDD, 2 * MIB, LENGTH)
