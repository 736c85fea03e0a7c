# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: whose image, whose job, whose name: nothing is taken for what it is not, and no increment is lost."""

from __future__ import annotations

import itertools
import typing as t

import pytest

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
    snapshot,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, qemu_img, sound
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

NEVER = {"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "never"}
INCREMENTAL = {"sync": "incremental", "bitmap": "b0"}

NIGHTLY = "nightly"
STRANGE = "somebody else's"


@pytest.fixture
def full(vm: Qemu, target: Path) -> Path:
    """A full backup, with a bitmap that records the writes since."""
    full = target.with_name("full.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    backup(vm, full)
    vm.write("drive0", 0x51, 6 * MIB, 3 * MIB)
    vm.write("drive0", 0x52, 16 * MIB, 16 * MIB)
    return full


@pytest.fixture
def two(vms: Vms) -> Qemu:
    """A VM with two disks."""
    return vms.start(vms.disk(0), vms.disk(1))


def _drives(vm: Qemu, directory: Path, **options: t.Any) -> list[dict[str, t.Any]]:
    return [{"device": disk.id, "target": str(directory / f"{disk.id}.qcow2"), **options} for disk in vm.disks]


def _dirty(vm: Qemu) -> int:
    return int(vm.bitmaps("n0")["b0"]["count"])


def _rebase(image: Path, base: Path) -> Path:
    qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", image)
    return image


def _kill_when(
    start_module: t.Callable[..., ModuleProcess],
    args: dict[str, t.Any],
    reached: t.Callable[[], object],
    tidy: t.Callable[[], None] = lambda: None,
    first: int = 1,
) -> None:
    """Kill a call right before its first step at which `reached` is true; `tidy` follows each kill before that.

    `first` only saves time: no call has got so far by then.
    """
    for step in itertools.count(first):
        process = start_module("drive_backup", args, crash_at=step)
        process.wait()
        assert process.killed, "this call was never there"
        if reached():
            print("killed at step", step)
            return
        tidy()


def _kill_when_copied(start_module: t.Callable[..., ModuleProcess], args: dict[str, t.Any], record: Path) -> None:
    """Kill a call when its image is whole and on stable storage, and has not got its name yet."""
    _kill_when(start_module, args, lambda: '"phase": "copied"' in record.read_text(), first=6)


def _record(target: Path) -> Path:
    return partial(receipt(target))


def _cancel_from_outside(vm: Qemu, job_id: str) -> None:
    vm.qmp.execute("block-job-cancel", device=job_id, force=True)
    wait_until(lambda: all(job["status"] == "concluded" for job in vm.block_jobs if job["device"] == job_id), "its end")


# Increments that nothing else knows


def _kill_after_the_start(vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]) -> None:
    def tidy() -> None:
        for path in target.parent.glob(f"{target.name}*"):
            path.unlink()

    _kill_when(start_module, arguments(vm, target, speed=SLOW, **INCREMENTAL), lambda: vm.block_jobs, tidy, first=28)


def test_increment_whose_starter_was_killed_is_not_forgotten(
    vm: Qemu, target: Path, full: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    assert full.exists()
    _kill_after_the_start(vm, target, start_module)
    release(vm)
    wait_concluded(vm)
    assert _dirty(vm) == 0
    vm.quit()
    vm.restart()
    vm.write("drive0", 0x54, 40 * MIB, MIB)
    for state in ("completed", "started", "completed", "cancelled"):
        result = fail_backup(vm, target, state=state, **INCREMENTAL)
        assert result["msg"].startswith("bitmap: ")
        assert "b0" in result["msg"]
        assert "full backup" in result["msg"]
        assert not sent(result, "drive-backup")
        assert not target.exists()
        assert _dirty(vm) == MIB
    result = backup(vm, target, overwrite=True, **INCREMENTAL)
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert sound(target)


def test_increment_whose_starter_was_killed_is_finished(
    vm: Qemu, directory: Path, target: Path, full: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    _kill_after_the_start(vm, target, start_module)
    release(vm)
    wait_concluded(vm)
    result = backup(vm, target, **INCREMENTAL)
    assert not sent(result, "drive-backup")
    assert identical(copy, _rebase(target, full))


def test_increment_that_has_ended_is_finished_by_cancelled(vm: Qemu, directory: Path, target: Path, full: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target, **INCREMENTAL)
    release(vm)
    wait_concluded(vm)
    assert _dirty(vm) == 0
    result = backup(vm, target, state="cancelled", **INCREMENTAL)
    assert result["changed"] is True
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert receipt(target).exists()
    assert not vm.block_jobs
    assert backup(vm, target, **INCREMENTAL)["changed"] is False
    assert identical(copy, _rebase(target, full))


def test_increment_that_was_flushed_is_finished_by_cancelled(
    vm: Qemu, directory: Path, target: Path, full: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, target, state="started", **INCREMENTAL)
    wait_concluded(vm)
    _kill_when_copied(start_module, arguments(vm, target, **INCREMENTAL), _record(target))
    result = backup(vm, target, state="cancelled", **INCREMENTAL)
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert receipt(target).exists()
    assert identical(copy, _rebase(target, full))


@pytest.mark.parametrize("completion_mode", ["grouped", "individual"])
def test_good_increment_is_kept_when_another_drive_fails(
    two: Qemu, directory: Path, target: Path, completion_mode: str
) -> None:
    two.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    full = target.with_name("full.qcow2")
    backup(two, full)
    two.write("drive0", 0x51, 6 * MIB, 3 * MIB)
    copy = two.freeze(two.disks[0], directory / "frozen.qcow2")
    drives = _drives(two, target.parent)
    drives[0].update(INCREMENTAL)
    drives[1].update(speed=SLOW)
    started = backup(two, drives=drives, completion_mode="individual", state="started")
    good, bad = (job["id"] for job in started["jobs"])
    wait_until(lambda: {j["device"]: j["status"] for j in two.block_jobs}[good] == "concluded", "the increment")
    assert _dirty(two) == 0
    _cancel_from_outside(two, bad)
    result = fail_backup(two, drives=drives, completion_mode=completion_mode)
    assert "cancel" in result["msg"].lower()
    assert {job["device"]: job["state"] for job in result["jobs"]} == {"drive0": "completed", "drive1": "cancelled"}
    assert not two.block_jobs
    increment = target.with_name("drive0.qcow2")
    assert receipt(increment).exists()
    assert_absent(target.with_name("drive1.qcow2"))
    assert backup(two, increment, **INCREMENTAL)["changed"] is False
    assert identical(copy, _rebase(increment, full))


def test_increment_removed_by_hand_before_it_had_its_name(vm: Qemu, target: Path, full: Path) -> None:
    assert full.exists()
    backup(vm, target, state="started", **INCREMENTAL)
    wait_concluded(vm)
    partial(target).unlink()
    for _attempt in range(2):
        result = fail_backup(vm, target, **INCREMENTAL)
        assert "bitmap b0" in result["msg"]
        assert not target.exists()
    assert backup(vm, target, overwrite=True, **INCREMENTAL)["changed"] is True


# Whose image

OTHERS: list[dict[str, t.Any]] = [
    {"device": "drive1"},
    {"sync": "incremental", "bitmap_mode": ""},
    {"sync": "top", "bitmap": "", "bitmap_mode": ""},
    {"bitmap": "b1"},
    {"bitmap_mode": "on-success"},
    {"format": "raw"},
]


def _ask_for_others(vm: Qemu, target: Path) -> None:
    for other in OTHERS:
        options = {name: value for name, value in {**NEVER, **other}.items() if value}
        for way in ({}, {"overwrite": True}, {"state": "cancelled"}):
            result = fail_backup(vm, target, **options, **way)
            assert f"{target} is being made" in result["msg"], options
            assert not sent(result, "drive-backup")
            assert not target.exists()


@pytest.fixture
def chain(two: Qemu, target: Path) -> Path:
    """A full backup of the first of two disks, which have two bitmaps each."""
    for node, bitmap in itertools.product(("n0", "n1"), ("b0", "b1")):
        two.qmp.execute("block-dirty-bitmap-add", node=node, name=bitmap, persistent=True)
    chain = target.with_name("full.qcow2")
    backup(two, chain)
    for disk in two.disks:
        two.write(str(disk.id), 0x51, 6 * MIB, 16 * MIB)
    return chain


@pytest.mark.slow
def test_running_image_is_only_what_it_was_begun_as(two: Qemu, directory: Path, target: Path, chain: Path) -> None:
    copy = two.freeze(two.disks[0], directory / "frozen.qcow2")
    # So slow that it outlasts all that is asked for meanwhile.
    backup(two, target, state="started", speed=4096, **NEVER)
    job = two.job["device"]
    _ask_for_others(two, target)
    assert (two.job["device"], two.job["status"], two.job["speed"]) == (job, "running", 4096)
    release(two)
    result = backup(two, target, **NEVER)
    assert result["jobs"][0]["id"] == job
    assert not sent(result, "drive-backup")
    assert identical(copy, _rebase(target, chain))


@pytest.mark.slow
def test_finished_image_without_its_name_is_only_what_it_was_begun_as(
    two: Qemu, directory: Path, target: Path, chain: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = two.freeze(two.disks[0], directory / "frozen.qcow2")
    backup(two, target, state="started", **NEVER)
    wait_concluded(two)
    _kill_when_copied(start_module, arguments(two, target, **NEVER), _record(target))
    before = snapshot(target.parent)
    _ask_for_others(two, target)
    assert snapshot(target.parent) == before
    result = backup(two, target, **NEVER)
    assert not sent(result, "drive-backup")
    assert identical(copy, _rebase(target, chain))


@pytest.mark.parametrize("moment", ["running", "copied"])
def test_receipt_shared_by_two_targets(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], moment: str
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    options = {"receipt": str(directory / "r.json")}
    start_slowly(vm, target, **options)
    job = vm.job["device"]
    if moment == "copied":
        release(vm)
        wait_concluded(vm)
        _kill_when_copied(start_module, arguments(vm, target, **options), directory / "r.json.partial")
    other = target.with_name("other.qcow2")
    for state, overwrite in itertools.product(("completed", "started", "cancelled"), (False, True)):
        result = fail_backup(vm, other, state=state, overwrite=overwrite, **options)
        assert f"{target} is being made" in result["msg"]
        assert_absent(other)
    if moment == "running":
        assert (vm.job["device"], vm.job["status"]) == (job, "running")
        release(vm)
    result = backup(vm, target, **options)
    assert not sent(result, "drive-backup")
    assert_good(target, copy)
    assert_absent(other)


def test_receipt_of_one_block_device_does_not_speak_for_another(vm: Qemu, storage: Storage, directory: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    one, other = (storage.loop(64 * MIB, name) for name in ("one.img", "other.img"))
    options = {"mode": "existing", "format": "raw", "receipt": str(directory / "r.json")}
    backup(vm, one, **options)
    assert backup(vm, one, **options)["changed"] is False
    result = fail_backup(vm, other, **options)
    assert str(one) in result["msg"]
    assert not identical(copy, other, other_format="raw")
    result = backup(vm, other, overwrite=True, **options)
    assert sent(result, "drive-backup")
    assert identical(copy, other, other_format="raw")


@pytest.fixture
def nameless(vms: Vms) -> tuple[Qemu, Qemu]:
    """Two VMs without uuid and name, whose sockets have one name in two directories."""
    one, other = vms.start(vms.disk(0)), vms.start(vms.disk(1, id="drive0", node="n0"))
    assert one.monitor.name == other.monitor.name
    assert one.monitor.parent != other.monitor.parent
    return one, other


def test_image_of_a_nameless_vm_is_not_another_ones(nameless: tuple[Qemu, Qemu], directory: Path, target: Path) -> None:
    one, other = nameless
    copies = [vm.freeze(vm.disks[0], directory / f"{number}.qcow2") for number, vm in enumerate(nameless)]
    backup(one, target)
    before = snapshot(target.parent)
    result = fail_backup(other, target)
    assert "another VM" in result["msg"]
    assert backup(other, target, state="cancelled")["changed"] is False
    assert snapshot(target.parent) == before
    assert backup(one, target)["changed"] is False
    assert_good(target, copies[0])
    backup(other, target, overwrite=True)
    assert_good(target, copies[1])


def test_job_of_a_nameless_vm_is_not_another_ones(nameless: tuple[Qemu, Qemu], directory: Path, target: Path) -> None:
    one, other = nameless
    copy = one.freeze(one.disks[0], directory / "frozen.qcow2")
    start_slowly(one, target)
    for state, overwrite in itertools.product(("completed", "started", "cancelled"), (False, True)):
        result = fail_backup(other, target, state=state, overwrite=overwrite)
        assert "another VM" in result["msg"]
        assert not other.block_jobs
    release(one)
    assert not sent(backup(one, target), "drive-backup")
    assert_good(target, copy)


# Whose job


@pytest.fixture
def days(vm: Qemu, target: Path) -> tuple[Path, Path]:
    """Two targets whose jobs are called the same; that of the first was cancelled and dismissed by somebody else."""
    monday, tuesday = target.with_name("mon.qcow2"), target.with_name("tue.qcow2")
    start_slowly(vm, monday, job_id=NIGHTLY)
    _cancel_from_outside(vm, NIGHTLY)
    vm.qmp.execute("job-dismiss", id=NIGHTLY)
    start_slowly(vm, tuesday, job_id=NIGHTLY)
    return monday, tuesday


def test_running_job_of_the_same_id_is_another_targets(vm: Qemu, directory: Path, days: tuple[Path, Path]) -> None:
    monday, tuesday = days
    # Nothing has been written since the job began.
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    for state in ("completed", "started", "completed"):
        result = fail_backup(vm, monday, state=state, job_id=NIGHTLY)
        assert "busy" in result["msg"]
        assert NIGHTLY in result["msg"]
        assert (vm.job["status"], vm.job["speed"]) == ("running", SLOW)
        assert_absent(monday)
    backup(vm, monday, state="cancelled", job_id=NIGHTLY)
    assert vm.job["status"] == "running"
    release(vm)
    result = backup(vm, tuesday, job_id=NIGHTLY)
    assert not sent(result, "drive-backup")
    assert_good(tuesday, copy)
    backup(vm, monday, job_id=NIGHTLY)
    assert_good(monday, copy)


def test_cancelled_does_not_cancel_another_targets_job(vm: Qemu, directory: Path, days: tuple[Path, Path]) -> None:
    monday, tuesday = days
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, monday, state="cancelled", job_id=NIGHTLY)
    assert_absent(monday)
    assert vm.job["status"] == "running"
    release(vm)
    assert not sent(backup(vm, tuesday, job_id=NIGHTLY), "drive-backup")
    assert_good(tuesday, copy)


def test_ended_job_of_the_same_id_is_another_targets(vm: Qemu, directory: Path, days: tuple[Path, Path]) -> None:
    monday, tuesday = days
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    release(vm)
    wait_concluded(vm)
    result = fail_backup(vm, monday, job_id=NIGHTLY)
    assert NIGHTLY in result["msg"]
    assert_absent(monday)
    assert vm.job["device"] == NIGHTLY
    assert not sent(backup(vm, tuesday, job_id=NIGHTLY), "drive-backup")
    assert_good(tuesday, copy)


def test_finished_backup_does_not_dismiss_another_targets_job(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    tuesday = target.with_name("tue.qcow2")
    backup(vm, target, job_id=NIGHTLY)
    backup(vm, tuesday, state="started", job_id=NIGHTLY)
    wait_concluded(vm)
    for state in ("completed", "started", "cancelled"):
        assert backup(vm, target, state=state, job_id=NIGHTLY)["changed"] is False
        assert (vm.job["device"], vm.job["status"]) == (NIGHTLY, "concluded")
    result = backup(vm, tuesday, job_id=NIGHTLY)
    assert not sent(result, "drive-backup")
    assert_good(tuesday, copy)


def test_ended_foreign_job_is_not_a_bare_block_devices(
    vm: Qemu, storage: Storage, directory: Path, target: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "job_id": NIGHTLY}
    vm.qmp.execute(
        "drive-backup",
        device="n0",
        target=str(create(target)),
        mode="existing",
        format="qcow2",
        sync="full",
        job_id=NIGHTLY,
        auto_dismiss=False,
    )
    wait_concluded(vm)
    for state in ("completed", "started"):
        result = fail_backup(vm, device, state=state, **options)
        assert result["msg"].startswith("job_id: ")
        assert [job["state"] for job in result["jobs"]] == []
    assert [job["state"] for job in backup(vm, device, state="cancelled", **options)["jobs"]] == ["absent"]
    assert not identical(copy, device, other_format="raw")
    vm.qmp.execute("job-dismiss", id=NIGHTLY)
    result = backup(vm, device, **options)
    assert sent(result, "drive-backup")
    assert identical(copy, device, other_format="raw")


def test_running_job_of_another_target_is_not_a_bare_block_devices(
    vm: Qemu, storage: Storage, directory: Path, target: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "job_id": NIGHTLY}
    start_slowly(vm, target, job_id=NIGHTLY)
    assert "busy" in fail_backup(vm, device, **options)["msg"]
    backup(vm, device, state="cancelled", **options)
    assert vm.job["status"] == "running"
    release(vm)
    assert not sent(backup(vm, target, job_id=NIGHTLY), "drive-backup")
    assert_good(target, copy)


def test_bare_block_devices_own_job_is_followed(vm: Qemu, storage: Storage, directory: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    device = storage.loop(64 * MIB)
    options = {"mode": "existing", "format": "raw", "job_id": NIGHTLY}
    start_slowly(vm, device, **options)
    release(vm)
    result = backup(vm, device, **options)
    assert not sent(result, "drive-backup")
    assert [job["state"] for job in result["jobs"]] == ["completed"]
    assert identical(copy, device, other_format="raw")


def test_speed_zero_leaves_a_running_jobs_limit_alone(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    result = backup(vm, target, state="started")
    assert result["changed"] is False
    assert vm.job["speed"] == SLOW
    result = backup(vm, target, state="started", speed=2 * SLOW)
    assert result["changed"] is True
    assert vm.job["speed"] == 2 * SLOW
    assert result["jobs"][0]["id"] == vm.job["device"]
    release(vm)
    backup(vm, target)


# Whose name


def test_file_that_appears_in_mid_job_is_not_replaced(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    target.write_text(STRANGE)
    release(vm)
    for overwrite in (False, True):
        result = fail_backup(vm, target, overwrite=overwrite)
        assert str(target) in result["msg"]
        assert "appeared" in result["msg"]
        assert [job["state"] for job in result["jobs"]] == ["failed"]
        assert target.read_text() == STRANGE
    target.rename(target.with_name("moved"))
    result = backup(vm, target)
    assert not sent(result, "drive-backup")
    assert_good(target, copy)


def test_file_that_takes_an_earlier_ones_place_in_mid_job_is_not_replaced(
    vm: Qemu, directory: Path, target: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target.write_text("an earlier one, that may go")
    start_slowly(vm, target, overwrite=True)
    newer = target.with_name("newer")
    newer.write_text(STRANGE)
    newer.replace(target)
    release(vm)
    for _attempt in range(2):
        result = fail_backup(vm, target, overwrite=True)
        assert "appeared" in result["msg"]
        assert target.read_text() == STRANGE
    target.rename(newer)
    result = backup(vm, target, overwrite=True)
    assert not sent(result, "drive-backup")
    assert_good(target, copy)


def test_file_that_is_made_where_an_earlier_one_was_removed_is_not_replaced(
    vm: Qemu, storage: Storage, directory: Path
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target = storage.mount("ext4", 128 * MIB).path / "disk.qcow2"
    target.write_text("an earlier one, that may go")
    earlier = target.stat().st_ino
    start_slowly(vm, target, overwrite=True)
    target.unlink()
    target.write_text(STRANGE)
    # ext4 gives a new file the inode that was freed last: by its number it is the earlier one.
    assert target.stat().st_ino == earlier
    release(vm)
    assert "appeared" in fail_backup(vm, target, overwrite=True)["msg"]
    assert target.read_text() == STRANGE
    target.rename(target.with_name("moved"))
    assert not sent(backup(vm, target, overwrite=True), "drive-backup")
    assert_good(target, copy)


def test_earlier_file_removed_in_mid_job(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target.write_text("an earlier one, that may go")
    start_slowly(vm, target, overwrite=True)
    target.unlink()
    release(vm)
    assert not sent(backup(vm, target, overwrite=True), "drive-backup")
    assert_good(target, copy)


def test_growing_image_exchanged_in_mid_job_is_not_published(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    partial(target).rename(target.with_name("grown"))
    create(partial(target))
    release(vm)
    wait_concluded(vm)
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert any(str(partial(target)) in warning for warning in result["warnings"])
    assert_good(target, copy)


def test_growing_image_exchanged_after_the_end_is_not_published(vm: Qemu, storage: Storage, directory: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    target = storage.mount("ext4", 128 * MIB).path / "disk.qcow2"
    backup(vm, target, state="started")
    wait_concluded(vm)
    ended = partial(target).stat().st_ino
    partial(target).unlink()
    create(partial(target))
    assert partial(target).stat().st_ino == ended
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert_good(target, copy)


def test_growing_image_exchanged_while_followed_is_a_failure(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    following = start_module("drive_backup", arguments(vm, target))
    wait_until(lambda: not following.running or vm.job["offset"] > 2 * MIB, "some progress")
    partial(target).rename(target.with_name("grown"))
    create(partial(target))
    release(vm)
    result = following.result()
    assert result["failed"] is True
    assert str(partial(target)) in result["msg"]
    assert_absent(target)
    backup(vm, target)
    assert_good(target, copy)


@pytest.mark.parametrize("moment", ["unwatched", "followed"])
def test_growing_image_removed_by_hand(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], moment: str
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    if moment == "followed":
        following = start_module("drive_backup", arguments(vm, target))
        wait_until(lambda: not following.running or vm.job["offset"] > 2 * MIB, "some progress")
        partial(target).unlink()
        release(vm)
        assert str(partial(target)) in following.result()["msg"]
        assert_absent(target)
        return
    release(vm)
    wait_concluded(vm)
    partial(target).unlink()
    result = backup(vm, target)
    assert sent(result, "drive-backup")
    assert any(str(target) in warning for warning in result["warnings"])
    assert_good(target, copy)


@pytest.mark.parametrize("killed", ["following", "waiting for nobody"])
def test_existing_target_after_module_and_qemu_were_killed(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess], killed: str
) -> None:
    create(target)
    if killed == "following":
        process = start_module("drive_backup", arguments(vm, target, mode="existing", speed=SLOW))
        wait_until(lambda: not process.running or (vm.block_jobs and vm.job["offset"] > 2 * MIB), "some progress")
        process.kill()
    else:
        start_slowly(vm, target, mode="existing")
        wait_until(lambda: vm.job["offset"] > 2 * MIB, "some progress")
    vm.kill()
    vm.restart()
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target, mode="existing")
    assert sent(result, "drive-backup")
    assert result["warnings"]
    assert_good(target, copy)
    assert backup(vm, target, mode="existing")["changed"] is False


# Whose moment


def test_image_that_has_ended_does_not_go_together_with_one_to_come(two: Qemu, directory: Path, target: Path) -> None:
    copies = [two.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in two.disks]
    first, second = (target.with_name(f"{disk.id}.qcow2") for disk in two.disks)
    drives = _drives(two, target.parent)
    backup(two, drives=drives[:1], state="started")
    wait_concluded(two)
    result = fail("drive_backup", arguments(two, drives=drives))
    assert "moment" in result["msg"]
    assert str(first) in result["msg"]
    assert not sent(result, "drive-backup")
    assert not two.block_jobs
    assert receipt(first).exists()
    assert_good(first, copies[0])
    assert_absent(second)
    result = succeed("drive_backup", arguments(two, drives=drives, completion_mode="individual"))
    assert [data["device"] for data in sent(result, "drive-backup")] == ["n1"]
    assert_good(second, copies[1])
    assert info(second)["virtual-size"] == 64 * MIB
