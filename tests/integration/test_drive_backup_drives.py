# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: several disks in one transaction."""

from __future__ import annotations

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
    release,
    sent,
    snapshot,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, patterned, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, faulty, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def three(vms: Vms) -> Qemu:
    """A VM with three disks."""
    return vms.start(*(vms.disk(number) for number in range(3)))


def _drives(vm: Qemu, directory: Path, **options: t.Any) -> list[dict[str, t.Any]]:
    return [{"device": disk.id, "target": str(directory / f"{disk.id}.qcow2"), **options} for disk in vm.disks]


def _targets(vm: Qemu, directory: Path) -> list[Path]:
    return [directory / f"{disk.id}.qcow2" for disk in vm.disks]


def _freeze(vm: Qemu, directory: Path) -> list[Path]:
    return [vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks]


def test_all_start_in_one_transaction(three: Qemu, directory: Path, target: Path) -> None:
    copies = _freeze(three, directory)
    result = backup(three, drives=_drives(three, target.parent))
    assert result["changed"] is True
    assert [job["device"] for job in result["jobs"]] == ["drive0", "drive1", "drive2"]
    assert {job["state"] for job in result["jobs"]} == {"completed"}
    [transaction] = [entry for entry in result["qmp"] if entry["execute"] == "transaction"]
    assert [action["data"]["device"] for action in transaction["arguments"]["actions"]] == ["n0", "n1", "n2"]
    assert transaction["arguments"]["properties"] == {"completion-mode": "grouped"}
    for path, copy in zip(_targets(three, target.parent), copies, strict=True):
        assert_good(path, copy)
    before = snapshot(target.parent)
    assert backup(three, drives=_drives(three, target.parent))["changed"] is False
    assert snapshot(target.parent) == before


def test_case_2_one_point_in_time(
    three: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    starting = start_module("drive_backup", arguments(three, drives=_drives(three, target.parent)))
    written = 0
    # The guest writes one number after the other on all disks, before, during and after the start.
    while starting.running or written < 3:
        written += 1
        for disk in three.disks:
            three.write(str(disk.id), written % 255 + 1, 60 * MIB + 4096 * (written % 512), 4096)
    assert starting.result()["changed"] is True
    numbers = []
    for path in _targets(three, target.parent):
        raw = directory / "raw"
        qemu_img("convert", "-O", "raw", path, raw)
        numbers.append(_newest(raw, written))
    assert max(numbers) - min(numbers) <= 1, numbers
    assert min(numbers) > 0


def _newest(raw: Path, written: int) -> int:
    """The last number that an image holds."""
    with raw.open("rb") as content:
        for number in range(written, 0, -1):
            content.seek(60 * MIB + 4096 * (number % 512))
            if content.read(1)[0] == number % 255 + 1:
                return number
    return 0


def test_check_mode_plans_all(three: Qemu, target: Path) -> None:
    result = succeed("drive_backup", arguments(three, drives=_drives(three, target.parent)), check=True)
    assert [job["state"] for job in result["jobs"]] == ["planned"] * 3
    assert not list(target.parent.iterdir())


def test_individual_completion(three: Qemu, target: Path) -> None:
    result = backup(three, drives=_drives(three, target.parent), completion_mode="individual")
    [transaction] = [entry for entry in result["qmp"] if entry["execute"] == "transaction"]
    assert transaction["arguments"].get("properties", {"completion-mode": "individual"}) == {
        "completion-mode": "individual"
    }


def test_each_drive_may_have_options_of_its_own(three: Qemu, target: Path) -> None:
    drives = _drives(three, target.parent)
    drives[1].update(format="raw", speed=2 * SLOW)
    drives[2].update(compress=True)
    result = backup(three, drives=drives, speed=SLOW, state="started")
    told = sent(result, "drive-backup")
    assert [data["speed"] for data in told] == [SLOW, 2 * SLOW, SLOW]
    assert [data["format"] for data in told] == ["qcow2", "raw", "qcow2"]
    assert [data.get("compress", False) for data in told] == [False, False, True]
    assert sorted(job["speed"] for job in three.block_jobs) == [SLOW, SLOW, 2 * SLOW]
    assert len({job["device"] for job in three.block_jobs}) == 3
    release(three)
    backup(three, drives=drives)


def test_case_6_all_are_followed_by_another_process(three: Qemu, directory: Path, target: Path) -> None:
    copies = _freeze(three, directory)
    started = backup(three, drives=_drives(three, target.parent), state="started", speed=SLOW)
    release(three)
    completed = backup(three, drives=_drives(three, target.parent))
    assert [job["id"] for job in completed["jobs"]] == [job["id"] for job in started["jobs"]]
    for path, copy in zip(_targets(three, target.parent), copies, strict=True):
        assert_good(path, copy)


def test_cancelled_takes_all(three: Qemu, target: Path) -> None:
    backup(three, drives=_drives(three, target.parent), state="started", speed=SLOW)
    result = backup(three, drives=_drives(three, target.parent), state="cancelled")
    assert {job["state"] for job in result["jobs"]} == {"cancelled"}
    assert not list(target.parent.iterdir())


def test_timeout_takes_all(three: Qemu, target: Path) -> None:
    result = fail_backup(three, drives=_drives(three, target.parent), timeout=1, speed=SLOW)
    assert len(result["jobs"]) == 3
    assert not list(target.parent.iterdir())


def test_grouped_failure_of_one_fails_all(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0), _bad(directory))
    result = fail_backup(vm, drives=_drives(vm, target.parent))
    states = {job["device"]: job["state"] for job in result["jobs"]}
    assert states["bad"] == "failed"
    assert states["drive0"] in ("cancelled", "failed")
    assert "Input/output error" in result["msg"]
    assert not list(target.parent.iterdir())


def test_case_35_individual_failure_of_one_leaves_the_others(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0), _bad(directory))
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = fail_backup(vm, drives=_drives(vm, target.parent), completion_mode="individual")
    states = {job["device"]: job["state"] for job in result["jobs"]}
    assert states == {"drive0": "completed", "bad": "failed"}
    assert "bad" in result["msg"]
    assert_good(target.with_name("drive0.qcow2"), copy)
    assert_absent(target.with_name("bad.qcow2"))


def _bad(directory: Path) -> Disk:
    image = patterned(directory / "bad.raw", "raw")
    return Disk(image, id="bad", node="bad-node", format="raw", file=faulty(image, "read_aio", sector=65536))


def test_images_of_different_moments_do_not_go_together(three: Qemu, target: Path) -> None:
    backup(three, target.with_name("drive1.qcow2"), device="drive1")
    before = snapshot(target.parent)
    result = fail_backup(three, drives=_drives(three, target.parent))
    assert "drive1.qcow2" in result["msg"]
    assert "moment" in result["msg"]
    assert snapshot(target.parent) == before


def test_each_for_itself_does_not_do_again_what_is_finished(three: Qemu, directory: Path, target: Path) -> None:
    backup(three, target.with_name("drive1.qcow2"), device="drive1")
    before = target.with_name("drive1.qcow2").stat()
    copies = _freeze(three, directory)
    result = backup(three, drives=_drives(three, target.parent), completion_mode="individual")
    assert sorted(data["device"] for data in sent(result, "drive-backup")) == ["n0", "n2"]
    assert target.with_name("drive1.qcow2").stat() == before
    for path, copy in zip(_targets(three, target.parent), copies, strict=True):
        assert_good(path, copy)


def test_one_drive_in_the_list(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    backup(vm, drives=[{"device": "drive0", "target": str(target)}])
    assert_good(target, copy)
    # One and the same backup, however it is written.
    assert backup(vm, target)["changed"] is False


def test_finished_while_unwatched(three: Qemu, directory: Path, target: Path) -> None:
    copies = _freeze(three, directory)
    backup(three, drives=_drives(three, target.parent), state="started")
    wait_until(lambda: {job["status"] for job in three.block_jobs} == {"concluded"}, "the end of all")
    assert all(partial(path).exists() for path in _targets(three, target.parent))
    backup(three, drives=_drives(three, target.parent))
    for path, copy in zip(_targets(three, target.parent), copies, strict=True):
        assert_good(path, copy)
