# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A worker killed wherever it touches the world, or who leaves the sets to it, or QEMU with it: the next run has them.

It is played on the scenes of test_backup_set_crash, and comes to the points that are listed there, beside its own. The
next run leaves the set to a worker again, or makes it without. VMFLEET_CRASHES=all is for every hit of every name.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import WorkerPlace
from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.matrix import WHOLE, assert_listed, deal, dice
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.workers import end_worker
from ansible_collections.vmfleet.backup.tests.integration.test_backup_set_crash import (
    LEFT,
    NAME,
    POINTS,
    QEMU,
    SCENES,
    Scene,
    Stage,
)

if t.TYPE_CHECKING:
    import random

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.integration.test_backup_set_crash import Clean, Start

    Set = t.Callable[[str, random.Random], "WorkerStage"]

pytestmark = pytest.mark.usefixtures("clean")

# Nobody leaves it to a worker to end a set.
NAMES = [name for name in SCENES if name not in ("cancelled", "untracked")]
OWN = {
    "leave > take place > open lock: mkdir",
    "leave > take place > open lock: create",
    "leave > take place: truncate",
    "leave: remove",
    "leave: fork",
    "leave: pwrite",
    "leave: create",
    "tell: create",
    "tell: rename",
}
HANDS = {name: 1 + len(POINTS[name] | OWN) // 20 for name in NAMES}
DEALT = [(name, hand) for name in NAMES for hand in range(HANDS[name])]


class WorkerStage(Stage):
    """Plays a scene again and again: without a crash, and with one of the worker."""

    def __init__(self, scene: Scene, chance: random.Random, directory: Path, start: Start, clean: Clean) -> None:
        super().__init__(scene, chance, directory, start, clean)
        self.place = WorkerPlace.of(str(scene.sets.path))
        self._left: dict[Path, bytes] = {}
        """What a worker that has ended well leaves, by the files that it is in."""

    def _run(self, call: dict[str, t.Any], at: int | crash.Point, victims: t.Sequence[int]) -> None:
        for path, content in self._left.items():
            path.write_bytes(content)
        process = self._start("backup_set", {**call, **LEFT}, crash_at=at, victims=victims, record=self._record)
        process.wait()
        # Where but the module is dead, the worker goes on.
        wait_until(lambda: not self.place.is_held(), "the end of the worker")
        if victims:
            # Nobody takes a dead one for alive, nor what the one before has made for what this one has.
            assert self._follow() == {"running": False}
        if not process.killed:
            self._assert_true(process.result())
        if not victims:
            self._left = {Path(path): Path(path).read_bytes() for path in (self.place.lock, self.place.result)}
        self.scene.detached = self._chance.random() < 0.5

    def _assert_true(self, told: dict[str, t.Any]) -> None:
        """What is told of a set is of the one that was wanted, and that is there if it says so."""
        there = (self.scene.sets.directory(NAME) / self.scene.id).is_dir()
        for vm in told.get("vms", []):
            assert vm["id"] == self.scene.id, vm
            assert there or vm["state"] != "published", vm

    def _recovered(self) -> None:
        """The next worker has left nothing but what it has said; what a dead one has left stays until then."""
        assert not self.place.is_held()
        if self.scene.detached:
            of_it = Path(self.place.lock).parent.glob(f"{Path(self.place.lock).stem}.*")
            assert {str(path) for path in of_it} <= {*self.place} - {self.place.stop}
            who = self.place.who()
            assert who
            assert [vm["state"] for vm in self._follow(who.key)["vms"]] == ["published"]

    def _follow(self, *key: str) -> dict[str, t.Any]:
        which = {"worker": key[0]} if key else {}
        found = succeed("backup_follow", {"repository": str(self.scene.sets.path), **which})
        return {name: found[name] for name in ("running", "vms") if name in found}


@pytest.fixture
def stage(vms: Vms, directory: Path, start_module: Start, clean: Clean) -> t.Iterator[Set]:
    """Sets up the scene of a name."""
    stages: list[WorkerStage] = []

    def set_up(name: str, chance: random.Random) -> WorkerStage:
        stages.append(WorkerStage(SCENES[name](vms, directory, chance), chance, directory, start_module, clean))
        return stages[-1]

    yield set_up
    for each in stages:
        end_worker(each.scene.sets.path)
        for path in (*each.place, f"{each.place.progress}.new"):
            Path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_its_place(stage: Set, name: str) -> None:
    assert_listed(stage(name, dice()).rehearse(), POINTS[name] | OWN, f"POINTS[{name!r}], or OWN of {__name__}")


@pytest.mark.parametrize(("name", "hand"), DEALT)
def test_worker_killed(stage: Set, name: str, hand: int) -> None:
    chance = dice()
    play = stage(name, chance)
    for point in deal(play.rehearse(), chance, hand, HANDS[name], share=0.25):
        play.strike(point, chance.choice((crash.WORKER, crash.ASKER)))


@pytest.mark.parametrize("name", NAMES)
def test_killed_where_it_begins(stage: Set, name: str) -> None:
    chance = dice()
    play = stage(name, chance)
    own = [point for point in play.rehearse() if point.name in OWN]
    told = deal((point for point in own if point.name.startswith("tell")), chance, 0, 1)
    for point in (*(point for point in own if point.name.startswith("leave")), *told):
        play.strike(point, crash.ASKER)


@pytest.mark.parametrize(("name", "hand"), DEALT if WHOLE else [(name, 0) for name in NAMES])
def test_qemu_killed_with_it(stage: Set, name: str, hand: int) -> None:
    chance = dice()
    play = stage(name, chance)
    for point in deal(play.rehearse(), chance, hand, HANDS[name] if WHOLE else 1, share=0.1):
        play.strike(point, QEMU, crash.WORKER)
