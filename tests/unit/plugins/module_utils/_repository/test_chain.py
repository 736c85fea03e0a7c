# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What sets say of the chains they stand in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.chain import (
    bitmaps_to_keep,
    lost_parent,
    set_level,
    walk,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level, Manifest, Parent
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import intent
from ansible_collections.vmfleet.backup.tests.unit.plugins.chains import S1, S2, S3, image, manifest, parent


class TestWalk:
    """From an image down to the full one."""

    def test_to_the_full(self) -> None:
        steps, broken = walk([S1, S2, S3], S3, "vda")
        assert [found.id for found, _image in steps] == ["s3", "s2", "s1"]
        assert broken == ""
        assert walk([S1, S2, S3], S1, "vda") == ([(S1, S1.disks[0])], "")

    def test_a_full_in_between_ends_it(self) -> None:
        fresh = manifest("s2", 2, image("s2"))
        assert len(walk([S1, fresh, S3], S3, "vda")[0]) == 2

    def test_no_such_disk(self) -> None:
        assert walk([S1], S1, "vdb") == ([], "set s1 has no disk vdb")

    def test_one_is_gone(self) -> None:
        steps, broken = walk([S1, S3], S3, "vda")
        assert len(steps) == 1
        assert "set s2, which s3 builds on, is gone" in broken

    @pytest.mark.parametrize(
        "other",
        [
            replace(S1, attempt="a-other"),
            # However right it looks: an image is older than what builds on it.
            replace(S1, sequence=2),
            replace(S1, sequence=7),
        ],
    )
    def test_another_set_of_that_id(self, other: Manifest) -> None:
        assert walk([other, S2], S2, "vda")[1] == "set s1 is not the one that s2 builds on"

    def test_an_older_manifest_tells_by_checksum(self) -> None:
        old = manifest("s2", 2, image("s2", Parent("s1", "sum-s1")))
        assert walk([S1, old], old, "vda")[1] == ""
        other = manifest("s1", 1, image("s1", sha256="another"))
        assert "not the one" in walk([other, old], old, "vda")[1]

    def test_a_ring_has_an_end(self) -> None:
        one = manifest("s1", 1, image("s1", parent("s2")))
        assert "not the one" in walk([one, S2], S2, "vda")[1]
        itself = manifest("s1", 1, image("s1", parent("s1")))
        assert "not the one" in walk([itself], itself, "vda")[1]


class TestLostParent:
    """What a set that is being made builds on may go meanwhile."""

    def test_all_is_there(self) -> None:
        assert lost_parent(intent("s3", image("s3", parent("s2"))), [S1, S2]) == ""
        assert lost_parent(intent("s3", image("s3")), []) == ""

    @pytest.mark.parametrize("sets", [[], [S1], [S2], [S1, replace(S2, attempt="a-other")]])
    def test_one_is_gone(self, sets: list[Manifest]) -> None:
        said = lost_parent(intent("s3", image("s3", name="vdb"), image("s3", parent("s2"))), sets)
        assert said == "set s2, which the increment of disk vda builds on, was removed while it was made"


@pytest.mark.parametrize(
    ("levels", "level"),
    [
        ((Level.FULL, Level.FULL), Level.FULL),
        ((Level.FULL, Level.INCREMENTAL), Level.INCREMENTAL),
        ((Level.DIFFERENTIAL, Level.FULL), Level.DIFFERENTIAL),
        ((Level.DIFFERENTIAL, Level.INCREMENTAL), Level.INCREMENTAL),
        ((), Level.FULL),
    ],
)
def test_a_sets_level(levels: tuple[str, ...], level: str) -> None:
    assert set_level(levels) == level


def test_the_bitmaps_that_the_next_set_may_need() -> None:
    assert bitmaps_to_keep([], differential=True) == frozenset()
    assert bitmaps_to_keep([S1, S2, S3], differential=False) == {"b-s3"}
    assert bitmaps_to_keep([S1, S2, S3], differential=True) == {"b-s1", "b-s3"}
    assert bitmaps_to_keep([S1], differential=True) == {"b-s1"}
    untracked = manifest("s4", 4, image("s4", bitmap=None))
    assert bitmaps_to_keep([S1, untracked], differential=True) == frozenset()
    # Of each disk the newest full; what is in the newest set no more needs nothing.
    both = manifest("s4", 4, image("s4", parent("s3")), image("s4", name="vdb"))
    later = manifest("s5", 5, image("s5", parent("s4"), name="vdb"))
    assert bitmaps_to_keep([S1, S2, S3, both], differential=True) == {"b-s1", "b-s4", "b-s4-vdb"}
    assert bitmaps_to_keep([S1, S2, S3, both, later], differential=True) == {"b-s4-vdb", "b-s5-vdb"}
    # The newest set was made without a disk that the VM has.
    sets = [S1, S2, S3, both, later]
    assert bitmaps_to_keep(sets, True, [both.disks[0].names]) == {"b-s1", "b-s4-vdb", "b-s5-vdb"}


DEVICE = {"qdev": "/machine/peripheral/virtio-disk0/virtio-backend"}


class TestNames:
    """A disk that is called otherwise in some sets, as its VM was reached in another way."""

    old = manifest("s1", 1, image("s1", name="virtio-disk0", **DEVICE))
    new = manifest("s2", 2, image("s2", replace(parent("s1"), disk="virtio-disk0"), **DEVICE))

    def test_a_walk_through_both(self) -> None:
        steps, broken = walk([self.old, self.new], self.new, "vda")
        assert ([found.name for _manifest, found in steps], broken) == (["vda", "virtio-disk0"], "")

    def test_the_name_in_the_set_below_is_that_which_counts(self) -> None:
        """Another disk may have come to have the name."""
        other = manifest("s1", 1, image("s1", name="virtio-disk0"), image("s1"))
        steps, _broken = walk([other, self.new], self.new, "vda")
        assert [found.name for _manifest, found in steps] == ["vda", "virtio-disk0"]

    def test_bitmaps_of_the_full_under_its_other_name(self) -> None:
        assert bitmaps_to_keep([self.old, self.new], differential=True) == {"b-s1-virtio-disk0", "b-s2"}

    def test_what_a_growing_set_builds_on(self) -> None:
        growing = intent("s2", image("s2", replace(parent("s1"), disk="virtio-disk0"), **DEVICE))
        assert lost_parent(growing, [self.old]) == ""
        assert "the increment of disk vda builds on, was removed" in lost_parent(growing, [S1])

    def test_which_image_is_meant(self) -> None:
        names = ("vda", "virtio-disk0")
        assert self.old.find(names) is self.old.disks[0]
        assert self.new.find(("virtio-disk0",)) is self.new.disks[0]
        # Its own name counts more than that of a device.
        swapped = manifest("s1", 1, image("s1", name="virtio-disk0"), image("s1", **DEVICE))
        assert swapped.find(("virtio-disk0",)) is swapped.disks[0]
        assert swapped.find(names) is swapped.disks[1]
        # Where two may be meant, none is.
        twins = manifest("s1", 1, image("s1", name="a", **DEVICE), image("s1", name="b", **DEVICE))
        assert twins.find(names) is None
        assert S1.find(()) is None
        assert S1.find(("vdb", "virtio-disk1")) is None
