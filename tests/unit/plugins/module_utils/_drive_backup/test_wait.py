# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The wait of drive_backup: what it does for an image while it grows."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import start, wait
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive, Request
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Locked, Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.status import Copy, CopyState
from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, disk, job

if TYPE_CHECKING:
    from pathlib import Path


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

    monkeypatch.setattr(wait, "SHORTEST_POLL", 0)
    monkeypatch.setattr(wait, "look", look)
    monkeypatch.setattr(preallocate.Writeback, "nudge", nudge)
    session = Session(Request(address=Address(path="/run/web01.qmp"), drives=(drive,)))

    async def begin_and_wait() -> None:
        absent = Copy(drive, disk(), "j0", CopyState.ABSENT)
        locked = Locked(session, session.monitor(), 0)
        await start._make(locked, absent, Target(drive.image_path, "raw", MIB))
        await wait.wait(session, None, 0, "0123456789ab", [])

    asyncio.run(begin_and_wait())
    assert len(nudged) == looks
    for writeback in nudged:
        assert os.path.samestat(os.fstat(writeback.fd), os.stat(drive.image_path))
    for writeback in session.images.values():
        os.close(writeback.fd)
