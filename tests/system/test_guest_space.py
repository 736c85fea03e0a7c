# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup of a real Linux that writes all the time, to file systems that fill up: the guest comes first."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    backup,
    fail_backup,
    release,
    start_slowly,
)
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest, file_in, file_system
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.qemu import Qmp, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def guest(directory: Path, storage: Storage) -> t.Iterator[Guest]:
    """A guest that writes. Its disks are not on the file systems of `storage`, which is unmounted after its end."""
    assert storage
    with Guest(directory) as guest:
        yield guest


def _writes_on(guest: Guest, rounds: int = 10) -> None:
    """Wait until the guest has gone on writing for a while."""
    wanted = guest.rounds + rounds
    wait_until(lambda: guest.rounds >= wanted, "more rounds of the guest's writer")


def _drives(directory: Path) -> list[dict[str, str]]:
    return [{"device": name, "target": str(directory / f"{name}.qcow2")} for name in ("system", "data")]


def test_reserved_and_filled_in_mid_job(guest: Guest, storage: Storage, directory: Path) -> None:
    mount = storage.mount("ext4", 256 * MIB)
    drives = _drives(mount.path)
    backup(guest, drives=drives, state="started", speed=SLOW)
    mount.fill()
    assert mount.free < 65536
    _writes_on(guest, 20)
    assert guest.status == "running"
    release(guest)
    result = backup(guest, drives=drives)
    assert {job["state"] for job in result["jobs"]} == {"completed"}
    _writes_on(guest)
    images = [file_system(mount.path / f"{name}.qcow2", directory / f"{name}.raw") for name in ("system", "data")]
    system, data = (int(file_in(image, "round")) for image in images)
    # One point in time: first system, then data is written.
    assert system - data in (0, 1)


@pytest.mark.parametrize("policy", first(1, ["stop", "report"]))
def test_unreservable_and_filled_while_watched(
    guest: Guest, storage: Storage, directory: Path, start_module: t.Callable[..., ModuleProcess], policy: str
) -> None:
    mount = storage.mount("ext2", 96 * MIB)
    target = mount.path / "system.qcow2"
    options = {"device": "system", "on_target_error": policy}
    process = start_module("drive_backup", {**arguments(guest, target, speed=SLOW), **options})
    wait_until(lambda: guest.block_jobs, "the job")
    mount.fill()
    result = process.result()
    assert result["failed"] is True
    assert "No space left on device" in result["msg"]
    if guest.block_jobs:
        # The job was paused before the guest came upon the full file system; that is left to the user, as asked.
        assert policy == "stop"
        assert [job["state"] for job in result["jobs"]] == ["paused"]
        backup(guest, target, state="cancelled", device="system")
    assert_absent(target)
    assert not leftovers(guest, directory)
    assert guest.status == "running"
    _writes_on(guest)


def test_unreservable_and_filled_while_nobody_watched(guest: Guest, storage: Storage, directory: Path) -> None:
    mount = storage.mount("ext2", 96 * MIB)
    target = mount.path / "system.qcow2"
    start_slowly(guest, target, device="system")
    mount.fill()
    wait_until(lambda: guest.status == "io-error", "the guest's stop")
    result = fail_backup(guest, target, device="system")
    assert "No space left on device" in result["msg"]
    assert_absent(target)
    assert not leftovers(guest, directory)
    assert guest.status == "running"
    _writes_on(guest)


@pytest.mark.thorough
def test_job_that_failed_beside_a_stopped_guest(guest: Guest, storage: Storage, directory: Path) -> None:
    mount = storage.mount("ext2", 96 * MIB)
    target = mount.path / "system.qcow2"
    start_slowly(guest, target, device="system")
    mount.fill()
    wait_until(lambda: guest.status == "io-error", "the guest's stop")
    release(guest)
    wait_until(lambda: guest.job["status"] == "concluded", "the end of the job")
    assert "No space left on device" in guest.job["error"]
    result = fail_backup(guest, target, device="system")
    assert "No space left on device" in result["msg"]
    assert_absent(target)
    assert not leftovers(guest, directory)
    assert guest.status == "running"
    _writes_on(guest)


def test_guest_stopped_by_its_user_stays_stopped(
    guest: Guest, storage: Storage, start_module: t.Callable[..., ModuleProcess]
) -> None:
    mount = storage.mount("ext4", 128 * MIB)
    target = mount.path / "system.qcow2"
    process = start_module("drive_backup", arguments(guest, target, device="system", speed=16 * SLOW))
    wait_until(lambda: guest.block_jobs, "the job")
    guest.qmp.execute("stop")
    assert process.result()["jobs"][0]["state"] == "completed"
    assert guest.status == "paused"
    guest.qmp.execute("cont")
    Qmp(guest.monitor).close()
    _writes_on(guest)
    assert not leftovers(guest, target.parent)
