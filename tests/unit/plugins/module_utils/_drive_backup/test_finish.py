# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The end of a good copy: its image gets its name, its record becomes the receipt, its job goes."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import JobFailed
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import finish as finishing
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import receipt
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.finish import finish, resume_guest
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive, DriveBackupRequest
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Locked, Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import file_label, set_file_label
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import IO_ERROR
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, job, record
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, block_job, jobs, monitor

ENDED = {**jobs(block_job("j0", status="concluded")), "job-dismiss": {}, "query-status": {"status": "running"}}
STOPPED = {"query-status": {"status": IO_ERROR}, "cont": {}}


def locked(fake: FakeMonitor) -> Locked:
    return Locked(Session(DriveBackupRequest(Address(path="/run/web01.qmp"), ())), monitor(fake), 0)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "x.qcow2"


def ended(target: Path, content: str = "image", **values: Any) -> Copy:
    """Leave what stands there when a job has ended well; returns its copy."""
    drive = Drive("drive0", str(target))
    Path(drive.image_path).write_text(content)
    left = record(target=str(target), reserved=True, **values)
    receipt.create(receipt.record_path(drive.receipt_path), left)
    return Copy(drive, disk(), "j0", CopyState.ENDED, left, job("j0", "concluded"))


class TestFinish:
    def test_image_and_receipt_get_their_names(self, target: Path) -> None:
        fake = FakeMonitor(ENDED)
        hands = locked(fake)
        [done] = asyncio.run(finish(hands, [ended(target)]))
        assert (done.found, hands.session.changed) == (CopyState.DONE, True)
        assert target.read_text() == "image"
        written = receipt.read(done.drive.receipt_path)
        assert written is not None
        assert written.matches(target.stat(), is_device=False)
        assert sorted(os.listdir(target.parent)) == ["x.qcow2", "x.qcow2.receipt.json"]
        assert fake.commands == [{"execute": "job-dismiss", "arguments": {"id": "j0"}}]

    @pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")
    def test_image_gets_its_label_back(self, target: Path) -> None:
        before = "system_u:object_r:var_t:s0"
        copy = ended(target, label=before)
        set_file_label(copy.drive.image_path, "system_u:object_r:svirt_image_t:s0:c1,c2")
        hands = locked(FakeMonitor(ENDED))
        asyncio.run(finish(hands, [copy]))
        assert file_label(str(target)) == before
        assert not hands.session.warnings

    def test_image_that_keeps_qemus_label_is_good_all_the_same(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: str, _label: str) -> None:
            raise OSError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(finishing, "set_file_label", refuse)
        hands = locked(FakeMonitor(ENDED))
        [done] = asyncio.run(finish(hands, [ended(target, label="system_u:object_r:var_t:s0")]))
        assert done.found == CopyState.DONE
        [warning] = hands.session.warnings
        assert "Permission denied; `restorecon" in warning

    def test_what_needs_nothing_is_left_as_it_is(self, target: Path) -> None:
        hands = locked(FakeMonitor(jobs()))
        copy = Copy(Drive("drive0", str(target)), disk(), "j0", CopyState.OCCUPIED)
        assert asyncio.run(finish(hands, [copy])) == [copy]
        assert not hands.session.changed

    def test_job_stays_until_its_image_has_its_name(self, target: Path) -> None:
        fake = FakeMonitor(ENDED)
        copy = ended(target)
        target.write_text("somebody else's")
        with pytest.raises(JobFailed, match=r"could not be written to stable storage: .*something has appeared there"):
            asyncio.run(finish(locked(fake), [copy]))
        assert (target.read_text(), fake.commands) == ("somebody else's", [])
        left = receipt.read(copy.record_path)
        assert left is not None
        assert left.phase == ReceiptPhase.COPIED

    def test_no_image_gets_its_name_before_all_are_safe(self, target: Path) -> None:
        fake = FakeMonitor(ENDED)
        other = target.with_name("y.qcow2")
        copies = [ended(target), ended(other)]
        Path(copies[1].drive.image_path).unlink()
        with pytest.raises(JobFailed, match=r"y\.qcow2\.partial: No such file"):
            asyncio.run(finish(locked(fake), copies))
        assert not target.exists()
        assert not fake.commands


@pytest.mark.parametrize(
    ("values", "before", "resumed"),
    [
        ({"error": "Input/output error"}, "running", True),
        ({"error": "Input/output error"}, IO_ERROR, False),
        ({}, "running", True),
    ],
    ids=["its target failed", "it stood before", "no error is told"],
)
def test_guest_is_resumed_if_it_did_not_stand_before(
    values: dict[str, Any], before: str, resumed: bool, target: Path
) -> None:
    fake = FakeMonitor(STOPPED)
    copy = Copy(
        Drive("drive0", str(target)),
        disk(),
        "j0",
        CopyState.RUNNING,
        record(reserved=True, guest=before),
        job(**values),
    )
    asyncio.run(resume_guest(locked(fake), [copy]))
    assert bool(fake.commands) is resumed
