# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The end of a copy that comes to nothing: what goes, what stays, and what is told of it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, JobFailed
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import finish, receipt
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    CompletionMode,
    Drive,
    DriveBackupRequest,
    RequestedState,
    TargetMode,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Locked, Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState, Situation
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import file_label, set_file_label
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, job, record, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, block_job, jobs, monitor

INCREMENT = {"sync": "incremental", "bitmap": "b0"}
ADDRESS = Address(path="/run/web01.qmp")


def qemu(*job_ids: str, error: str = "") -> FakeMonitor:
    """Return a QEMU in which these jobs have ended."""
    listed = (block_job(name, status="concluded", **({"error": error} if error else {})) for name in job_ids)
    return FakeMonitor({**jobs(*listed), "job-dismiss": {}, "query-status": {"status": "running"}})


def locked(fake: FakeMonitor) -> Locked:
    return Locked(Session(DriveBackupRequest(ADDRESS, ())), monitor(fake), 0)


def growing(target: Path, found: CopyState = CopyState.RUNNING, mode: str = "", **values: Any) -> Copy:
    """Leave an image that grows, with its record; returns its copy."""
    drive = Drive("drive0", str(target), mode=TargetMode(mode) if mode else TargetMode.ABSOLUTE_PATHS)
    Path(drive.image_path).write_text("image")
    left = record(target=str(target), **values)
    receipt.create(receipt.record_path(drive.receipt_path), left)
    listed = job("j0", "concluded" if found == CopyState.ENDED else "running")
    return Copy(drive, disk(), "j0", found, left, listed)


class TestClean:
    def test_job_image_and_record_go(self, tmp_path: Path) -> None:
        fake = qemu("j0")
        hands = locked(fake)
        assert asyncio.run(finish.clean(hands, [growing(tmp_path / "x.qcow2")])) == []
        assert not os.listdir(tmp_path)
        assert fake.commands == [{"execute": "job-dismiss", "arguments": {"id": "j0"}}]
        assert hands.session.changed

    def test_increment_that_ended_well_at_the_last_moment_is_kept(self, tmp_path: Path) -> None:
        [done] = asyncio.run(finish.clean(locked(qemu("j0")), [growing(tmp_path / "x.qcow2", **INCREMENT)]))
        assert done.found == CopyState.DONE
        assert sorted(os.listdir(tmp_path)) == ["x.qcow2", "x.qcow2.receipt.json"]

    def test_increment_that_was_cancelled_goes(self, tmp_path: Path) -> None:
        fake = qemu("j0", error="Operation canceled")
        assert asyncio.run(finish.clean(locked(fake), [growing(tmp_path / "x.qcow2", **INCREMENT)])) == []
        assert not os.listdir(tmp_path)

    def test_image_that_was_there_before_stays_and_is_known_not_to_be_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "x.qcow2"
        asyncio.run(finish.clean(locked(qemu("j0")), [growing(target, mode="existing")]))
        assert sorted(os.listdir(tmp_path)) == ["x.qcow2", "x.qcow2.receipt.json"]
        left = receipt.read(f"{target}.receipt.json")
        assert left is not None
        assert (left.phase, left.whole) == (ReceiptPhase.CANCELLING, False)

    @pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")
    @pytest.mark.parametrize("phase", ["preparing", "copying"])
    def test_image_that_was_there_before_gets_its_label_back(self, phase: str, tmp_path: Path) -> None:
        target, before = tmp_path / "x.qcow2", "system_u:object_r:var_t:s0"
        copy = growing(target, mode="existing", label=before, phase=phase)
        set_file_label(str(target), "system_u:object_r:svirt_image_t:s0:c1,c2")
        asyncio.run(finish.clean(locked(qemu("j0")), [copy]))
        assert file_label(str(target)) == before

    def test_nothing_to_do(self) -> None:
        hands = locked(FakeMonitor())
        assert asyncio.run(finish.clean(hands, [])) == []
        assert not hands.session.changed


class TestCleanUp:
    def pair(self, tmp_path: Path, mode: CompletionMode, followed: str = "", **values: Any) -> Situation:
        """Return one copy that has ended well, and one that is dead."""
        good = growing(tmp_path / "x.qcow2", CopyState.ENDED, **values)
        dead = growing(tmp_path / "y.qcow2", CopyState.DEAD)
        dead = replace(dead, disk=disk("drive1", "n1"), job_id="j1", job=None, reason="its QEMU has ended")
        return Situation(DriveBackupRequest(ADDRESS, (), completion_mode=mode), vm(), (good, dead), followed)

    @pytest.mark.parametrize(
        ("mode", "values", "left"),
        [
            (CompletionMode.GROUPED, {}, []),
            (CompletionMode.GROUPED, INCREMENT, ["x.qcow2", "x.qcow2.receipt.json"]),
            (CompletionMode.INDIVIDUAL, {}, ["x.qcow2", "x.qcow2.receipt.json"]),
        ],
        ids=["group", "group of increments", "individual"],
    )
    def test_what_stays(self, mode: CompletionMode, values: dict[str, Any], left: list[str], tmp_path: Path) -> None:
        hands = locked(qemu("j0"))
        asyncio.run(finish.clean_up(hands, self.pair(tmp_path, mode, **values)))
        assert sorted(os.listdir(tmp_path)) == left
        [warning] = hands.session.warnings
        assert warning.endswith(f"this one replaces it: disk drive1 to {tmp_path}/y.qcow2: its QEMU has ended")

    def test_call_that_has_waited_fails(self, tmp_path: Path) -> None:
        hands = locked(qemu("j0"))
        with pytest.raises(JobFailed, match=r"the backup failed: disk drive1 to .*: its QEMU has ended") as failure:
            asyncio.run(finish.clean_up(hands, self.pair(tmp_path, CompletionMode.GROUPED, followed="a")))
        assert [result["state"] for result in failure.value.details["jobs"]] == ["completed", "failed"]
        assert not os.listdir(tmp_path)
        assert not hands.session.warnings

    @pytest.mark.parametrize("state", [RequestedState.COMPLETED, RequestedState.STARTED])
    def test_first_to_learn_of_a_failure_fails_if_it_wants_the_end(self, state: RequestedState, tmp_path: Path) -> None:
        copy = growing(tmp_path / "x.qcow2", CopyState.ENDED)
        broken = replace(copy, job=job("j0", "concluded", error="Operation canceled"))
        now = Situation(DriveBackupRequest(ADDRESS, (), state=state), vm(), (broken,))
        hands = locked(qemu("j0", error="Operation canceled"))
        if state == RequestedState.COMPLETED:
            with pytest.raises(JobFailed, match="cancelled from outside"):
                asyncio.run(finish.clean_up(hands, now))
        else:
            asyncio.run(finish.clean_up(hands, now))
            assert "cancelled from outside" in hands.session.warnings[0]
        assert not os.listdir(tmp_path)

    def test_lost_increment_is_told_before_anything_is_removed(self, tmp_path: Path) -> None:
        fake = FakeMonitor()
        dead = growing(tmp_path / "x.qcow2", CopyState.DEAD, **INCREMENT)
        before = os.listdir(tmp_path)
        with pytest.raises(BackupError, match=r"^bitmap: the increment of .* is lost"):
            asyncio.run(finish.clean_up(locked(fake), Situation(DriveBackupRequest(ADDRESS, ()), vm(), (dead,))))
        assert os.listdir(tmp_path) == before
        assert not fake.sent
