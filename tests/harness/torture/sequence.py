# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Chain torture: a VM and its sets go through whatever a seed decides, and every set that is listed has to be right."""

from __future__ import annotations

import random
import shutil
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.sets import Sets
from ansible_collections.vmfleet.backup.tests.harness.torture.backups import Backups
from ansible_collections.vmfleet.backup.tests.harness.torture.disks import Disks
from ansible_collections.vmfleet.backup.tests.harness.torture.domain_disks import DomainDisks
from ansible_collections.vmfleet.backup.tests.harness.torture.domain_life import DomainLife, DomainTrouble
from ansible_collections.vmfleet.backup.tests.harness.torture.domain_machine import DomainMachine
from ansible_collections.vmfleet.backup.tests.harness.torture.layers import Layers
from ansible_collections.vmfleet.backup.tests.harness.torture.machine import Machine
from ansible_collections.vmfleet.backup.tests.harness.torture.trouble import ROOM, Trouble
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME, Truth

if t.TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

    Actions = dict[Callable[[], None], int]

ROUNDS = 7
# Each call of virsh and each start of a domain takes its time.
DOMAIN_ROUNDS = 3


def of_qemu(seed: str, directory: Path, storage: Storage, vms: Vms, start: Callable[..., ModuleProcess]) -> Sequence:
    """Return what happens to a QEMU that somebody has started."""
    chance = random.Random(seed)
    mount = storage.mount("tmpfs", ROOM) if chance.random() < 0.6 else None
    sets = Sets((mount.path if mount else directory) / "repository")
    truth = Truth(directory, sets)
    machine = Machine(directory, vms, truth, chance)
    disks, layers = Disks(machine), Layers(machine)
    backups = Backups(sets, machine, truth)
    meanwhile = {machine.write_much: 6, disks.resize: 2, layers.snapshot: 1}
    trouble = Trouble(backups, meanwhile, start, mount)
    world = {
        machine.write_much: 12,
        disks.resize: 2,
        disks.stretch: 2,
        disks.add: 1,
        machine.restart: 3,
        disks.swap: 1,
        disks.copy: 1,
        machine.lose_bitmap: 2,
        machine.add_bitmap: 1,
        layers.snapshot: 4,
        layers.commit: 3,
        layers.pull: 2,
    }
    tries = {trouble.disturb: 5, trouble.crash: 5, trouble.crash_worker: 2}
    if mount:
        tries |= {trouble.back_up_into_little: 1, trouble.starve: 1}
    return Sequence(seed, ROUNDS, backups, world, tries)


def of_domain(seed: str, directory: Path, libvirt: Libvirt, start: Callable[..., ModuleProcess]) -> Sequence:
    """Return what happens to a domain of libvirt."""
    sets = Sets(directory / "repository", libvirt.inside)
    truth = Truth(directory, sets)
    machine = DomainMachine(directory, libvirt, truth, random.Random(seed))
    backups = Backups(sets, machine, truth)
    disks, life = DomainDisks(machine, backups.untrack), DomainLife(machine)
    meanwhile = {
        machine.write_much: 24,
        disks.snapshot: 5,
        disks.commit: 4,
        disks.pull: 5,
        disks.copy: 2,
        disks.resize: 2,
        disks.attach: 2,
        disks.detach: 2,
        life.save: 1,
        life.save_managed: 1,
        life.redefine: 1,
        life.restart_libvirt: 2,
        machine.lose_bitmap: 1,
    }
    trouble = DomainTrouble(backups, meanwhile, start)
    world = {**meanwhile, disks.snapshot_inside: 5, disks.revert: 8, machine.end: 3, machine.begin: 3}
    return Sequence(seed, DOMAIN_ROUNDS, backups, world, {trouble.disturb: 6, trouble.crash: 5})


class Sequence:
    """All that happens to one VM and its sets, as a seed decides."""

    def __init__(self, seed: str, rounds: int, backups: Backups, world: Actions, tries: Actions) -> None:
        """In each round some of the `world` happens, and then one of `tries` to make a set."""
        self._seed = seed
        self._rounds = rounds
        self.machine = backups.machine
        self.truth = backups.truth
        self.backups = backups
        self._world = {**world, self.prune: 2}
        self._tries = {**tries, backups.back_up: 4, backups.untrack: 1}

    def run(self) -> None:
        """Live through it."""
        if self.machine.chance.random() < 0.7:
            # Most of what can go wrong does so with increments.
            self._act(self.backups.back_up)
        for number in range(self._rounds):
            # Decisions of a round do not depend on how the one before has gone.
            self.machine.chance = random.Random(f"{self._seed}/{number}")
            for action in self._draw(self._world, self.machine.chance.randint(1, 4)):
                self._act(action)
            for action in self._draw(self._tries, 1):
                self._act(action)
        self._act(self.backups.back_up)
        self.truth.check(everything=True)

    def _draw(self, actions: Actions, number: int) -> list[Callable[[], None]]:
        return self.machine.chance.choices(list(actions), list(actions.values()), k=number)

    def _act(self, action: Callable[[], None]) -> None:
        print(f"{action.__name__}")
        action()
        self.truth.check()

    def prune(self) -> None:
        """Sets are removed that no other builds on: old chains, or the newest sets."""
        listed = self.truth.listed()
        if not listed:
            return
        at = self.machine.chance.randrange(len(listed))
        newest = self.machine.chance.random() < 0.3
        kept, going = (listed[:at], listed[at:]) if newest else (listed[at:], listed[:at])
        # For an unfinished set, as for one that is there.
        needed = self._below([*kept, *self.truth.unfinished()], listed)
        for manifest in going:
            if manifest["id"] not in needed:
                print(f"  prune {manifest['id']}")
                shutil.rmtree(self.backups.sets.path / NAME / manifest["id"])
                self.backups.ids.insert(0, manifest["id"])

    def _below(self, documents: list[dict[str, t.Any]], listed: list[dict[str, t.Any]]) -> set[str]:
        """The sets that others build on, however far below."""
        by_id = {manifest["id"]: manifest for manifest in listed}
        needed: set[str] = set()
        while documents:
            # An intent has its images in something larger.
            images = [disk if "parent" in disk else disk["image"] for disk in documents.pop()["disks"]]
            parents = {image["parent"]["id"] for image in images if image["parent"]} - needed
            needed |= parents
            documents += [by_id[name] for name in parents]
        return needed
