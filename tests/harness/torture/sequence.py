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
from ansible_collections.vmfleet.backup.tests.harness.torture.layers import Layers
from ansible_collections.vmfleet.backup.tests.harness.torture.machine import Machine
from ansible_collections.vmfleet.backup.tests.harness.torture.trouble import ROOM, Trouble
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME, Truth

if t.TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

ROUNDS = 7


class Sequence:
    """All that happens to one VM and its sets, as a seed decides."""

    def __init__(
        self,
        seed: str,
        directory: Path,
        storage: Storage,
        vms: Vms,
        start: Callable[..., ModuleProcess],
    ) -> None:
        self._seed = seed
        self.chance = random.Random(seed)
        self._mount = storage.mount("tmpfs", ROOM) if self.chance.random() < 0.6 else None
        sets = Sets((self._mount.path if self._mount else directory) / "repository")
        self.truth = Truth(directory, sets)
        self.machine = Machine(directory, vms, self.truth, self.chance)
        self.disks = Disks(self.machine)
        self.layers = Layers(self.machine)
        self.backups = Backups(directory, sets, self.machine, self.truth)
        self.trouble = Trouble(self.backups, self.disks, self.layers, self._mount, start)

    def run(self) -> None:
        """Live through it."""
        machine, disks, layers = self.machine, self.disks, self.layers
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
            self.prune: 2,
        }
        trouble = self.trouble
        backups = {self.backups.back_up: 4, trouble.disturb: 5, trouble.crash: 5, self.backups.untrack: 1}
        if self._mount:
            backups |= {trouble.back_up_into_little: 1, trouble.starve: 1}
        for number in range(ROUNDS):
            # Decisions of a round do not depend on how the one before has gone.
            self.chance = machine.chance = random.Random(f"{self._seed}/{number}")
            for action in self._draw(world, self.chance.randint(1, 4)):
                self._act(action)
            for action in self._draw(backups, 1):
                self._act(action)
        self._act(self.backups.back_up)
        self.truth.check(everything=True)

    def _draw(self, actions: dict[Callable[[], None], int], number: int) -> list[Callable[[], None]]:
        return self.chance.choices(list(actions), list(actions.values()), k=number)

    def _act(self, action: Callable[[], None]) -> None:
        print(f"{action.__name__}")
        action()
        self.truth.check()

    def prune(self) -> None:
        """Sets are removed that no other builds on: old chains, or the newest sets."""
        listed = self.truth.listed()
        if not listed:
            return
        at = self.chance.randrange(len(listed))
        newest = self.chance.random() < 0.3
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
