# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The look at a VM, and the lock that is held with its monitor."""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import MonitorGone, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import session as drive_backup_session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive, DriveBackupRequest
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Session, lock, observe
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import CopyState
from ansible_collections.vmfleet.backup.plugins.module_utils._host import lock as host_lock
from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import host_lock_path
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import dead_process, own_process
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    answers,
    device,
    monitor,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process

QEMU = answers([Node("n0")], [device("n0", "drive0")])
ADDRESS = Address(path="/run/web01.qmp")


@pytest.fixture(autouse=True)
def _locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_lock, "DIRECTORY", str(tmp_path / "locks"))


def test_disk_that_is_asked_for_by_two_names(tmp_path: Path) -> None:
    drives = tuple(Drive(name, str(tmp_path / name)) for name in ("drive0", "n0"))
    with pytest.raises(Refused, match=r"^device: drive0 is asked for more than once on VM web01"):
        asyncio.run(observe(Session(DriveBackupRequest(ADDRESS, drives)), monitor(FakeMonitor(QEMU))))


def test_look_tells_what_was_waited_for(tmp_path: Path) -> None:
    session = Session(DriveBackupRequest(ADDRESS, (Drive("drive0", str(tmp_path / "x")),)))
    now = asyncio.run(observe(session, monitor(FakeMonitor(QEMU)), "a1"))
    assert (now.followed, [copy.found for copy in now.copies]) == ("a1", [CopyState.ABSENT])


@pytest.mark.parametrize("found", [own_process(), dead_process(), None], ids=["same", "restarted", "unknown"])
def test_lock_is_that_of_the_qemu_that_answers(found: Process | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMonitor(process=found)
    monkeypatch.setattr(drive_backup_session, "Monitor", lambda *_args: fake)
    session = Session(DriveBackupRequest(ADDRESS, ()))

    async def hold() -> bool:
        async with lock(session, own_process()) as locked:
            with open(host_lock_path(own_process(), ADDRESS), "rb") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(locked.fd), os.stat(host_lock_path(own_process(), ADDRESS)))

    if found == own_process():
        assert asyncio.run(hold())
    else:
        with pytest.raises(MonitorGone, match="QEMU was restarted in between"):
            asyncio.run(hold())
