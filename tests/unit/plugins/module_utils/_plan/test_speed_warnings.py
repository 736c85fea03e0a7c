# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which full copies a limit of speed makes long for nothing."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import ChainLink
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.speed_warnings import speed_warnings
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk

GIB = 1 << 30
TIB = 1 << 40


def test_a_thin_disk_takes_long() -> None:
    thin, full = disk("vda", virtual_size=4 * TIB), ChainLink(Level.FULL, "")
    [said] = speed_warnings([thin], [full], {"vda": 3 * GIB}, 100 << 20)
    assert said == (
        "disk vda of 4.0 TiB takes 11.7 h to copy at 100.0 MiB per second (speed), though about 3.0 GiB are written:"
        " QEMU counts holes like data. Give a higher speed for full copies"
    )


@pytest.mark.parametrize(
    ("level", "size", "holds", "speed"),
    [
        (Level.FULL, 4 * TIB, 3 * GIB, 0),
        (Level.INCREMENTAL, 4 * TIB, 3 * GIB, 100 << 20),
        (Level.FULL, 4 * TIB, 2 * TIB, 100 << 20),
        (Level.FULL, 100 * GIB, 0, 100 << 20),
    ],
    ids=["no limit", "an increment", "half full", "not for long"],
)
def test_others_do_not(level: Level, size: int, holds: int, speed: int) -> None:
    assert list(speed_warnings([disk("vda", virtual_size=size)], [ChainLink(level, "")], {"vda": holds}, speed)) == []
