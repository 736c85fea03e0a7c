# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a look at a copy finds: its record, its receipt, its target, its job."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import formats
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import receipt as drive_backup_receipt
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import request
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import status as drive_backup_status
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.status import Copy, CopyState
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import (
    dead_process,
    disk,
    job,
    own_process,
    record,
    vm,
)

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm

JOB = "vmfleet.db.0123456789ab"
OTHER = "9c8f5f1e-0000-4a29-9a55-6b6f1b7c2d10"


def examine(drive: Drive, found: Vm, owners: dict[str, str] | None = None) -> Copy:
    return drive_backup_status.examine(drive, found, owners or {})


def marks(process: Process) -> list[int]:
    return [process.pid, process.start]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "x.qcow2"


def ask(target: Path, **values: Any) -> Drive:
    return Drive(device="drive0", target=str(target), **values)


def remember(target: Path, **values: Any) -> drive_backup_receipt.Record:
    """Leave a record beside a target, as that of a copy under way."""
    left = record(**{"target": str(target), "process": marks(own_process()), **values})
    drive_backup_receipt.create(drive_backup_receipt.record_path(str(target) + ".receipt.json"), left)
    return left


def finish(target: Path, **values: Any) -> drive_backup_receipt.Record:
    """Leave a target with its receipt."""
    target.write_text("image")
    receipt = record(**values).copied(target.stat(), "2026-11-22T01:31:00.000Z", 60.0)
    receipt = dataclasses.replace(receipt, phase=values.get("phase", ReceiptPhase.COPIED))
    drive_backup_receipt.create(str(target) + ".receipt.json", receipt)
    return receipt


class TestRecorded:
    @pytest.mark.parametrize(
        ("values", "state", "found", "reason"),
        [
            pytest.param({}, {"jobs": (job(JOB),)}, CopyState.RUNNING, "", id="running"),
            pytest.param({}, {"jobs": (job(JOB, "paused", paused=True),)}, CopyState.RUNNING, "", id="paused"),
            pytest.param({}, {"jobs": (job(JOB, "concluded"),)}, CopyState.ENDED, "", id="ended"),
            pytest.param(
                {"phase": "preparing"}, {"jobs": (job(JOB),)}, CopyState.RUNNING, "", id="killed right after the start"
            ),
            pytest.param({"process": []}, {"jobs": (job(JOB),)}, CopyState.RUNNING, "", id="over TCP"),
            pytest.param(
                {}, {"jobs": (job(JOB),), "process": None}, CopyState.RUNNING, "", id="now over TCP, then not"
            ),
            pytest.param(
                {}, {"jobs": (job("other"),)}, CopyState.DEAD, f"does not list its job {JOB}", id="not listed"
            ),
            pytest.param(
                {"phase": "cancelling"}, {"jobs": (job(JOB),)}, CopyState.DEAD, "it had been given up", id="given up"
            ),
            pytest.param(
                {"phase": "cancelling", "finished": "2026-11-22T01:31:00.000Z"},
                {},
                CopyState.DEAD,
                "it had been given up",
                id="given up after it was finished",
            ),
            pytest.param(
                {"process": marks(dead_process())},
                {"jobs": (job(JOB),)},
                CopyState.DEAD,
                "has ended",
                id="another QEMU of the same VM",
            ),
            pytest.param(
                {"identity": OTHER, "process": marks(dead_process())},
                {"jobs": (job(JOB),)},
                CopyState.DEAD,
                "it was for VM web01, which has ended",
                id="VM that has ended",
            ),
        ],
    )
    def test_found(self, values: dict[str, Any], state: dict[str, Any], found: str, reason: str, target: Path) -> None:
        left = remember(target, **values)
        copy = examine(ask(target), vm(**state))
        assert copy.found == found
        assert reason in copy.reason
        assert bool(copy.reason) == bool(reason)
        assert (copy.record, copy.job_id, copy.disk) == (left, JOB, disk())
        # The job of another QEMU, or of another VM, is not ours, whatever its name.
        assert bool(copy.job) == (bool(state.get("jobs")) and "ended" not in reason and "list" not in reason)

    @pytest.mark.parametrize("name", ["x.qcow2.partial", "x.qcow2"], ids=["before its rename", "after it"])
    @pytest.mark.parametrize("process", [own_process(), dead_process()], ids=["QEMU runs", "QEMU has ended"])
    @pytest.mark.parametrize("touched", [False, True])
    def test_whole_image(self, name: str, process: Process, touched: bool, target: Path) -> None:
        image = target.with_name(name)
        image.write_text("image")
        whole = record(target=str(target), process=marks(process)).copied(
            image.stat(), "2026-11-22T01:31:00.000Z", 60.0
        )
        drive_backup_receipt.create(drive_backup_receipt.record_path(f"{target}.receipt.json"), whole)
        if touched:
            os.utime(image, (0, 0))
        assert examine(ask(target), vm()).found == (CopyState.DEAD if touched else CopyState.COPIED)

    def test_image_that_was_exchanged_under_the_job(self, target: Path) -> None:
        target.with_name("x.qcow2.partial").touch()
        remember(target, inode=1)
        found = examine(ask(target), vm(jobs=(job(JOB, "concluded"),)))
        assert (found.found, found.failure) == (CopyState.DEAD, "")
        assert "another file stands there" in found.reason

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"hypervisor": "elsewhere"}, "is being made on another hypervisor (machine-id elsewhere, VM web01"),
            ({"identity": OTHER}, "is being made for another VM (web01"),
            # Nobody can tell over TCP whether the other VM's QEMU has ended.
            ({"identity": OTHER, "process": []}, "is being made of VM web01 since"),
            (
                {"identity": OTHER, "process": [], "phase": "copied", "finished": "2026-11-22T01:31:00.000Z"},
                "is being made for another VM (web01",
            ),
            ({"device": "drive1"}, f"is being made by job {JOB} from disk drive1 (sync full,"),
            ({"sync": "top"}, f"is being made by job {JOB} from disk drive0 (sync top,"),
            ({"bitmap": "b1"}, f"is being made by job {JOB}"),
        ],
    )
    def test_what_somebody_else_makes_is_left_alone(self, values: dict[str, Any], reason: str, target: Path) -> None:
        remember(target, **values)
        with pytest.raises(BackupError) as refused:
            examine(ask(target), vm(jobs=(job(JOB),)))
        assert str(refused.value).startswith(f"target: {target} {reason}")

    def test_unreadable_record_is_refused(self, target: Path) -> None:
        Path(f"{target}.receipt.json.partial").write_text("{}")
        with pytest.raises(BackupError, match="is not a receipt"):
            examine(ask(target), vm())


class TestUnrecorded:
    def test_nothing_there(self, target: Path) -> None:
        copy = examine(ask(target), vm())
        assert (copy.found, copy.record, copy.job, copy.reason) == (CopyState.ABSENT, None, None, "")

    def test_id_is_the_same_in_every_call_and_another_for_another_copy(self, target: Path) -> None:
        found = vm(disk(), disk("drive1", "n1"))
        asked = [
            ask(target),
            ask(target, sync="top"),
            ask(target, sync="bitmap", bitmap="b0"),
            ask(target, sync="bitmap", bitmap="b1"),
            ask(target.with_suffix(".img")),
            Drive("drive1", str(target)),
        ]
        ids = [examine(drive, found).job_id for drive in asked]
        assert len(set(ids)) == len(ids)
        assert ids == [examine(drive, found).job_id for drive in asked]
        assert all(job_id.startswith("vmfleet.db.") and len(job_id) == 23 for job_id in ids)

    def test_id_that_was_asked_for(self, target: Path) -> None:
        assert examine(ask(target, job_id="mine"), vm()).job_id == "mine"

    def test_unknown_device(self, target: Path) -> None:
        with pytest.raises(Refused, match=r"^device: "):
            examine(Drive("drive9", str(target)), vm())

    def test_job_without_its_record_is_left_alone(self, target: Path) -> None:
        drive = ask(target, job_id="mine")
        with pytest.raises(BackupError, match=r"job mine runs, but .*x\.qcow2\.receipt\.json\.partial, .* is gone"):
            examine(drive, vm(jobs=(job("mine"),)), {"mine": drive_backup_status.digest(drive, disk())})

    @pytest.mark.parametrize("owners", [{}, {"mine": "0123456789ab"}])
    def test_job_of_another_copy_with_the_same_chosen_id(self, owners: dict[str, str], target: Path) -> None:
        found = examine(ask(target, job_id="mine"), vm(jobs=(job("mine"),)), owners)
        assert (found.found, found.job) == (CopyState.ABSENT, None)

    @pytest.mark.parametrize("status", ["running", "concluded"])
    def test_recorded_job_of_a_chosen_id_is_not_dead_because_its_owner_is_forgotten(
        self, status: str, target: Path
    ) -> None:
        remember(target, job="mine")
        drive = ask(target, job_id="mine")
        listed = vm(jobs=(job("mine", status),), process=own_process())
        with pytest.raises(BackupError, match=r"made by job mine of VM .* the note whose job that is has been lost"):
            examine(drive, listed)
        assert examine(drive, listed, {"mine": drive_backup_status.digest(drive, disk())}).found != CopyState.DEAD
        # Another copy's job of that id leaves no doubt.
        assert examine(drive, listed, {"mine": "0123456789ab"}).found == CopyState.DEAD
        # Nor does a job that is gone.
        assert examine(drive, vm(process=own_process())).found == CopyState.DEAD

    def test_ended_job_without_its_record_is_in_nobodys_way(self, target: Path) -> None:
        assert examine(ask(target, job_id="mine"), vm(jobs=(job("mine", "concluded"),))).found == CopyState.ABSENT

    @pytest.mark.parametrize("kind", ["file", "broken link"])
    def test_image_without_record_is_in_the_way(self, kind: str, target: Path) -> None:
        image = Path(f"{target}.partial")
        if kind == "file":
            image.touch()
        else:
            image.symlink_to("nowhere")
        with pytest.raises(Refused, match=r"^target: .*x\.qcow2\.partial is in the way"):
            examine(ask(target), vm())

    def test_target_that_exists_is_its_own_image(self, target: Path) -> None:
        target.touch()
        copy = examine(ask(target, mode="existing"), vm())
        assert (copy.found, copy.reason) == (CopyState.OCCUPIED, "it has no receipt")

    @pytest.mark.parametrize("kind", ["file", "broken link"])
    def test_target_without_receipt(self, kind: str, target: Path) -> None:
        if kind == "file":
            target.touch()
        else:
            target.symlink_to("nowhere")
        copy = examine(ask(target), vm())
        assert (copy.found, copy.reason) == (CopyState.OCCUPIED, "it has no receipt")

    @pytest.mark.parametrize("values", [{}, {"format": "qcow2"}, {"speed": 5, "compress": True, "job_id": "x"}])
    def test_done(self, values: dict[str, Any], target: Path) -> None:
        receipt = finish(target)
        copy = examine(ask(target, **values), vm())
        assert (copy.found, copy.record, copy.reason) == (CopyState.DONE, receipt, "")

    @pytest.mark.parametrize(
        ("values", "asked", "difference"),
        [
            ({"identity": OTHER}, {}, f"another VM ({OTHER})"),
            ({"device": "drive1"}, {}, "another disk (drive1)"),
            ({"sync": "top"}, {}, "another sync (top)"),
            ({"bitmap": "b0"}, {}, "another bitmap (b0)"),
            ({}, {"bitmap": "b0", "bitmap_mode": "on-success"}, "another bitmap (none)"),
            ({}, {"format": "raw"}, "another format (qcow2)"),
            ({"virtual_size": 512}, {}, "another virtual size (512)"),
        ],
    )
    def test_receipt_for_something_else(
        self, values: dict[str, Any], asked: dict[str, Any], difference: str, target: Path
    ) -> None:
        receipt = finish(target, **values)
        copy = examine(ask(target, **asked), vm())
        assert (copy.found, copy.reason, copy.record) == (
            CopyState.OCCUPIED,
            f"its receipt is for {difference}",
            receipt,
        )

    def test_target_changed_after_its_receipt(self, target: Path) -> None:
        finish(target)
        target.write_text("another image")
        copy = examine(ask(target), vm())
        assert (copy.found, copy.reason) == (
            CopyState.OCCUPIED,
            "it was changed or replaced after its receipt was written",
        )

    def test_receipt_that_was_never_finished(self, target: Path) -> None:
        finish(target, phase=ReceiptPhase.COPYING)
        copy = examine(ask(target), vm())
        assert (copy.found, copy.reason) == (CopyState.ABSENT, "an earlier attempt left it unfinished")

    def test_receipt_without_its_target(self, target: Path) -> None:
        finish(target)
        target.unlink()
        assert examine(ask(target), vm()).found == CopyState.ABSENT

    @pytest.mark.parametrize("there", [True, False])
    def test_file_of_somebody_else_in_the_receipts_place(self, there: bool, target: Path) -> None:
        if there:
            target.touch()
        Path(f"{target}.receipt.json").write_text("mine")
        with pytest.raises(BackupError, match="is not a receipt"):
            examine(ask(target), vm())

    @pytest.mark.parametrize(
        ("jobs", "found"),
        [
            ((), CopyState.OCCUPIED),
            ((job("mine"),), CopyState.RUNNING),
            ((job("mine", "concluded"),), CopyState.ENDED),
        ],
    )
    def test_block_device_without_receipt(
        self, jobs: tuple[Any, ...], found: str, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(request, "is_block_device", lambda _path: True)
        drive = ask(target, mode="existing", job_id="mine")
        copy = examine(drive, vm(jobs=jobs), {"mine": drive_backup_status.digest(drive, disk())})
        assert (copy.found, copy.record) == (found, None)


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
        (CopyState.ENDED, job("j0", "null"), "failed", "it ended as null"),
        (CopyState.DEAD, None, "failed", ""),
        (CopyState.RUNNING, job("j0", "aborting", error="Input/output error"), "running", ""),
    ],
)
def test_state_of_a_copy(found: str, with_job: Any, state: str, failure: str) -> None:
    looked_at = copy(found, job=with_job)
    assert (looked_at.state, looked_at.failure) == (state, failure)
    assert (looked_at.result()["state"], looked_at.result()["error"]) == (state, failure)


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
        assert formats.seconds_since(ago(-3600)) == 0.0

    def test_times_are_read_as_they_are_written(self) -> None:
        assert drive_backup_status.utc_now().endswith("Z")
        assert 0 <= formats.seconds_since(drive_backup_status.utc_now()) < 10


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


def test_tags_of_two_copies_never_meet(target: Path) -> None:
    found: Vm = vm()
    one, other = (examine(ask(target, sync=sync), found) for sync in ("full", "top"))
    assert one.opaque.startswith(drive_backup_status.FDSET_PREFIX)
    assert one.opaque != other.opaque


def test_who_names_disk_and_target() -> None:
    assert copy(CopyState.DEAD).who == "disk drive0 to /b/x.qcow2"
    unnamed = dataclasses.replace(copy(CopyState.DEAD), disk=disk("", "#block1"))
    assert unnamed.who == "disk #block1 to /b/x.qcow2"
