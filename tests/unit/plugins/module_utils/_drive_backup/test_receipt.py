# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records and receipts, as files."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import receipt as drive_backup_receipt
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import record


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "x.receipt.json.partial")


def names(path: str) -> set[str]:
    return set(os.listdir(os.path.dirname(path)))


def with_spare(path: str) -> set[str]:
    """A record's file, and the one beside it that holds the space for the next version."""
    return {os.path.basename(path), os.path.basename(path) + ".tmp"}


class TestCreate:
    def test_what_is_written_is_read(self, path: str) -> None:
        written = record(reserved=True, process=(4711, 99), phase=ReceiptPhase.PREPARING)
        drive_backup_receipt.create(path, written)
        assert drive_backup_receipt.read(path) == written
        assert names(path) == with_spare(path)
        status = os.stat(path)
        assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o600, 1)

    @pytest.fixture(params=["links", "no links"])
    def _file_system(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file system with hard links, and one without."""

        def refuse(*_args: str) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        if request.param == "no links":
            monkeypatch.setattr(os, "link", refuse)

    @pytest.mark.usefixtures("_file_system")
    def test_first_one_stays(self, path: str) -> None:
        first = record(attempt="first")
        drive_backup_receipt.create(path, first)
        with pytest.raises(FileExistsError):
            drive_backup_receipt.create(path, record(attempt="second"))
        assert drive_backup_receipt.read(path) == first

    @pytest.mark.usefixtures("_file_system")
    def test_what_a_killed_process_has_left_is_replaced(self, path: str) -> None:
        Path(path + ".tmp").write_text('{"phase": "prep')
        drive_backup_receipt.create(path, record())
        assert drive_backup_receipt.read(path) == record()
        assert names(path) == with_spare(path)

    def test_other_file_is_not_written_through_a_link(self, path: str, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("mine")
        Path(path + ".tmp").symlink_to("victim")
        drive_backup_receipt.create(path, record())
        assert (tmp_path / "victim").read_text() == "mine"
        assert not os.path.islink(path)

    def test_record_that_could_not_be_renewed_is_not_begun(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = iter([None, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
        really = os.fsync

        def fill(fd: int) -> None:
            error = next(calls, None)
            if error:
                raise error
            really(fd)

        monkeypatch.setattr(os, "fsync", fill)
        with pytest.raises(OSError, match="No space left"):
            drive_backup_receipt.create(path, record())
        assert not names(path)


class TestUpdate:
    @pytest.fixture(params=["swap", "no swap"])
    def _file_system(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file system that can swap two names, and one that cannot."""

        def refuse(*_args: str) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        if request.param == "no swap":
            monkeypatch.setattr(drive_backup_receipt, "_exchange", refuse)

    @pytest.mark.usefixtures("_file_system")
    def test_last_version_counts(self, path: str) -> None:
        drive_backup_receipt.create(path, record(phase=ReceiptPhase.PREPARING))
        for phase in (ReceiptPhase.COPYING, ReceiptPhase.COPIED, ReceiptPhase.CANCELLING):
            drive_backup_receipt.update(path, record(phase=phase))
            assert drive_backup_receipt.read(path) == record(phase=phase)

    def test_spare_takes_part_in_turn(self, path: str) -> None:
        drive_backup_receipt.create(path, record(phase=ReceiptPhase.PREPARING))
        inodes = {os.stat(path).st_ino, os.stat(path + ".tmp").st_ino}
        for _dummy in range(3):
            drive_backup_receipt.update(path, record(phase=ReceiptPhase.COPYING))
            assert {os.stat(path).st_ino, os.stat(path + ".tmp").st_ino} == inodes
        assert len(inodes) == 2

    def test_spare_that_is_still_the_record_itself(self, path: str) -> None:
        drive_backup_receipt.create(path, record(phase=ReceiptPhase.PREPARING))
        os.unlink(path + ".tmp")
        os.link(path, path + ".tmp")
        drive_backup_receipt.update(path, record(phase=ReceiptPhase.COPYING))
        assert drive_backup_receipt.read(path) == record(phase=ReceiptPhase.COPYING)
        assert os.stat(path).st_nlink == 1

    def test_version_that_is_shorter_than_the_one_before_last(self, path: str) -> None:
        target = "/b/" + "x" * 4000
        for phase in (ReceiptPhase.PREPARING, ReceiptPhase.PREPARING, ReceiptPhase.COPIED):
            (drive_backup_receipt.update if os.path.exists(path) else drive_backup_receipt.create)(
                path, record(phase=phase, target=target)
            )
        assert drive_backup_receipt.read(path) == record(phase=ReceiptPhase.COPIED, target=target)


def test_record_becomes_the_receipt(path: str, tmp_path: Path) -> None:
    receipt = str(tmp_path / "x.receipt.json")
    Path(receipt).write_text("an older one")
    drive_backup_receipt.create(path, record(phase=ReceiptPhase.COPIED, duration=2.5))
    drive_backup_receipt.finish(path, receipt)
    assert drive_backup_receipt.read(receipt) == record(phase=ReceiptPhase.COPIED, duration=2.5)
    assert names(path) == {os.path.basename(receipt)}


def test_discard(path: str) -> None:
    drive_backup_receipt.create(path, record())
    drive_backup_receipt.discard(path)
    assert not names(path)
    drive_backup_receipt.discard(path)
    assert drive_backup_receipt.read(path) is None


@pytest.mark.parametrize("claimed", [True, False])
def test_sweep_takes_what_belongs_to_no_record(claimed: bool, path: str) -> None:
    Path(path + ".tmp").touch()
    if claimed:
        Path(path).touch()
    drive_backup_receipt.sweep(path)
    assert names(path) == (with_spare(path) if claimed else set())


@pytest.mark.parametrize("phase", ["preparing", "copying", "copied", "cancelling"])
def test_image_is_whole_when_it_is_copied(phase: str) -> None:
    assert record(phase=phase).whole is (phase == "copied")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "its schema 2 is newer than this collection; update vmfleet.backup"),
        ({"schema": "1"}, "it has no schema number"),
        ({"schema": None}, "it has no schema number"),
        ({"phase": None}, "phase: it is missing"),
        ({"phase": "done"}, "phase: 'done' is not one of: preparing, "),
        ({"process": [4711]}, "process: half of it is missing"),
    ],
)
def test_record_of_another_kind_is_refused(change: dict[str, Any], reason: str, path: str) -> None:
    content = {**dataclasses.asdict(record()), **change}
    Path(path).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(BackupError) as refused:
        drive_backup_receipt.read(path)
    assert str(refused.value).startswith(f"receipt: {path} is not a receipt of vmfleet.backup: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[1]", b"null", b"\xff\xfe"])
def test_file_of_somebody_else_is_refused(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)
    with pytest.raises(BackupError, match=r"is not a receipt of vmfleet\.backup"):
        drive_backup_receipt.read(path)


def test_directory_is_refused(path: str) -> None:
    Path(path).mkdir()
    with pytest.raises(BackupError, match="Is a directory"):
        drive_backup_receipt.read(path)


def test_nobody_is_waited_for(path: str) -> None:
    os.mkfifo(path)
    with pytest.raises(BackupError, match=r"is not a receipt of vmfleet\.backup: it is not JSON"):
        drive_backup_receipt.read(path)


def test_fields_of_a_later_release_are_passed_over(path: str) -> None:
    Path(path).write_text(json.dumps({**dataclasses.asdict(record()), "colour": "red"}))
    assert drive_backup_receipt.read(path) == record()


@pytest.mark.parametrize(
    ("values", "consumed"),
    [
        ({}, False),
        ({"sync": "full", "bitmap": "b0", "bitmap_mode": "on-success"}, True),
        ({"sync": "incremental", "bitmap": "b0"}, True),
        ({"sync": "incremental", "bitmap": "b0", "bitmap_mode": "on-success"}, True),
        ({"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "on-success"}, True),
        ({"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "always"}, True),
        ({"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "never"}, False),
    ],
)
def test_bitmap_is_consumed(values: dict[str, str], consumed: bool) -> None:
    assert record(**values).consumes_bitmap is consumed


class TestMatches:
    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        path = tmp_path / "x.qcow2"
        path.write_bytes(b"copied")
        return path

    def finished(self, image: Path) -> drive_backup_receipt.Record:
        return record().copied(image.stat(), "2026-11-22T01:31:00.000Z", 60.0)

    def test_untouched(self, image: Path) -> None:
        finished = self.finished(image)
        assert finished.matches(image.stat(), is_device=False)
        assert (finished.phase, finished.finished, finished.duration) == (
            ReceiptPhase.COPIED,
            "2026-11-22T01:31:00.000Z",
            60.0,
        )

    @pytest.mark.parametrize("change", ["touched", "grown", "replaced"])
    def test_changed(self, change: str, image: Path) -> None:
        finished, status = self.finished(image), image.stat()
        if change == "touched":
            os.utime(image, ns=(0, status.st_mtime_ns + 1))
        elif change == "grown":
            image.write_bytes(b"copied again")
            os.utime(image, ns=(0, status.st_mtime_ns))
        else:
            other = image.with_suffix(".other")
            other.write_bytes(b"others")
            os.utime(other, ns=(0, status.st_mtime_ns))
            other.rename(image)
        assert not finished.matches(image.stat(), is_device=False)
        assert finished.matches(image.stat(), is_device=True)
