# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a look at a copy finds: its record, its receipt, its target, its job."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import receipt as drive_backup_receipt
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import request
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import session as drive_backup_examine
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import (
    FDSET_PREFIX,
    Copy,
    CopyState,
    digest,
)
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
    return drive_backup_examine.examine(drive, found, owners or {})


def marks(process: Process) -> tuple[int, int]:
    return process.pid, process.start


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
            pytest.param({"process": ()}, {"jobs": (job(JOB),)}, CopyState.RUNNING, "", id="over TCP"),
            pytest.param(
                {}, {"jobs": (job(JOB),), "process": None}, CopyState.RUNNING, "", id="now over TCP, then not"
            ),
            pytest.param(
                {}, {"jobs": (job("other"),)}, CopyState.DEAD, f"does not list its job {JOB}", id="not listed"
            ),
            pytest.param(
                {"phase": "cancelling"},
                {"jobs": (job(JOB),)},
                CopyState.DEAD,
                "an earlier call cancelled it",
                id="given up",
            ),
            pytest.param(
                {"phase": "cancelling", "finished": "2026-11-22T01:31:00.000Z"},
                {},
                CopyState.DEAD,
                "an earlier call cancelled it",
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
            ({"hypervisor": "elsewhere"}, " is being made on another hypervisor (machine-id elsewhere, VM web01"),
            ({"identity": OTHER}, " is being made for another VM (web01"),
            # Nobody can tell over TCP whether the other VM's QEMU has ended.
            (
                {"identity": OTHER, "process": []},
                ": a call in another container, or outside of this one, began it for VM web01 at ",
            ),
            (
                {"identity": OTHER, "process": [], "phase": "copied", "finished": "2026-11-22T01:31:00.000Z"},
                " is being made for another VM (web01",
            ),
            ({"device": "drive1"}, f": job {JOB} is already making it from disk drive1 (sync full,"),
            ({"sync": "top"}, f": job {JOB} is already making it from disk drive0 (sync top,"),
            ({"bitmap": "b1"}, f": job {JOB} is already making it from disk drive0"),
        ],
    )
    def test_what_somebody_else_makes_is_left_alone(self, values: dict[str, Any], reason: str, target: Path) -> None:
        remember(target, **values)
        with pytest.raises(BackupError) as refused:
            examine(ask(target), vm(jobs=(job(JOB),)))
        assert str(refused.value).startswith(f"target: {target}{reason}")

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
        with pytest.raises(BackupError, match=r"job mine runs, but .*x\.qcow2\.receipt\.json\.partial, .* is missing"):
            examine(drive, vm(jobs=(job("mine"),)), {"mine": digest(drive, disk())})

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
        with pytest.raises(BackupError, match=r"job mine of VM .* but no note of this version says who began the job"):
            examine(drive, listed)
        assert examine(drive, listed, {"mine": digest(drive, disk())}).found != CopyState.DEAD
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
        with pytest.raises(Refused, match=r"^target: .*x\.qcow2\.partial exists, and no record"):
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
        copy = examine(drive, vm(jobs=jobs), {"mine": digest(drive, disk())})
        assert (copy.found, copy.record) == (found, None)


def test_tags_of_two_copies_never_meet(target: Path) -> None:
    found: Vm = vm()
    one, other = (examine(ask(target, sync=sync), found) for sync in ("full", "top"))
    assert one.opaque.startswith(FDSET_PREFIX)
    assert one.opaque != other.opaque
