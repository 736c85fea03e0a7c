# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set, its storage daemon, or both killed while they back up a VM that is off: the next run has what was wanted.

It is struck where the module touches the world otherwise than for a VM that is on. Each run takes half of these points,
and one hit of each; VMFLEET_CRASHES=all is for every hit of all.
"""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.matrix import deal, dice
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.offline import NAME, OffHistory

if t.TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")

HANDS = 2
DISKS = {"drive0": "incremental", "drive1": "incremental"}
OFF = ("add bitmap", "start daemon", "open disks", "update intent", "start:", "end daemon", "remove stored bitmaps")
"""The steps that are taken only for a VM that is off, and those between them."""
BORN, GONE = "open disks: blockdev-add", "end daemon: quit"
"""Between these the storage daemon lives."""


class Stage:
    """Makes one set after the other, of a disk that has changed and one that has not, with a crash in between."""

    def __init__(self, off: OffHistory, record: Path, start: Callable[..., ModuleProcess]) -> None:
        self._off = off
        self._record = record
        self._start = start
        self._number = 0
        off.make("full")

    def play(self, at: crash.Point | None = None, victims: Sequence[int | Path] = ()) -> list[crash.Point]:
        """Make the next set, with the victims killed at a point; returns the points that were hit before that."""
        off = self._off
        self._number += 1
        set_id = f"s{self._number}"
        off.write(self._number % 255 + 1, self._number % 64 * 65536, 65536)
        off.freeze(set_id)
        plan = off.plan(set_id, max_chain=1000)
        self._record.unlink(missing_ok=True)
        process = self._start("backup_set", {"plan": plan}, crash_at=at or 0, victims=victims, record=self._record)
        process.wait()
        if at:
            print(at, victims)
            assert process.killed == (crash.MODULE in victims)
            # A run that has failed does not try again: this is another one.
            [vm] = succeed("backup_set", {"plan": off.plan(set_id, max_chain=1000)})["vms"]
            assert vm["state"] in ("published", "skipped"), vm
        # No change is lost, and so there is no reason for a full image.
        assert off.note(set_id) == DISKS
        off.assert_released(set_id)
        off.sets.assert_good(NAME, off.copies(set_id), set_id, DISKS)
        return crash.read(self._record)


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed(off: OffHistory, directory: Path, start_module: Callable[..., ModuleProcess], hand: int) -> None:
    chance = dice()
    stage = Stage(off, directory / "points", start_module)
    points = stage.play()
    assert not [step for step in OFF if all(step not in point.name for point in points)]
    names = [point.name for point in points]
    alive = points[names.index(BORN) : names.index(GONE) + 1]
    daemon = off.daemon.place / "pid"
    for point in deal([point for point in points if point.name.startswith(OFF)], chance, hand, HANDS, 0.5):
        victims = [(crash.MODULE,), (daemon,), (daemon, crash.MODULE)] if point in alive else [(crash.MODULE,)]
        stage.play(point, chance.choice(victims))
    off.vm.start()
    off.write(0xA1, 7 * MIB, 65536)
    assert off.make("on")["level"] == "incremental"
