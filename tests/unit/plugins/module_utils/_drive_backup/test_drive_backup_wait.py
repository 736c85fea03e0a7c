# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The wait of drive_backup: what is taken up, what is done for an image while it grows, and how a wait ends."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import JobFailed
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import drive_backup, start
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    Drive,
    DriveBackupRequest,
    OnTimeout,
    RequestedState,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Locked, Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState, Situation
from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, disk, job, record, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS = Address(path="/run/web01.qmp")


@pytest.mark.parametrize("looks", [0, 1, 3])
def test_growing_image_is_written_out_at_every_look(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = Drive("drive0", str(tmp_path / "x.raw"), format="raw")
    found = iter([CopyState.RUNNING] * looks + [CopyState.ENDED])
    nudged: list[preallocate.Writeback] = []

    def nudge(writeback: preallocate.Writeback) -> None:
        nudged.append(writeback)

    async def look(*_args: object) -> tuple[list[Copy], str]:
        return [Copy(drive, disk(), "j0", next(found), job=job())], ""

    monkeypatch.setattr(drive_backup, "SHORTEST_POLL", 0)
    monkeypatch.setattr(drive_backup, "look", look)
    monkeypatch.setattr(preallocate.Writeback, "nudge", nudge)
    session = Session(DriveBackupRequest(ADDRESS, (drive,)))

    async def begin_and_wait() -> None:
        absent = Copy(drive, disk(), "j0", CopyState.ABSENT)
        locked = Locked(session, session.monitor(), 0)
        await start._make(locked, absent, Target(drive.image_path, "raw", MIB))
        await drive_backup.wait(session, None, 0, "0123456789ab", [])

    asyncio.run(begin_and_wait())
    assert len(nudged) == looks
    for writeback in nudged:
        assert os.path.samestat(os.fstat(writeback.fd), os.stat(drive.image_path))
    for writeback in session.images.values():
        os.close(writeback.fd)


@pytest.mark.parametrize(
    ("state", "speed", "attempt", "changed"),
    [
        (RequestedState.COMPLETED, 0, "a1", True),
        (RequestedState.STARTED, 0, "", False),
        (RequestedState.STARTED, 5, "", False),
        (RequestedState.STARTED, 7, "", True),
    ],
)
def test_running_job_is_taken_up(state: RequestedState, speed: int, attempt: str, changed: bool) -> None:
    drive = Drive("drive0", "/b/x.qcow2", speed=speed)
    copy = Copy(drive, disk(), "j0", CopyState.RUNNING, record(attempt="a1"), job(speed=5))
    request = DriveBackupRequest(ADDRESS, (drive,), state=state)
    fake = FakeMonitor({"block-job-set-speed": {}})
    locked = Locked(Session(request), monitor(fake), 0)
    [result], followed = asyncio.run(drive_backup.join(locked, Situation(request, vm(), (copy,))))
    assert (result["state"], followed, locked.session.changed) == ("running", attempt, changed)
    assert [command["arguments"]["speed"] for command in fake.commands] == ([7] if speed == 7 else [])


def test_job_is_left_running_where_that_is_asked_for() -> None:
    known: list[dict[str, Any]] = [{"state": "running"}]
    session = Session(DriveBackupRequest(ADDRESS, (), on_timeout=OnTimeout.LEAVE))
    with pytest.raises(
        JobFailed, match=r"^timeout: not done; the job continues, because on_timeout says so$"
    ) as failure:
        asyncio.run(drive_backup._time_out(session, "a1", known, "timeout: not done"))
    assert failure.value.details == {"jobs": known}
    assert not session.commands
