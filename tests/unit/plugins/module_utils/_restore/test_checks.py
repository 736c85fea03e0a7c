# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a restore decides before it does anything: which targets meet, which are in use, what is done already."""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_lock
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.checks import (
    check_unused,
    is_restored,
    make_receipt,
    refuse_collisions,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import RestoreMethod
from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import write
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import IMAGE, MANIFEST, disk_restore

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


class TestCollisions:
    """No file of a restore is another one's, nor the repository's."""

    def test_different_files(self, tmp_path: Path) -> None:
        names = ("a", "b", "a.qcow2", "repository2", "a.partially")
        refuse_collisions([disk_restore(tmp_path / name) for name in names])

    @pytest.mark.parametrize("other", ["a", "./a", "x/../a", "link/a", "a.partial", "a.restored.json"])
    def test_one_file(self, tmp_path: Path, other: str) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(Refused, match=r"^target: .* conflicts with"):
            refuse_collisions([disk_restore(tmp_path / "a"), disk_restore(f"{tmp_path}/{other}")])

    @pytest.mark.parametrize("target", ["repository/x", "repository/web01/s1/vda.qcow2", "link/x", "x/../repository/y"])
    def test_inside_of_the_repository(self, repository: Repository, tmp_path: Path, target: str) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "link").symlink_to(repository.path)
        with pytest.raises(Refused, match=r"^target: .* is inside of the repository"):
            refuse_collisions([disk_restore(f"{tmp_path}/{target}")])


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
                    check_unused(str(path))
            else:
                check_unused(str(path))
        check_unused(str(path))


class TestDone:
    """A receipt is of one file, and of one restore."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        path = tmp_path / "disk"
        path.write_bytes(b"content")
        return path

    @pytest.fixture
    def overlay(self, repository: Repository, tmp_path: Path) -> Path:
        path = tmp_path / "disk"
        image = repository.set_image_path(MANIFEST, IMAGE)
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", image, "-F", "qcow2", path, "1M")
        return path

    def note(self, repository: Repository, path: Path, method: RestoreMethod) -> None:
        done = disk_restore(path, method)
        write(done.receipt, asdict(make_receipt(repository, done, path.stat())))

    def test_the_same_again(self, repository: Repository, target: Path) -> None:
        self.note(repository, target, RestoreMethod.COPY)
        assert is_restored(repository, disk_restore(target))
        others = (
            disk_restore(target, RestoreMethod.OVERLAY),
            disk_restore(target, format="raw"),
            disk_restore(target, name="vdb"),
            disk_restore(target, chain=((replace(MANIFEST, id="s2"), IMAGE),)),
            disk_restore(target, chain=((replace(MANIFEST, attempt="a2"), IMAGE),)),
        )
        assert not any(is_restored(repository, other) for other in others)
        assert not is_restored(replace(repository, uuid="another"), disk_restore(target))

    @pytest.mark.parametrize(("method", "stays"), [(RestoreMethod.COPY, False), (RestoreMethod.OVERLAY, True)])
    def test_what_was_touched_is_another_unless_it_is_there_to_be_written_to(
        self, repository: Repository, overlay: Path, method: RestoreMethod, stays: bool
    ) -> None:
        self.note(repository, overlay, method)
        assert is_restored(repository, disk_restore(overlay, method))
        with overlay.open("ab") as file:
            file.write(b"written to since then")
        assert is_restored(repository, disk_restore(overlay, method)) == stays

    def test_another_file_in_its_place(self, repository: Repository, overlay: Path) -> None:
        self.note(repository, overlay, RestoreMethod.OVERLAY)
        status = overlay.stat()
        other = overlay.with_name("other")
        other.write_bytes(overlay.read_bytes())
        os.utime(other, ns=(status.st_mtime_ns, status.st_mtime_ns))
        other.replace(overlay)
        assert not is_restored(repository, disk_restore(overlay, RestoreMethod.OVERLAY))

    def test_another_image_with_its_inode(self, repository: Repository, overlay: Path) -> None:
        self.note(repository, overlay, RestoreMethod.OVERLAY)
        other = overlay.with_name("other")
        qemu_img("create", "-q", "-f", "qcow2", other, "1M")
        # By now it is a disk of its own.
        overlay.write_bytes(other.read_bytes())
        assert is_restored(repository, disk_restore(overlay, RestoreMethod.OVERLAY))
        for content in (overlay.read_bytes().replace(b"QFI", b"QFX", 1), b""):
            overlay.write_bytes(content)
            assert not is_restored(repository, disk_restore(overlay, RestoreMethod.OVERLAY))

    def test_no_receipt_no_file_half_a_receipt(self, repository: Repository, target: Path) -> None:
        self.note(repository, target, RestoreMethod.COPY)
        receipt = target.with_name("disk.restored.json")
        text = receipt.read_text()
        target.rename(target.with_name("away"))
        assert not is_restored(repository, disk_restore(target))
        target.with_name("away").rename(target)
        assert is_restored(repository, disk_restore(target))
        receipt.write_text(text[:50])
        assert not is_restored(repository, disk_restore(target))
        receipt.unlink()
        assert not is_restored(repository, disk_restore(target))
