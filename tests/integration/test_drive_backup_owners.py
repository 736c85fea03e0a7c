# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup where nobody knows any more whose a job is that has an id of the user's choice."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import host_lock_path
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.tests.harness.backup import (
    assert_good,
    backup,
    fail_backup,
    partial,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

FORGOTTEN = "no note of this version says who began the job"


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_the_image_is_not_taken_from_its_job(vm: Qemu, directory: Path, target: Path, sync: str) -> None:
    """The directory of locks was moved away, or an older version of the collection has another one."""
    options: dict[str, t.Any] = {"job_id": "nightly"}
    if sync == "incremental":
        vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="own", persistent=True)
        vm.write("drive0", 7, 0, 8 * MIB)
        options.update(sync=sync, bitmap="own")
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target, **options)
    lock = Path(host_lock_path(Process.of(vm.pid), parse_address(str(vm.monitor))))
    note = lock.read_text()
    lock.unlink()
    for state in ("started", "completed", "cancelled"):
        assert FORGOTTEN in fail_backup(vm, target, state=state, **options)["msg"]
        assert vm.job["status"] == "running"
    release(vm)
    wait_concluded(vm)
    assert FORGOTTEN in fail_backup(vm, target, **options)["msg"]
    assert partial(target).exists()
    lock.write_text(note)
    assert not sent(backup(vm, target, **options), "drive-backup")
    if sync == "full":
        assert_good(target, copy)


def test_it_is_made_anew_when_the_job_is_gone(vm: Qemu, directory: Path, target: Path) -> None:
    start_slowly(vm, target, job_id="nightly")
    Path(host_lock_path(Process.of(vm.pid), parse_address(str(vm.monitor)))).unlink()
    release(vm)
    wait_concluded(vm)
    assert FORGOTTEN in fail_backup(vm, target, job_id="nightly")["msg"]
    vm.qmp.execute("job-dismiss", id="nightly")
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    assert sent(backup(vm, target, job_id="nightly"), "drive-backup")
    assert_good(target, copy)
