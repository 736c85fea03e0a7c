# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a restore decides before it does anything: which targets meet, which are in use, what is done already."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_lock
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.json_file import write_document
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import checks, pins
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import DiskRestore, RestoreMethod
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.restore import describe, headline
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image, manifest

if TYPE_CHECKING:
    from pathlib import Path


IMAGE = image()
MANIFEST = manifest("s1", IMAGE)


def piece(target: Path | str, method: str = RestoreMethod.COPY, **more: Any) -> DiskRestore:
    return replace(DiskRestore("vda", ((MANIFEST, IMAGE),), str(target), "qcow2", method), **more)


class TestCollisions:
    """No file of a restore is another one's, nor the repository's."""

    def test_different_files(self, repository: Repository, tmp_path: Path) -> None:
        names = ("a", "b", "a.qcow2", "repository2", "a.partially")
        checks.refuse_collisions(repository, [piece(tmp_path / name) for name in names])

    @pytest.mark.parametrize("other", ["a", "./a", "x/../a", "link/a", "a.partial", "a.restored.json"])
    def test_one_file(self, repository: Repository, tmp_path: Path, other: str) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(Refused, match=r"^target: .* comes in the way"):
            checks.refuse_collisions(repository, [piece(tmp_path / "a"), piece(f"{tmp_path}/{other}")])

    @pytest.mark.parametrize("target", ["repository/x", "repository/web01/s1/vda.qcow2", "link/x", "x/../repository/y"])
    def test_inside_of_the_repository(self, repository: Repository, tmp_path: Path, target: str) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "link").symlink_to(repository.path)
        with pytest.raises(Refused, match=r"^target: .* is inside of the repository"):
            checks.refuse_collisions(repository, [piece(f"{tmp_path}/{target}")])


class TestUse:
    """QEMU's locks are seen, whatever a file holds."""

    @pytest.mark.parametrize(
        ("start", "length", "used"), [(100, 1, True), (203, 1, True), (0, 100, False), (300, 9, False)]
    )
    def test_locks(self, tmp_path: Path, start: int, length: int, used: bool) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(1000))
        # A lock of an open file, as QEMU takes it: it holds off its own process, too.
        with path.open("rb") as file:
            lock = struct.pack(image_lock.FLOCK, fcntl.F_RDLCK, os.SEEK_SET, start, length, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            if used:
                with pytest.raises(Refused, match=r"is in use by a running VM; see `fuser"):
                    checks.check_unused(str(path))
            else:
                checks.check_unused(str(path))
        checks.check_unused(str(path))


class TestDone:
    """A receipt is of one file, and of one restore."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        path = tmp_path / "disk"
        path.write_bytes(b"content")
        return path

    def note(self, repository: Repository, path: Path, method: str) -> None:
        done = piece(path, method)
        write_document(done.receipt, asdict(checks.read_receipt(repository, done, path.stat())))

    def test_the_same_again(self, repository: Repository, target: Path) -> None:
        self.note(repository, target, RestoreMethod.COPY)
        assert checks.is_done(repository, piece(target))
        others = (
            piece(target, RestoreMethod.OVERLAY),
            piece(target, format="raw"),
            piece(target, disk="vdb"),
            piece(target, steps=((replace(MANIFEST, id="s2"), IMAGE),)),
            piece(target, steps=((replace(MANIFEST, attempt="a2"), IMAGE),)),
        )
        assert not any(checks.is_done(repository, other) for other in others)
        assert not checks.is_done(replace(repository, uuid="another"), piece(target))

    def test_what_was_touched_is_another_unless_it_is_there_to_be_written_to(
        self, repository: Repository, target: Path
    ) -> None:
        for method, stays in ((RestoreMethod.COPY, False), (RestoreMethod.OVERLAY, True)):
            self.note(repository, target, method)
            assert checks.is_done(repository, piece(target, method))
            target.write_bytes(b"written to since then")
            assert checks.is_done(repository, piece(target, method)) == stays

    def test_another_file_in_its_place(self, repository: Repository, target: Path) -> None:
        self.note(repository, target, RestoreMethod.OVERLAY)
        status = target.stat()
        other = target.with_name("other")
        other.write_bytes(target.read_bytes())
        os.utime(other, ns=(status.st_mtime_ns, status.st_mtime_ns))
        other.replace(target)
        assert not checks.is_done(repository, piece(target, RestoreMethod.OVERLAY))

    def test_no_receipt_no_file_half_a_receipt(self, repository: Repository, target: Path) -> None:
        self.note(repository, target, RestoreMethod.COPY)
        receipt = target.with_name("disk.restored.json")
        text = receipt.read_text()
        target.rename(target.with_name("away"))
        assert not checks.is_done(repository, piece(target))
        target.with_name("away").rename(target)
        assert checks.is_done(repository, piece(target))
        receipt.write_text(text[:50])
        assert not checks.is_done(repository, piece(target))
        receipt.unlink()
        assert not checks.is_done(repository, piece(target))


def test_a_set_that_is_gone_is_an_error_without_the_lock_as_well(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held_by_somebody_else(*_args: Any) -> Any:
        raise BackupError("held")

    monkeypatch.setattr(Repository, "lock", held_by_somebody_else)
    warnings: list[str] = []
    with pytest.raises(BackupError, match=r"set s1 was removed meanwhile"):
        asyncio.run(pins.put_pin(repository, "web01", piece(tmp_path / "d"), warnings))
    assert warnings == []


def restored(*changed: bool) -> list[dict[str, Any]]:
    return [piece(f"/t/{number}").result(done, 7) for number, done in enumerate(changed)]


class TestText:
    """What is told of the disks."""

    @pytest.mark.parametrize(
        ("disks", "done", "checked"),
        [
            (restored(True, True), "2 of 2 disks were restored just now", "2 of 2 disks would be restored"),
            (restored(False, True), "1 of 2 disks were restored just now", "1 of 2 disks would be restored"),
            (restored(False, False), "all disks are there already", "0 of 2 disks would be restored"),
        ],
    )
    def test_headline(self, disks: list[dict[str, Any]], done: str, checked: str) -> None:
        assert (headline(disks, check_mode=False), headline(disks, check_mode=True)) == (done, checked)

    def test_where_each_disk_is(self) -> None:
        chain = ((replace(MANIFEST, id="s2"), IMAGE), (MANIFEST, IMAGE))
        disks = [
            piece("/t/a").result(True, 7),
            piece("/t/b", RestoreMethod.OVERLAY, steps=chain, format="raw").result(True, 7),
        ]
        assert describe(disks) == [
            "vda: /t/a (qcow2, 16.0 MiB, copy of set s1)",
            "vda: /t/b (raw, 16.0 MiB, overlay of set s2 on s1)",
        ]
