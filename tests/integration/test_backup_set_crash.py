# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set killed at any moment, and run again: a good set and nothing left, whatever the moment was."""

from __future__ import annotations

import itertools
import random
import shutil
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

# The steps are dealt out to so many tests, that these can run side by side.
HANDS = 6


def steps(hand: int, every: int = 1) -> t.Iterator[int]:
    """The steps of one hand: all of them, or in each run of the tests others, so that in time all are visited."""
    first = 1 + hand * every + random.randrange(every)
    print(f"killed at steps {first}, {first + HANDS * every}, ...")
    return itertools.count(first, HANDS * every)


class Crash:
    """A VM of two disks, its repository, and what has to be true after a crash and one more run."""

    def __init__(self, vms: Vms, directory: Path, start: t.Callable[..., ModuleProcess]) -> None:
        self.sets = Sets(directory / "repository")
        self.vm: Qemu = vms.start(vms.disk(0, size=8 * MIB), vms.disk(1, size=8 * MIB), name="web01")
        self.copies = {disk.id: self.vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in self.vm.disks}
        self.start = start

    def forget(self) -> None:
        """Let the next attempt begin from nothing."""
        if self.sets.path.exists():
            shutil.rmtree(self.sets.path)

    def assert_good(self, clean: t.Callable[[], None]) -> None:
        self.sets.assert_good("web01", {str(name): path for name, path in self.copies.items()})
        assert sorted(path.name for path in self.sets.path.iterdir()) == ["vmfleet.json", "web01"]
        clean()

    def assert_recovered(self, clean: t.Callable[[], None]) -> None:
        self.sets.back_up(self.vm)
        self.assert_good(clean)


class Chain:
    """A VM of two disks with a full set, and increments on it that something happens to."""

    def __init__(self, crash: Crash, directory: Path) -> None:
        self.vm = crash.vm
        self._sets = crash.sets
        self._start = crash.start
        self._directory = directory
        self._copies: dict[str, dict[str, Path]] = {}
        self._levels: dict[str, dict[str, str]] = {}
        self._number = 0
        self._sets.back_up(self.vm, id="full")

    @property
    def id(self) -> str:
        """The set that is being made."""
        return f"s{self._number}"

    def interrupt(self, step: int, victim: int = 0) -> ModuleProcess:
        """Let the guest write, and kill the module, or else the victim, while it makes the next set of that."""
        self._number += 1
        for disk in self.vm.disks:
            self.vm.write(disk.name, self._number % 255 + 1, self._number % 64 * 65536, 100 * 1024)
        self._copies[self.id] = {
            disk.name: self.vm.freeze(disk, self._directory / f"frozen-{self.id}-{disk.name}.qcow2")
            for disk in self.vm.disks
        }
        plan = self._sets.plan(self.vm, id=self.id)["plan"]
        process = self._start("backup_set", {"plan": plan}, crash_at=step, victim=victim)
        process.wait()
        return process

    def assert_recovered(self, clean: t.Callable[[], None]) -> None:
        """One more run, and the set is there; nothing else is left but, if its QEMU lives, the record that it began."""
        self._sets.back_up(self.vm, id=self.id)
        levels = self._levels[self.id] = self._sets.levels("web01", self.id)
        self._sets.assert_good("web01", self._copies[self.id], self.id, levels)
        for node, bitmap in self._records().items():
            assert set(self.vm.bitmaps(node)) <= {bitmap}
        clean()

    def _records(self) -> dict[str, str]:
        """The bitmap of the newest set on each node."""
        return {disk["node"]: disk["bitmap"] for disk in self._sets.manifest("web01", self.id)["disks"]}

    def assert_unbroken(self) -> None:
        """No change has been lost, and so there was no reason for a full image, nor will there be one."""
        assert set(self._levels[self.id].values()) == {"incremental"}
        for node, bitmap in self._records().items():
            assert list(self.vm.bitmaps(node)) == [bitmap]

    def assert_good(self) -> None:
        """Every set is what it was."""
        for set_id, levels in self._levels.items():
            self._sets.assert_good("web01", self._copies[set_id], set_id, levels)


@pytest.fixture
def chain(crash: Crash, directory: Path) -> Chain:
    return Chain(crash, directory)


@pytest.fixture
def crash(vms: Vms, directory: Path, start_module: t.Callable[..., ModuleProcess]) -> Crash:
    return Crash(vms, directory, start_module)


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed_at_any_step_and_run_again(crash: Crash, clean: t.Callable[[], None], hand: int) -> None:
    for step in steps(hand):
        plan = crash.sets.plan(crash.vm)["plan"]
        process = crash.start("backup_set", {"plan": plan}, crash_at=step)
        process.wait()
        if not process.killed:
            assert process.result()["vms"][0]["state"] == "published"
            assert step > 5 * HANDS
            return
        crash.assert_recovered(clean)
        crash.forget()


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed_at_any_step_and_the_same_plan_again(crash: Crash, clean: t.Callable[[], None], hand: int) -> None:
    for step in steps(hand, every=3):
        plan = crash.sets.plan(crash.vm)["plan"]
        process = crash.start("backup_set", {"plan": plan}, crash_at=step)
        process.wait()
        # Nothing has failed but this process: the run goes on.
        assert succeed("backup_set", {"plan": plan})["vms"][0]["state"] == "published"
        crash.assert_good(clean)
        if not process.killed:
            return
        crash.forget()


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed_at_any_step_together_with_qemu(crash: Crash, clean: t.Callable[[], None], hand: int) -> None:
    for step in steps(hand, every=3):
        process = crash.start("backup_set", {"plan": crash.sets.plan(crash.vm)["plan"]}, crash_at=step)
        process.wait()
        crash.vm.kill()
        crash.vm.restart()
        crash.assert_recovered(clean)
        if not process.killed:
            return
        crash.forget()


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed_at_any_step_of_cancelling(crash: Crash, clean: t.Callable[[], None], hand: int) -> None:
    for step in steps(hand):
        crash.sets.start(crash.vm)
        cancel = {"repository": str(crash.sets.path), "names": ["web01"], "state": "cancelled"}
        process = crash.start("backup_set", cancel, crash_at=step)
        process.wait()
        succeed("backup_set", cancel)
        clean()
        crash.sets.assert_absent("web01")
        if not process.killed:
            return
        crash.forget()


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed_at_any_step_of_an_increment_and_run_again(chain: Chain, clean: t.Callable[[], None], hand: int) -> None:
    for step in steps(hand, every=3):
        process = chain.interrupt(step)
        chain.assert_recovered(clean)
        chain.assert_unbroken()
        if not process.killed:
            assert step > 5 * HANDS
            break
    chain.assert_good()


@pytest.mark.parametrize("hand", range(HANDS))
def test_killed_at_any_step_of_an_increment_together_with_qemu(
    chain: Chain, clean: t.Callable[[], None], hand: int
) -> None:
    for step in steps(hand, every=3):
        process = chain.interrupt(step)
        chain.vm.kill()
        chain.vm.restart()
        chain.assert_recovered(clean)
        if not process.killed:
            break
    chain.assert_good()


@pytest.mark.parametrize("hand", range(HANDS))
def test_qemu_killed_at_any_step_of_an_increment(chain: Chain, clean: t.Callable[[], None], hand: int) -> None:
    for step in steps(hand, every=3):
        result = chain.interrupt(step, victim=chain.vm.pid).result()
        survived = chain.vm.answers
        if survived:
            assert result["vms"][0]["state"] == "published"
        else:
            chain.vm.kill()
            chain.vm.restart()
        chain.assert_recovered(clean)
        if survived:
            break
    chain.assert_good()


def test_killed_at_random_moments(crash: Crash, clean: t.Callable[[], None]) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _dummy in range(8):
        for _round in range(chance.randint(1, 3)):
            process = crash.start("backup_set", {"plan": crash.sets.plan(crash.vm, speed="16M")["plan"]})
            time.sleep(chance.uniform(0.2, 1.2))
            process.kill()
        crash.assert_recovered(clean)
        crash.forget()
