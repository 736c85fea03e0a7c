# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set killed wherever it touches the world, its QEMU likewise, or both: the next run has what was wanted.

Every such place has a name (see harness/crash.py) in POINTS below. Each run of these tests kills the module at all
names, at one of the hits of each, and QEMU, or both, at some; VMFLEET_CRASHES=all is for every hit of every name.
"""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
from ansible_collections.vmfleet.backup.tests.harness.matrix import WHOLE, assert_listed, deal, dice, document
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import ScriptedAgent

if t.TYPE_CHECKING:
    import random
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

    Start = t.Callable[..., ModuleProcess]
    Clean = t.Callable[[], None]

pytestmark = pytest.mark.usefixtures("clean")

NAME = "web01"
LEFT = {"state": "started", "detach": "required", "slice": PATIENCE}
"""How a set is left to a worker, and waited for."""

# The points, by what is done there, and in what runs that is done.
LOOK = {"look: fork"}
SPACE = {
    "measure space > allocate: fallocate",
}
WATCH = {"watch: fork"}
LOCK = {
    "lock: mkdir",
    "lock: create",
    "open lock: mkdir",
    "open lock: create",
}
CREATE = {
    "create repository: mkdir",
    *document("create repository"),
    "create repository: link",
}
BEGIN = {
    "track space > allocate: fallocate",
    "begin: mkdir",
    *document("begin"),
    *document("write description"),
    "make file: create",
    "reserve > allocate: fallocate",
    *document("update intent"),
}
LAY_OUT = {"try holes: truncate"}
MAKE_IMAGE = {"make image > run: qemu-img create"}
START = {
    "start: pass a file",
    "start: add-fd",
    "start: transaction",
    "start: remove-fd",
}
FREEZE = {
    "rehearse: pass a file",
    "rehearse: add-fd",
    "rehearse: transaction",
    "rehearse: remove-fd",
    "start > hold guest: fork",
    "start > hold guest > freeze: guest-fsfreeze-freeze",
    "start > hold guest > thaw: guest-fsfreeze-thaw",
}
PUBLISH = {
    "flush: fsync",
    "flush: truncate",
    *document("write manifest"),
    "publish: chmod",
    "publish: rename",
    "publish > sync directory: fsync",
}
TIDY = {
    "dismiss jobs: job-dismiss",
    "tidy > remove: remove",
}
SURPLUS = {"remove bitmaps: transaction"}
STOP = {
    "cancel jobs: block-job-cancel",
    "dismiss jobs: job-dismiss",
    *SURPLUS,
}
DISCARD = {
    *document("record failure"),
    "discard > remove: remove",
    "discard: rmdir",
    "discard > sync directory: fsync",
}
POINTS: dict[str, set[str]] = {
    "full": LOOK | WATCH | CREATE | LOCK | BEGIN | LAY_OUT | START | PUBLISH | TIDY,
    "increment": LOOK | WATCH | LOCK | BEGIN | MAKE_IMAGE | START | PUBLISH | TIDY | SURPLUS,
    "quiesced": LOOK | WATCH | CREATE | LOCK | BEGIN | LAY_OUT | FREEZE | START | PUBLISH | TIDY,
    "published": LOOK | WATCH | LOCK | PUBLISH | TIDY,
    "tidied": LOOK | WATCH | LOCK | TIDY,
    "failed": LOOK | WATCH | LOCK | STOP | DISCARD,
    "dead": LOOK | WATCH | LOCK | DISCARD,
    "cancelled": LOOK | SPACE | LOCK | STOP | DISCARD,
    "untracked": LOOK | SPACE | LOCK | SURPLUS,
}


class Scene:
    """A VM of two disks with its repository, for one kind of run after the other: killed, and followed by one more."""

    options: t.ClassVar[dict[str, t.Any]] = {}

    def __init__(self, vms: Vms, directory: Path, chance: random.Random) -> None:
        self.sets = Sets(directory / "repository")
        self._chance = chance
        self._restarted = False
        self.same_run = False
        """Whether the next run is the same again, which does not try again what has failed for the VM."""
        self.detached = False
        """Whether the next run leaves the set to a worker."""
        self.vm = vms.start(vms.disk(0, size=8 * MIB), vms.disk(1, size=8 * MIB), name=NAME)
        self.copies = self._freeze(directory, "frozen")

    @property
    def id(self) -> str:
        """The set that is being made."""
        return ID

    def begin(self) -> dict[str, t.Any]:
        """Bring about what the run begins with; returns its arguments."""
        self._restarted = False
        self._call = self._prepare()
        return self._call

    def restart(self) -> None:
        """Start QEMU anew, dead or alive."""
        self.vm.kill()
        self.vm.restart()
        self._restarted = True

    def recover(self) -> None:
        """One more run has to be enough."""
        self._make(self._call if self.same_run else self._plan())
        self._assert_good()

    def _make(self, call: dict[str, t.Any]) -> None:
        made = succeed("backup_set", {**call, **(LEFT if self.detached else {})})
        assert [vm["state"] for vm in made["vms"]] == ["published"]

    def assert_listed_good(self) -> None:
        """If the set is listed, it is whole and has the right content, whatever has just been killed."""
        # Most runs do not come as far as that.
        if (self.sets.directory(NAME) / self.id).exists():
            listed = succeed("backup_info", {"repository": str(self.sets.path)})["sets"]
            if self.id in [found["id"] for found in listed]:
                self._assert_content(self.id)

    def forget(self) -> None:
        """Let the next run begin from nothing."""
        if self.sets.path.exists():
            shutil.rmtree(self.sets.path)
        for node, name in self._bitmaps():
            self.vm.qmp.execute("block-dirty-bitmap-remove", node=node, name=name)

    def _plan(self, **options: t.Any) -> dict[str, t.Any]:
        return {"plan": self.sets.plan(self.vm, **{**self.options, **options})["plan"]}

    def _prepare(self) -> dict[str, t.Any]:
        return self._plan()

    def _assert_good(self) -> None:
        self.sets.assert_good(NAME, {str(name): path for name, path in self.copies.items()})
        assert sorted(path.name for path in self.sets.path.iterdir()) == ["vmfleet.json", NAME]
        # One for each image of the set, if its QEMU has not ended since.
        assert set(self._bitmaps()) <= {(disk["node"], disk["bitmap"]) for disk in self.sets.manifest(NAME)["disks"]}

    def _assert_content(self, set_id: str) -> None:
        for name, image in self.sets.images(NAME, set_id).items():
            assert identical(self.copies[name], image)

    def _freeze(self, directory: Path, name: str) -> dict[str, Path]:
        return {disk.name: self.vm.freeze(disk, directory / f"{name}-{disk.name}.qcow2") for disk in self.vm.disks}

    def _bitmaps(self) -> list[tuple[str, str]]:
        return [(str(disk.node), name) for disk in self.vm.disks for name in self.vm.bitmaps(str(disk.node))]


class Full(Scene):
    """The first set, in a repository that is made for it."""


class Increment(Scene):
    """One set after the other, each on the one before."""

    options: t.ClassVar[dict[str, t.Any]] = {"max_chain": 1000}

    def __init__(self, vms: Vms, directory: Path, chance: random.Random) -> None:
        super().__init__(vms, directory, chance)
        self._directory = directory
        self._number = 0
        self._history = {"full": self.copies}
        self.sets.back_up(self.vm, id="full")

    @property
    def id(self) -> str:
        return f"s{self._number}"

    def _prepare(self) -> dict[str, t.Any]:
        self._number += 1
        for disk in self.vm.disks:
            self.vm.write(disk.name, self._number % 255 + 1, self._number % 64 * 65536, 100 * 1024)
        self._history[self.id] = self._freeze(self._directory, f"frozen-{self.id}")
        return self._plan(id=self.id)

    def recover(self) -> None:
        self._make(self._plan(id=self.id))
        levels = self.sets.levels(NAME, self.id)
        self.sets.assert_good(NAME, self._history[self.id], self.id, levels)
        records = [(disk["node"], disk["bitmap"]) for disk in self.sets.manifest(NAME, self.id)["disks"]]
        if self._restarted:
            assert set(self._bitmaps()) <= set(records)
        else:
            # No change has been lost, and so there was no reason for a full image, nor will there be one.
            assert set(levels.values()) == {"incremental"}
            assert self._bitmaps() == records

    def forget(self) -> None:
        """The chain goes on, and what it builds on is what it was."""
        self._assert_content(self._chance.choice(list(self._history)))
        if not self._bitmaps():
            # The bitmaps of a set that was there already have died with their QEMU: the next one can build on nothing.
            succeed("backup_set", self._prepare())

    def _assert_content(self, set_id: str) -> None:
        for name, image in self.sets.images(NAME, set_id).items():
            assert identical(self._history[set_id][name], image)


class Quiesced(Scene):
    """A set of a guest whose file systems have to be frozen for it."""

    def __init__(self, vms: Vms, directory: Path, chance: random.Random) -> None:
        super().__init__(vms, directory, chance)
        self._begin_guest()

    def _begin_guest(self) -> None:
        path = self.vm.directory / "agent"
        path.unlink(missing_ok=True)
        self._agent = ScriptedAgent(path).__enter__()
        threading.Thread(target=self._end_guest, args=(self._agent, os.pidfd_open(self.vm.pid)), daemon=True).start()

    def _end_guest(self, agent: ScriptedAgent, qemu: int) -> None:
        """A guest ends with its QEMU."""
        select.select([qemu], [], [])
        os.close(qemu)
        agent.close()

    def restart(self) -> None:
        super().restart()
        self._begin_guest()

    def _plan(self, **options: t.Any) -> dict[str, t.Any]:
        vm = {"monitor": str(self.vm.monitor), "agent": self._agent.path, "quiesce": "require"}
        return {"plan": self.sets.plan(vms=[vm], **options)["plan"]}

    def recover(self) -> None:
        super().recover()
        assert self.sets.manifest(NAME)["consistency"] == "filesystem"
        wait_until(lambda: self._agent.idle, "the end of the guard")
        assert not self._agent.frozen


class Published(Scene):
    """Jobs that have copied everything, whose set is to be published."""

    def _prepare(self) -> dict[str, t.Any]:
        plan = self.sets.start(self.vm)
        release(self.vm)
        wait_until(lambda: all(job["status"] == "concluded" for job in self.vm.block_jobs), "the end of the jobs")
        return {"plan": plan}


class Tidied(Scene):
    """A set that was published by a process which was killed at that very moment."""

    def _prepare(self) -> dict[str, t.Any]:
        call = self._plan()
        point = crash.Point("publish > sync directory: fsync")
        process = ModuleProcess("backup_set", call, crash_at=point)
        process.wait()
        assert process.killed
        return call


class Failed(Scene):
    """A set of which one job has failed."""

    def _prepare(self) -> dict[str, t.Any]:
        plan = self.sets.start(self.vm)
        job = self.vm.block_jobs[0]["device"]
        self.vm.qmp.execute("block-job-cancel", device=job, force=True)
        wait_until(lambda: self._status(job) == "concluded", "the end of the job")
        return {"plan": plan}

    def _status(self, job: str) -> str:
        return next(str(found["status"]) for found in self.vm.qmp.execute("query-jobs") if found["id"] == job)

    def recover(self) -> None:
        self.same_run = False
        super().recover()


class Dead(Scene):
    """A set that was being made by a QEMU that is dead; its VM runs anew."""

    def _prepare(self) -> dict[str, t.Any]:
        plan = self.sets.start(self.vm)
        self.restart()
        return {"plan": plan}

    def recover(self) -> None:
        self.same_run = False
        super().recover()


class Cancelled(Scene):
    """A set that is not wanted any more."""

    def _prepare(self) -> dict[str, t.Any]:
        self.sets.start(self.vm)
        return {"repository": str(self.sets.path), "names": [NAME], "state": "cancelled"}

    def recover(self) -> None:
        succeed("backup_set", self._call)
        self.sets.assert_absent(NAME)
        assert not self._bitmaps()


class Untracked(Scene):
    """A VM of which no changes are to be recorded any more."""

    def _prepare(self) -> dict[str, t.Any]:
        self.sets.back_up(self.vm)
        return {"repository": str(self.sets.path), "names": [NAME], "state": "untracked"}

    def recover(self) -> None:
        succeed("backup_set", self._call)
        self._assert_good()
        assert not self._bitmaps()


SCENES: dict[str, type[Scene]] = {
    kind.__name__.lower(): kind
    for kind in (Full, Increment, Quiesced, Published, Tidied, Failed, Dead, Cancelled, Untracked)
}
# The points of a scene are dealt out to so many tests, that these can run side by side.
HANDS = {name: 1 + len(POINTS[name]) // 20 for name in SCENES}
DEALT = [(name, hand) for name, hands in HANDS.items() for hand in range(hands)]

QEMU = -2
"""Stands for it among the victims."""


class Stage:
    """Plays a scene again and again: without a crash, and with one."""

    def __init__(self, scene: Scene, chance: random.Random, directory: Path, start: Start, clean: Clean) -> None:
        self.scene = scene
        self._chance = chance
        self._record = directory / "points"
        self._start = start
        self._clean = clean

    def rehearse(self) -> list[crash.Point]:
        """The points of a run that nobody disturbs."""
        return self._play(0, ())

    def strike(self, point: crash.Point, *victims: int) -> None:
        """Kill the victims at that point: nothing half-made is listed, and one more run is enough."""
        print(point)
        hit = self._play(point, victims)
        assert point in hit, f"The run did not come to this point: {point}. It hit {[str(other) for other in hit]}"

    def _play(self, at: int | crash.Point, victims: t.Sequence[int]) -> list[crash.Point]:
        self._record.unlink(missing_ok=True)
        call = self.scene.begin()
        pids = [self.scene.vm.pid if victim == QEMU else victim for victim in victims]
        self._run(call, at, pids)
        self.scene.assert_listed_good()
        if QEMU in victims:
            self.scene.restart()
        # Where but processes of ours have ended, any run goes on. With a guard, the set has failed.
        ours = not {crash.MODULE, crash.WORKER}.isdisjoint(victims)
        self.scene.same_run = ours and QEMU not in victims and self._chance.random() < 0.5
        self.scene.recover()
        self._recovered()
        self._clean()
        self.scene.forget()
        return crash.read(self._record)

    def _recovered(self) -> None:
        """Look at what else there is after the run that was enough."""

    def _run(self, call: dict[str, t.Any], at: int | crash.Point, victims: t.Sequence[int]) -> None:
        """Run the module, which may be killed."""
        process = self._start("backup_set", call, crash_at=at, victims=victims, record=self._record)
        if crash.MODULE in victims:
            process.wait()
            assert process.killed
        else:
            process.result()


@pytest.fixture
def stage(vms: Vms, directory: Path, start_module: Start, clean: Clean) -> t.Callable[..., Stage]:
    """Sets up the scene of a name."""
    return lambda name, chance: Stage(SCENES[name](vms, directory, chance), chance, directory, start_module, clean)


@pytest.mark.parametrize("name", SCENES)
def test_every_step_has_its_place(stage: t.Callable[..., Stage], name: str) -> None:
    assert_listed(stage(name, dice()).rehearse(), POINTS[name], f"POINTS[{name!r}] of {__name__.rpartition('.')[2]}.py")


@pytest.mark.parametrize(("name", "hand"), DEALT)
def test_module_killed(stage: t.Callable[..., Stage], name: str, hand: int) -> None:
    chance = dice()
    play = stage(name, chance)
    for point in deal(play.rehearse(), chance, hand, HANDS[name], share=0.4):
        play.strike(point, crash.MODULE)


@pytest.mark.parametrize("victims", [(QEMU,), (QEMU, crash.MODULE)], ids=["qemu", "both"])
@pytest.mark.parametrize(("name", "hand"), DEALT if WHOLE else [(name, 0) for name in SCENES])
def test_qemu_killed(stage: t.Callable[..., Stage], name: str, hand: int, victims: tuple[int, ...]) -> None:
    chance = dice()
    play = stage(name, chance)
    for point in deal(play.rehearse(), chance, hand, HANDS[name] if WHOLE else 1, share=0.15):
        play.strike(point, *victims)


@pytest.mark.parametrize("victims", [(crash.ASKER,), (crash.ASKER, crash.MODULE)], ids=["guard", "both"])
def test_guard_killed(stage: t.Callable[..., Stage], victims: tuple[int, ...]) -> None:
    chance = dice()
    play = stage("quiesced", chance)
    for point in deal((point for point in play.rehearse() if "guest-fsfreeze" in point.name), chance, 0, 1):
        play.strike(point, *victims)


def test_killed_at_random_moments(vms: Vms, directory: Path, start_module: Start, clean: Clean) -> None:
    chance = dice()
    scene = Full(vms, directory, chance)
    for _dummy in range(8):
        for _round in range(chance.randint(1, 3)):
            process = start_module("backup_set", {"plan": scene.sets.plan(scene.vm, speed="16M")["plan"]})
            time.sleep(chance.uniform(0.2, 1.2))
            process.kill()
        scene.begin()
        scene.recover()
        clean()
        scene.forget()
