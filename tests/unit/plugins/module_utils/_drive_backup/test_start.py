# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The start of copies: what is written down, and what is taken back where it fails."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, CommandError
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import receipt, start
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.owners import read_owners
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    Drive,
    DriveBackupRequest,
    RequestedState,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Locked, Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import (
    Copy,
    CopyState,
    Situation,
    digest,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._host import lock as host_lock
from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import host_lock_path
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, job, record, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    answers,
    device,
    jobs,
    monitor,
    refusal,
)

ADDRESS = Address(path="/run/web01.qmp")
STARTS = {
    **answers([Node("n0")], [device("n0", "drive0")]),
    **jobs(),
    "job-dismiss": {},
    "drive-backup": {},
    "query-status": {"status": "running"},
}


@pytest.fixture(autouse=True)
def _locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_lock, "DIRECTORY", str(tmp_path / "locks"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "b"
    directory.mkdir()
    return directory


def locked(fake: FakeMonitor, fd: int = 0) -> Locked:
    return Locked(Session(DriveBackupRequest(ADDRESS, ())), monitor(fake), fd)


def situation(directory: Path, **values: Any) -> Situation:
    """Return one drive of which nothing is there yet."""
    drive = Drive("drive0", str(directory / "x.raw"), format="raw")
    copy = Copy(drive, disk(), "vmfleet.db.0", CopyState.ABSENT)
    return Situation(DriveBackupRequest(ADDRESS, (drive,), **values), vm(), (copy,))


@pytest.mark.parametrize("state", [RequestedState.STARTED, RequestedState.COMPLETED])
def test_what_is_started_is_written_down(state: RequestedState, directory: Path) -> None:
    hands = locked(FakeMonitor(STARTS))
    now = situation(directory, state=state)
    [result], attempt = asyncio.run(start.start(hands, now))
    [copy] = now.copies
    left = receipt.read(copy.record_path)
    assert left is not None
    assert (left.phase, left.target, left.format) == (ReceiptPhase.COPYING, copy.drive.target, "raw")
    assert left.wrote(copy.drive.image_path)
    assert (result["id"], result["state"]) == ("vmfleet.db.0", "running")
    assert attempt == (left.attempt if state == RequestedState.COMPLETED else "")
    assert hands.session.changed
    image = hands.session.images[copy.drive.image_path]
    assert os.path.samestat(os.fstat(image.fd), os.stat(copy.drive.image_path))
    os.close(image.fd)


def test_nothing_is_left_of_what_qemu_does_not_start(directory: Path) -> None:
    fake = FakeMonitor({**STARTS, "drive-backup": refusal("no")})
    with pytest.raises(BackupError, match=r"QEMU did not start the backup of disk drive0 to .*x\.raw: no") as failure:
        asyncio.run(start.start(locked(fake), situation(directory)))
    assert isinstance(failure.value.__cause__, CommandError)
    assert not os.listdir(directory)


def test_name_that_another_process_has_taken_is_left_alone(directory: Path) -> None:
    fake = FakeMonitor(STARTS)
    now = situation(directory)
    receipt.create(now.copies[0].record_path, record(attempt="other"))
    before = os.listdir(directory)
    with pytest.raises(BackupError, match="another process began to make it this moment"):
        asyncio.run(start.start(locked(fake), now))
    assert os.listdir(directory) == before
    assert not fake.commands


def test_owners_of_chosen_ids_are_noted_beside_those_that_still_run(directory: Path) -> None:
    found = vm(jobs=(job("theirs"), job("mine")))
    path = Path(host_lock_path(found.process, ADDRESS))
    path.parent.mkdir(mode=0o700)
    path.write_text('{"theirs": "0123456789ab", "gone": "0123456789ab"}')
    drive = Drive("drive0", str(directory / "x"), job_id="mine")
    copy = Copy(drive, disk(), "mine", CopyState.RUNNING)
    with path.open("r+b") as lock:
        start._note_owners(locked(FakeMonitor(), lock.fileno()), found, [copy])
    assert read_owners(str(path)) == {"theirs": "0123456789ab", "mine": digest(drive, disk())}
