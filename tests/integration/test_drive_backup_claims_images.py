# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: whose image it is, and of which moment: nothing is taken for what it is not."""

from __future__ import annotations

import itertools
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    arguments,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    rebase,
    receipt,
    release,
    sent,
    snapshot,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.claims import drives_of, kill_when_copied, record_of
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, info
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

NEVER = {"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "never"}
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
            assert f"{target}: job " in result["msg"], options
            assert " is already making it " in result["msg"], options
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
    assert identical(copy, rebase(target, chain))


@pytest.mark.slow
def test_finished_image_without_its_name_is_only_what_it_was_begun_as(
    two: Qemu, directory: Path, target: Path, chain: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = two.freeze(two.disks[0], directory / "frozen.qcow2")
    backup(two, target, state="started", **NEVER)
    wait_concluded(two)
    kill_when_copied(start_module, arguments(two, target, **NEVER), record_of(target))
    before = snapshot(target.parent)
    _ask_for_others(two, target)
    assert snapshot(target.parent) == before
    result = backup(two, target, **NEVER)
    assert not sent(result, "drive-backup")
    assert identical(copy, rebase(target, chain))


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
        kill_when_copied(start_module, arguments(vm, target, **options), directory / "r.json.partial")
    other = target.with_name("other.qcow2")
    for state, overwrite in itertools.product(("completed", "started", "cancelled"), (False, True)):
        result = fail_backup(vm, other, state=state, overwrite=overwrite, **options)
        assert f"{target}: job " in result["msg"]
        assert " is already making it " in result["msg"]
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


def test_image_that_has_ended_does_not_go_together_with_one_to_come(two: Qemu, directory: Path, target: Path) -> None:
    copies = [two.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in two.disks]
    first, second = (target.with_name(f"{disk.id}.qcow2") for disk in two.disks)
    drives = drives_of(two, target.parent)
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
