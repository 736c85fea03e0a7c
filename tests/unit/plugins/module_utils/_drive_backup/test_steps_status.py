# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said of a copy, and of what has become of it."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import steps as drive_backup_status
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, job, record

JOB = "vmfleet.db.0123456789ab"


def copy(found: str, **values: Any) -> Copy:
    return Copy(Drive("drive0", "/b/x.qcow2", speed=7), disk(), "j0", found, **values)


@pytest.mark.parametrize(
    ("found", "with_job", "state", "failure"),
    [
        (CopyState.ABSENT, None, "absent", ""),
        (CopyState.OCCUPIED, None, "absent", ""),
        (CopyState.DONE, None, "completed", ""),
        (CopyState.COPIED, None, "completed", ""),
        (CopyState.RUNNING, job(), "running", ""),
        (CopyState.RUNNING, None, "running", ""),
        (CopyState.RUNNING, job("j0", "paused", paused=True), "running", ""),
        (CopyState.RUNNING, job("j0", "paused", paused=True, io_status="nospace"), "paused", ""),
        (CopyState.ENDED, job("j0", "concluded"), "completed", ""),
        (CopyState.ENDED, job("j0", "concluded", error="Input/output error"), "failed", "Input/output error"),
        (CopyState.ENDED, job("j0", "concluded", error="Operation canceled"), "cancelled", "Operation canceled"),
        (CopyState.ENDED, job("j0", "null"), "failed", "its job ended as null"),
        (CopyState.DEAD, None, "failed", ""),
        (CopyState.RUNNING, job("j0", "aborting", error="Input/output error"), "running", ""),
    ],
)
def test_state_of_a_copy(found: str, with_job: Any, state: str, failure: str) -> None:
    looked_at = copy(found, job=with_job)
    assert (looked_at.state, looked_at.failure) == (state, failure)
    assert (looked_at.result()["state"], looked_at.result()["error"]) == (state, failure)


@pytest.mark.parametrize(
    ("status", "paused", "io_status", "stuck"),
    [
        ("paused", True, "nospace", True),
        ("paused", True, "failed", True),
        ("paused", True, "ok", False),
        ("running", False, "nospace", False),
        ("concluded", True, "nospace", False),
    ],
)
def test_copy_is_stuck(status: str, paused: bool, io_status: str, stuck: bool) -> None:
    assert copy(CopyState.RUNNING, job=job("j0", status, paused=paused, io_status=io_status)).stuck is stuck
    assert not copy(CopyState.RUNNING, job=None).stuck


def ago(seconds: float) -> str:
    moment = datetime.now(UTC) - timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TestResult:
    def test_of_a_job(self) -> None:
        running = copy(CopyState.RUNNING, record=record(started=ago(60)), job=job(offset=1, len=4, speed=5))
        result = running.result()
        assert 60 <= result.pop("duration") < 70
        assert result == {
            "id": "j0",
            "device": "drive0",
            "node": "n0",
            "target": "/b/x.qcow2",
            "state": "running",
            "offset": 1,
            "len": 4,
            "percent": 25.0,
            "speed": 5,
            "error": "",
        }

    @pytest.mark.parametrize(
        ("state", "percent", "duration"), [("", 100.0, 60.0), ("planned", 0.0, 0.0), ("failed", 0.0, 60.0)]
    )
    def test_of_a_target(self, state: str, percent: float, duration: float) -> None:
        done = copy(CopyState.DONE, record=record(finished="2026-11-22T01:31:00.000Z", duration=60.0))
        result = done.result(state, error="odd")
        assert (result["percent"], result["duration"], result["speed"], result["error"]) == (
            percent,
            duration,
            7,
            "odd",
        )

    def test_of_a_copy_whose_vm_is_lost(self) -> None:
        result = drive_backup_status.lost_result(Drive("drive0", "/b/x.qcow2"), record(device="vd0"), "QEMU has ended")
        assert (result["id"], result["device"], result["state"], result["error"]) == (
            JOB,
            "drive0",
            "failed",
            "QEMU has ended",
        )

    def test_clock_that_was_set_back(self) -> None:
        assert record(started=ago(-3600)).elapsed == 0.0


@pytest.mark.parametrize(
    ("found", "left", "belongs"),
    [
        (CopyState.RUNNING, record(attempt="a"), True),
        (CopyState.ENDED, record(attempt="a"), True),
        (CopyState.COPIED, record(attempt="a"), True),
        (CopyState.RUNNING, record(attempt="b"), False),
        (CopyState.RUNNING, None, True),
        (CopyState.DONE, record(attempt="a"), False),
        (CopyState.DEAD, record(attempt="a"), False),
    ],
)
def test_copy_belongs_to_an_attempt(found: str, left: Any, belongs: bool) -> None:
    assert copy(found, record=left).belongs_to("a") is belongs


@pytest.mark.parametrize(
    ("copies", "attempt"),
    [
        (
            [copy(CopyState.DONE, record=record(attempt="old")), copy(CopyState.RUNNING, record=record(attempt="new"))],
            "new",
        ),
        ([copy(CopyState.RUNNING)], "j0"),
    ],
)
def test_attempt_of_copies(copies: list[Copy], attempt: str) -> None:
    assert drive_backup_status.attempt_of(copies) == attempt


def test_who_names_disk_and_target() -> None:
    assert copy(CopyState.DEAD).who == "disk drive0 to /b/x.qcow2"
    unnamed = dataclasses.replace(copy(CopyState.DEAD), disk=disk("", "#block1"))
    assert unnamed.who == "disk #block1 to /b/x.qcow2"
