# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore with state=absent where other files stand now at the places of overlays."""

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import create, identical, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, SIZE, Chain, restored_to
from ansible_collections.vmfleet.backup.tests.harness.modules import fail
from ansible_collections.vmfleet.backup.tests.harness.restoring import pins

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.library import Library

pytestmark = pytest.mark.usefixtures("clean")


class Overlays:
    """Two overlays on s2, of which drive0's is replaced."""

    def __init__(self, library: Library, where: Path) -> None:
        self.library, self.where = library, where
        self.path, self.other = restored_to(where).values()
        self.given: dict[str, t.Any] = {"state": "absent", "directory": str(where)}
        library.restore(id="s2", method="overlay", directory=str(where))
        self.inode = self.path.stat().st_ino

    def moved(self) -> Path:
        """Give the overlay another name."""
        return self.path.rename(self.where / "kept.qcow2")

    def based_elsewhere(self, path: Path) -> None:
        """Make an image that builds on one of somebody's own."""
        base = create(self.where / "golden.qcow2", SIZE)
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
        write(path, "write -P 7 0 1M")

    def state(self) -> tuple[int, ...]:
        """What shows that a file is another one, or was written to."""
        found = os.lstat(self.path)
        return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns

    def assert_left(self) -> None:
        """What stands at the path of the overlay stays, and so does its pin; the other overlay goes."""
        before = self.state()
        for check in (True, False):
            said = fail("backup_restore", self.library.restoration(**self.given), check=check)
            assert said["removed"] == [str(self.other)]
            assert said["msg"].startswith(
                f"target: {self.path} is another file than the overlay of set s2 that was made there, so it stays"
            )
            assert self.other.exists() == check
        assert self.state() == before
        assert [(pin["id"], pin["path"]) for pin in pins(self.library)] == [("s2", str(self.path))]


@pytest.fixture
def overlays(chain: Chain, where: Path) -> Overlays:
    return Overlays(chain.library, where)


class TestFilesOfOthers:
    """A file that somebody has put where an overlay was."""

    def test_one_that_builds_on_another_image(self, overlays: Overlays, chain: Chain) -> None:
        kept = overlays.moved()
        overlays.based_elsewhere(overlays.path)
        overlays.assert_left()
        # It does what the message says.
        overlays.path.unlink()
        kept.rename(overlays.path)
        chain.assert_restored("s2", {"drive0": overlays.path})
        assert overlays.library.restore(**overlays.given)["removed"] == [str(overlays.path)]
        assert pins(overlays.library) == []

    def test_one_that_builds_on_another_image_and_has_the_inode(self, overlays: Overlays) -> None:
        """As a new file often gets that of one that was removed."""
        mine = overlays.where / "mine.qcow2"
        overlays.based_elsewhere(mine)
        overlays.path.write_bytes(mine.read_bytes())
        assert overlays.path.stat().st_ino == overlays.inode
        overlays.assert_left()

    @pytest.mark.parametrize("fmt", ["raw", "qcow2"])
    def test_one_that_builds_on_nothing(self, overlays: Overlays, fmt: str) -> None:
        overlays.moved()
        create(overlays.path, SIZE, fmt)
        overlays.assert_left()

    def test_a_link_to_the_overlay(self, overlays: Overlays) -> None:
        overlays.path.symlink_to(overlays.moved())
        overlays.assert_left()

    def test_a_directory(self, overlays: Overlays) -> None:
        overlays.moved()
        overlays.path.mkdir()
        overlays.assert_left()

    def test_its_notes_are_removed_by_hand(self, overlays: Overlays) -> None:
        overlays.path.unlink()
        overlays.based_elsewhere(overlays.path)
        # Its inode may be that of the overlay.
        notes = overlays.library.fail_restore(**overlays.given).rpartition("remove ")[2].split(" and ")
        for note in notes:
            os.unlink(note)
        assert pins(overlays.library) == []
        assert not overlays.library.restore(**overlays.given)["changed"]
        assert overlays.path.exists()


class TestOverlaysThatWereWritten:
    """What tools have made of an overlay is that overlay as long as it builds on the set."""

    def test_a_copy_that_has_taken_its_name(self, overlays: Overlays) -> None:
        copy = overlays.where / "copy.qcow2"
        image = overlays.library.images(NAME, "s2")["drive0"]
        write(overlays.path, "write -P 9 1M 64k")
        qemu_img("convert", "-O", "qcow2", "-B", image, "-F", "qcow2", overlays.path, copy)
        copy.replace(overlays.path)
        assert overlays.path.stat().st_ino != overlays.inode
        assert overlays.library.restore(**overlays.given)["removed"] == [str(overlays.path), str(overlays.other)]
        assert pins(overlays.library) == []

    def test_its_repository_has_another_path(self, overlays: Overlays) -> None:
        library = overlays.library
        moved = library.path.rename(library.path.with_name("moved"))
        said = type(library)(moved).restore(**overlays.given)
        assert said["removed"] == [str(overlays.path), str(overlays.other)]

    def test_one_that_was_made_independent_in_place(self, overlays: Overlays, chain: Chain) -> None:
        qemu_img("rebase", "-f", "qcow2", "-b", "", overlays.path)
        said = overlays.library.restore(**overlays.given)
        assert (said["removed"], said["independent"]) == ([str(overlays.other)], [str(overlays.path)])
        assert identical(chain.copies("s2")["drive0"], overlays.path)
        assert pins(overlays.library) == []
