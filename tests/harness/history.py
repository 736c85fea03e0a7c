# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The sets of one VM, each with copies of its disks that were frozen at its moment."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

SIZE = 8 * MIB
# After its first pieces QEMU waits for minutes, so that a job with more to copy is there until it is let go.
SLOW = "64K"


class History:
    """Backs one VM up again and again; `check` tells whether every set still is what it was."""

    def __init__(self, vm: Qemu, sets: Sets, directory: Path, name: str = "web01") -> None:
        self.vm = vm
        self.sets = sets
        self.name = name
        self._directory = directory
        self._copies: dict[str, dict[str, Path]] = {}
        self._levels: dict[str, dict[str, str]] = {}

    def reopen(self, vms: Vms, *disks: Disk, **options: t.Any) -> Qemu:
        """End the VM in order, and have another QEMU with these disks take its place."""
        if self.vm.alive:
            self.vm.quit()
        self.vm = vms.start(*disks, name=self.name, **options)
        return self.vm

    def freeze(self, set_id: str, *names: str) -> None:
        """Remember what the disks hold now, or those with these names, as the content of a set to come."""
        self._copies[set_id] = {
            name: self.vm.freeze(disk, self._directory / f"frozen-{self.sets.path.name}-{set_id}-{name}.qcow2")
            for name, disk in named(self.vm).items()
            if disk.path and (not names or name in names)
        }

    def back_up(self, set_id: str, *names: str, vms: list[dict[str, t.Any]] | None = None, **options: t.Any) -> str:
        """Make a set of the disks with these names, or of all of them; returns its level."""
        self.freeze(set_id, *names)
        how = {"id": set_id, **options}
        result = self.sets.back_up(**how, vms=vms) if vms else self.sets.back_up(self.vm, **how)
        found = result_of(result, self.name)
        assert found["state"] == "published"
        self.note(set_id)
        return str(found["level"])

    def copies(self, set_id: str) -> dict[str, Path]:
        """The copies of the disks that were frozen for a set."""
        return self._copies[set_id]

    def note(self, set_id: str) -> dict[str, str]:
        """Remember the levels of a set's images, and return them."""
        self._levels[set_id] = self.sets.levels(self.name, set_id)
        return self._levels[set_id]

    def forget(self, set_id: str) -> None:
        """A set is not there any more."""
        del self._levels[set_id]

    def check(self) -> None:
        """Every set holds, byte for byte, what the VM's disks held at its moment, and there is no other set."""
        there = {path.name for path in (self.sets.path / self.name).iterdir() if not path.name.startswith(".")}
        assert there == set(self._levels)
        for set_id, levels in self._levels.items():
            self.sets.assert_good(self.name, self._copies[set_id], set_id, levels)

    def reason(self, set_id: str, disk: str = "drive0") -> str:
        """Why a disk's image has the level that it has."""
        return self.sets.reasons(self.name, set_id)[disk]

    def recorded(self, set_id: str) -> dict[str, list[str]]:
        """The bitmaps that a set came with, by node."""
        manifest = self.sets.manifest(self.name, set_id)
        return {disk["node"]: [disk["bitmap"]] for disk in manifest["disks"] if disk["bitmap"]}

    def bitmaps(self) -> dict[str, list[str]]:
        """The bitmaps of the repository that there are in the VM, by node."""
        uuid = json.loads((self.sets.path / "vmfleet.json").read_text())["uuid"]
        found = {}
        for disk in self.vm.disks:
            if disk.node and disk.path:
                found[disk.node] = [
                    name for name in self.vm.bitmaps(disk.node) if name.startswith(f"vmfleet-{uuid[:8]}-")
                ]
        return {node: names for node, names in found.items() if names}


def named(vm: Qemu) -> Mapping[str, Disk]:
    """A VM's disks by the names that they have in a set."""
    return {disk.id or disk.node or "": disk for disk in vm.disks}


def overwrite(vm: Qemu, pattern: int, disk: str = "drive0") -> None:
    """Change half of a disk of 8 MiB: more than QEMU copies at one go."""
    for at in range(4):
        vm.write(disk, pattern + at, 2 * at * MIB, MIB)
