# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_prune, killed at every step."""

from __future__ import annotations

import shutil
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.killing import HANDS, steps
from ansible_collections.vmfleet.backup.tests.harness.library import LOCKS, NAME, Chain, Library, restored_to
from ansible_collections.vmfleet.backup.tests.harness.matrix import assert_listed, deal, dice, document
from ansible_collections.vmfleet.backup.tests.harness.pruning import assert_whole, two_chains

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

    Start = t.Callable[..., ModuleProcess]

pytestmark = pytest.mark.usefixtures("clean")

# The points of a prune that makes full images, by what is done there.
POINTS = {
    "look: fork",
    "lock: mkdir",
    "lock: create",
    "consolidate: create",
    "consolidate > run: qemu-img convert",
    "consolidate > flush: truncate",
    "consolidate > flush: fsync",
    "consolidate: chmod",
    "consolidate > lock: mkdir",
    "consolidate > lock: create",
    *document("consolidate > write note"),
    "consolidate: rename",
    "consolidate > sync directory: fsync",
    *document("consolidate > rewrite manifest"),
    "consolidate > remove note > remove: remove",
    "consolidate > remove note > sync directory: fsync",
    "remove set: rename",
    "remove set > sync directory: fsync",
    "remove set > remove directory > remove: remove",
    "remove set > remove directory: rmdir",
    "remove annotations > sync directory: fsync",
}


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with two_chains() as chain:
        yield chain


def assert_usable(chain: Chain, library: Library, where: Path, *needed: str) -> None:
    """Whatever has happened: what is listed is what it was, and these sets are."""
    found = library.info()
    listed = [one["id"] for one in found["sets"]]
    assert {*needed} <= {*listed}
    assert [one["broken"] for one in found["sets"]] == [""] * len(listed)
    for set_id in listed:
        for disk, image in library.images(NAME, set_id).items():
            assert identical(chain.copies(set_id)[disk], image), f"{disk} of {set_id}"
    # By the module and with all checksums, whichever image it is by now.
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    library.restore(id=needed[0], directory=str(where))
    chain.assert_restored(needed[0], restored_to(where))


class TestKilled:
    """At every step: what is listed can be restored, and the next run needs no help."""

    def strike(
        self,
        template: Chain,
        directory: Path,
        start: Start,
        at: int | crash.Point,
        expected: tuple[str, ...],
        **options: t.Any,
    ) -> bool:
        """Kill it there, and let the next one come to the end; returns whether it came so far."""
        chain = template.copied(directory)
        library = chain.library
        process = start("backup_prune", {"repository": str(library.path), **options}, crash_at=at)
        process.wait()
        # The oldest is the one that may be in the middle of becoming full.
        assert_usable(chain, library, directory / "restored", *reversed(expected))
        library.prune(**options)
        assert_whole(chain, library, *expected)
        assert not library.prune(**options)["changed"]
        shutil.rmtree(library.path)
        return process.killed

    @pytest.mark.parametrize("hand", range(HANDS))
    def test_removal(self, template: Chain, directory: Path, start_module: Start, hand: int) -> None:
        for step in steps(hand, 3):
            if not self.strike(template, directory, start_module, step, ("s5", "s4"), keep_last=2):
                assert step > 30
                return

    @pytest.mark.parametrize("hand", range(HANDS))
    def test_consolidation(self, template: Chain, directory: Path, start_module: Start, hand: int) -> None:
        expected = ("s5", "s4", "s3")
        options: dict[str, t.Any] = {"keep_last": 3, "consolidate": True}
        library, record = template.copied(directory).library, directory / "points"
        start_module("backup_prune", {"repository": str(library.path), **options}, record=record).result()
        shutil.rmtree(library.path)
        # Only on a busy machine a prune takes so long that the file system is asked once more.
        points = [point for point in crash.read(record) if point.name != "watch: fork"]
        assert_listed(points, POINTS, f"POINTS of {__name__.rpartition('.')[2]}.py")
        for point in deal(points, dice(), hand, HANDS, share=0.25):
            print(point)
            assert self.strike(template, directory, start_module, point, expected, **options)

    def test_forgetting(self, template: Chain, directory: Path, start_module: Start) -> None:
        options: dict[str, t.Any] = {"names": [NAME], "forget": True}
        for step in steps(0, 5):
            library = template.copied(directory).library
            process = start_module("backup_prune", {"repository": str(library.path), **options}, crash_at=step)
            process.wait()
            library.prune(**options)
            assert {path.name for path in (library.path / NAME).iterdir()} == set(LOCKS)
            if not process.killed:
                return
            shutil.rmtree(library.path)
