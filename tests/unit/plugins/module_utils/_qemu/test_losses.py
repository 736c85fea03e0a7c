# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said of a copy before it is made."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.losses import lost_in_copy
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import IN_THE_CLEAR
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk

NOT_COPIED = "not copied: its copy is the disk as it is now"


def test_nothing_is_lost_of_a_plain_disk() -> None:
    assert lost_in_copy([disk()], [disk(), disk("drive1", "n1")]) == ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"encrypted": True}, f"disk drive0 {IN_THE_CLEAR}"),
        ({"data_file": "/d"}, "disk drive0 has its data in another file (/d); its copy is one image"),
        (
            {"snapshots": 1},
            "disk drive0 has 1 internal snapshot, which is not copied: its copy is the disk as it is now",
        ),
        (
            {"snapshots": 2},
            "disk drive0 has 2 internal snapshots, which are not copied: its copy is the disk as it is now",
        ),
    ],
)
def test_what_is_lost_of_one(values: dict[str, object], said: str) -> None:
    one = disk(**values)
    assert lost_in_copy([one], [one]) == (said,)


def test_all_that_is_lost_is_said() -> None:
    one = disk(encrypted=True, snapshots=1)
    assert len(lost_in_copy([one], [one])) == 2


class TestOneFile:
    def test_two_disks_on_it_are_told_once(self) -> None:
        one, two = disk(file="/f"), disk("drive1", "n1", file="/x/../f")
        (said,) = lost_in_copy([one, two], [one, two])
        assert said.startswith("disks drive0 and drive1 are on one file (/f): a write through one of them")
        assert lost_in_copy([one], [one, two]) == (said,)

    def test_which_only_one_of_them_writes(self) -> None:
        one, two = disk(file="/f", read_only=True), disk("drive1", "n1", file="/f")
        assert len(lost_in_copy([one], [one, two])) == 1

    def test_which_none_of_them_writes(self) -> None:
        one, two = disk(file="/f", read_only=True), disk("drive1", "n1", file="/f", read_only=True)
        assert lost_in_copy([one, two], [one, two]) == ()
