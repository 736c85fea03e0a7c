# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Targets of a confined QEMU: which are refused, which are labelled, and what of that is written down."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import preflight, receipt, start
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    Drive,
    DriveBackupRequest,
    RequestedState,
    TargetMode,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Locked, Session
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState, Situation
from ansible_collections.vmfleet.backup.plugins.module_utils._host import lock as host_lock
from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import (
    ADMITTED,
    Admission,
    Label,
    Sample,
    file_label,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE, disk, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    answers,
    device,
    jobs,
    monitor,
)

if TYPE_CHECKING:
    from pathlib import Path

QEMU = Label("system_u:system_r:svirt_t:s0:c1,c2")
VAR = "system_u:object_r:var_t:s0"
OWN_IMAGE = "system_u:object_r:svirt_image_t:s0:c1,c2"
REFUSED = Admission("not given; do this", VAR)
LABELLED = Admission("not given; do this", VAR, OWN_IMAGE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sample]]:
    """The files on which it was asked, each with its name; the answer is LABELLED."""
    found: list[tuple[str, Sample]] = []

    def admit(_qemu: Label, sample: Sample, _images: object) -> Admission:
        found.append((os.readlink(f"/proc/self/fd/{sample.fd}"), sample))
        return LABELLED

    monkeypatch.setattr(preflight, "label_of", lambda _process: QEMU)
    monkeypatch.setattr(preflight, "admit", admit)
    return found


def admission(drive: Drive, image_format: str = "qcow2") -> Admission:
    return preflight._admission(vm(), drive, image_format)


class TestAdmission:
    def test_new_image(self, asked: list[tuple[str, Sample]], tmp_path: Path) -> None:
        assert admission(Drive("drive0", str(tmp_path / "x.qcow2"))) == LABELLED
        [(name, sample)] = asked
        assert (os.path.dirname(name), sample.place, sample.spare) == (str(tmp_path), str(tmp_path), True)
        assert not os.listdir(tmp_path)

    def test_existing_image(self, asked: list[tuple[str, Sample]], tmp_path: Path) -> None:
        target = tmp_path / "x.qcow2"
        target.touch()
        admission(Drive("drive0", str(target), mode=TargetMode("existing")))
        [(name, sample)] = asked
        assert (name, sample.place, sample.spare, sample.kind) == (str(target), str(tmp_path), False, "file")

    def test_device(self, asked: list[tuple[str, Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(target_files, "is_block_device", lambda _path: True)
        target = tmp_path / "vdb"
        target.touch()
        admission(Drive("drive0", str(target), mode=TargetMode("existing")))
        [(name, sample)] = asked
        assert (name, sample.place, sample.spare, sample.kind) == (str(target), str(target), False, "blk_file")

    def test_directory_in_which_nothing_can_be_made(
        self, asked: list[tuple[str, Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

        monkeypatch.setattr(preflight, "scratch", full)
        with pytest.raises(Refused, match=r"^target: .*No space left on device$"):
            admission(Drive("drive0", str(tmp_path / "x.qcow2")))
        assert not asked

    @pytest.mark.parametrize("label", ["", "unconfined"])
    def test_qemu_that_is_not_confined(
        self, label: str, asked: list[tuple[str, Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preflight, "label_of", lambda _process: Label(label))
        assert admission(Drive("drive0", str(tmp_path / "x.vhdx")), "vhdx") == ADMITTED
        assert not asked

    @pytest.mark.parametrize(("mode", "option"), [("absolute-paths", "format"), ("existing", "target")])
    def test_format_that_apparmor_spoils(
        self, mode: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preflight, "label_of", lambda _process: Label("libvirt-1 (enforce)"))
        with pytest.raises(Refused, match=r"changes the length of a vhdx image.*\(profile libvirt-1\)") as refusal:
            admission(Drive("drive0", str(tmp_path / "x.vhdx"), mode=TargetMode(mode)), "vhdx")
        assert refusal.value.option == option


@pytest.mark.parametrize(("found", "may_label"), [(REFUSED, True), (LABELLED, False)])
def test_what_qemu_would_not_be_given_is_refused(
    found: Admission, may_label: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_admission", lambda *_arguments: found)
    copy = Copy(Drive("drive0", str(tmp_path / "x.raw"), format="raw"), disk(), "j0", CopyState.ABSENT)
    with pytest.raises(Refused, match=r"^target: not given; do this$"):
        asyncio.run(preflight.prepare_target(vm(), copy, False, may_label))


@pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("found", [LABELLED, ADMITTED])
def test_label_of_before_is_written_down(
    found: Admission, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an image that is there already, before that gets another one."""
    monkeypatch.setattr(host_lock, "DIRECTORY", str(tmp_path / "locks"))
    monkeypatch.setattr(preflight, "_admission", lambda *_arguments: found)
    noted: list[str] = []
    set_file_label, path = start.set_file_label, tmp_path / "x.qcow2"

    def label(where: str, label: str, fd: int) -> None:
        record = receipt.read(f"{path}.receipt.json.partial")
        assert record
        noted.append(record.label)
        set_file_label(where, label, fd)

    monkeypatch.setattr(start, "set_file_label", label)
    if existing:
        asyncio.run(qemu_img.run(qemu_img.create_command(str(path), "qcow2", SIZE)))
    drive = Drive("drive0", str(path), mode=TargetMode("existing" if existing else "absolute-paths"))
    copy = Copy(drive, disk(), "vmfleet.db.0", CopyState.OCCUPIED if existing else CopyState.ABSENT)
    address = Address(path="/run/web01.qmp")
    now = Situation(DriveBackupRequest(address, (drive,), state=RequestedState.STARTED), vm(), (copy,))
    there = answers([Node("n0")], [device("n0", "drive0")], query_status={"status": "running"})
    fake = FakeMonitor({**there, **jobs(), "drive-backup": {}})
    hands = Locked(Session(DriveBackupRequest(address, ())), monitor(fake), 0)
    asyncio.run(start.start(hands, now))
    left = receipt.read(copy.record_path)
    assert left
    assert left.label == found.before
    assert noted == ([VAR] if found.label else [])
    assert file_label(drive.image_path) == found.label
    for image in hands.session.images.values():
        os.close(image.fd)
