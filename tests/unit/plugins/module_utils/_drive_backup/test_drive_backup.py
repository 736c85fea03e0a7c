# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check mode: what drive_backup says that it would do, and that it does nothing of it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.drive_backup import _predict
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    Drive,
    DriveBackupRequest,
    RequestedState,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState, Situation
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, job, record, vm

if TYPE_CHECKING:
    from pathlib import Path

CANCELLED = {"state": RequestedState.CANCELLED}
STARTED = {"state": RequestedState.STARTED}


def copies(directory: Path, *found: CopyState, attempts: str = "aa", speed: int = 0) -> tuple[Copy, ...]:
    """Return a copy for each of these states, of two disks; C(attempts) has a letter for each."""
    return tuple(
        Copy(
            Drive(f"drive{number}", str(directory / f"{number}.qcow2"), speed=speed),
            disk(f"drive{number}", f"n{number}"),
            f"j{number}",
            state,
            None if state == CopyState.ABSENT else record(attempt=attempts[number]),
            job(f"j{number}", speed=5) if state == CopyState.RUNNING else None,
            reason="it is lost",
        )
        for number, state in enumerate(found)
    )


def predict(seen: tuple[Copy, ...], **asked: Any) -> tuple[list[str], Session]:
    """Return the states that are told, and the session."""
    session = Session(DriveBackupRequest(Address(path="/run/web01.qmp"), tuple(copy.drive for copy in seen), **asked))
    found = vm(*(copy.disk for copy in seen), jobs=tuple(copy.job for copy in seen if copy.job))
    told = asyncio.run(_predict(session, Situation(session.request, found, seen)))
    return [result["state"] for result in told], session


ABSENT, OCCUPIED, DONE, COPIED, RUNNING, ENDED, DEAD = CopyState


@pytest.mark.parametrize(
    ("found", "asked", "states", "changed"),
    [
        ((RUNNING, ABSENT), CANCELLED, ["cancelled", "absent"], True),
        ((DONE, ABSENT), CANCELLED, ["completed", "absent"], False),
        ((COPIED, DEAD), CANCELLED, ["completed", "cancelled"], True),
        ((RUNNING, DEAD), {}, ["planned", "planned"], True),
        ((RUNNING, ENDED), {}, ["running", "completed"], True),
        ((RUNNING, DONE), STARTED, ["running", "completed"], False),
        ((DONE, DONE), {}, ["completed", "completed"], False),
        ((DONE, COPIED), {}, ["completed", "completed"], True),
    ],
)
def test_what_would_be_done(
    found: tuple[CopyState, ...], asked: dict[str, Any], states: list[str], changed: bool, tmp_path: Path
) -> None:
    told, session = predict(copies(tmp_path, *found), **asked)
    assert (told, session.changed) == (states, changed)
    assert bool(session.warnings) == ("planned" in states)
    assert not session.commands
    assert not os.listdir(tmp_path)


def test_another_speed_is_a_change(tmp_path: Path) -> None:
    for speed, changed in ((5, False), (7, True), (0, False)):
        assert predict(copies(tmp_path, RUNNING, speed=speed), **STARTED)[1].changed is changed


def test_start_is_looked_at_and_not_made(tmp_path: Path) -> None:
    [copy] = copies(tmp_path, ABSENT)
    told, session = predict((copy,), overwrite=True)
    assert (told, session.changed) == (["planned"], True)
    assert not os.listdir(tmp_path)


def test_what_would_be_refused(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match=r"is busy with j0, but not with disk drive1 to .*1\.qcow2; wait until"):
        predict(copies(tmp_path, RUNNING, ABSENT))
    with pytest.raises(Refused, match=r"^target: VM web01: the targets exist, but are of different moments"):
        predict(copies(tmp_path, DONE, DONE, attempts="ab"))
