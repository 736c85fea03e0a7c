# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The VM: its disks, what its guest writes, and what becomes of its QEMU, its jobs and its bitmaps."""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, QmpError
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    import random
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.torture.truth import Truth

SECTOR = 512

# Far more than anything here writes: the filter is there, and slows nothing down.
THROTTLE = 1 << 34


class Machine:
    """A VM of small disks."""

    known_off = False
    """Whether its disks can be found while it is off."""

    def __init__(self, directory: Path, vms: Vms, truth: Truth, chance: random.Random) -> None:
        self.chance = chance
        self.directory = directory
        self.truth = truth
        self._sizes: set[int] = set()
        # Of one size, so that swapped or copied disks are not told by that.
        equal = self.new_size()
        self.vm = vms.start(
            self.make("drive0", equal),
            self.make("drive1", self.new_size(), format="raw"),
            self.make("drive2", chance.choice([equal, self.new_size()]), throttle=THROTTLE),
            name=NAME,
            # Then the copies are made with blockdev-backup.
            rejecting=chance.random() < 0.25,
        )
        self.shrunk = False
        """Whether the disk behind a throttle was shrunk while it had a job."""
        self.below: dict[str, list[Disk]] = {}
        """What the disks with external snapshots were, by their names, the newest last."""
        for disk in self.vm.disks:
            self.fill(disk)

    def defined(self) -> set[str]:
        """Return the disks that it is started anew with, whatever it runs with; none where nobody has defined any."""
        return set()

    def new_size(self, least: int = 8 * MIB, most: int = 16 * MIB) -> int:
        """Draw a size that no disk has had before: a shrunk disk that grows back to its old size cannot be told."""
        unit = self.chance.choice([SECTOR, 4096, 1 << 16])
        size = next(
            size for size in iter(lambda: self.chance.randrange(least, most, unit), 0) if size not in self._sizes
        )
        self._sizes.add(size)
        return size

    def fill(self, disk: Disk) -> None:
        """Write some data everywhere, to the very end."""
        size = self.size(disk)
        for end in (size * part // 16 // SECTOR * SECTOR for part in range(1, 17)):
            self.vm.write(disk.name, self.chance.randint(1, 255), end - (1 << 16), 1 << 16)

    def make(self, name: str, size: int, **options: t.Any) -> Disk:
        """Make an empty disk."""
        disk = Disk(self.directory / f"{name}.img", id=name, node=f"node-{name}", discard=True, **options)
        cluster = f"cluster_size={self.chance.choice([4096, 1 << 16, MIB])}"
        more = ["-o", cluster] if disk.format == "qcow2" else []
        qemu_img("create", "-q", "-f", disk.format, *more, disk.path or "", str(size))
        return disk

    def size(self, disk: Disk) -> int:
        """Return the size of a disk now."""
        return next(int(node["image"]["virtual-size"]) for node in self.nodes() if node["node-name"] == disk.node)

    def nodes(self) -> list[dict[str, t.Any]]:
        """Return all that QEMU tells of its block nodes."""
        nodes: list[dict[str, t.Any]] = self.vm.qmp.execute("query-named-block-nodes", flat=True)
        return nodes

    # The guest

    def write(self) -> None:
        """The guest writes."""
        self._do(f"write -P {self.chance.randint(1, 255)} {{}} {{}}", "wrote")

    def zero(self) -> None:
        """The guest writes zeroes that need not be allocated."""
        self._do("write -z -u {} {}", "wrote")

    def discard(self) -> None:
        """The guest discards."""
        self._do("discard {} {}", "discard")

    def _do(self, command: str, word: str) -> None:
        # A job's filter sits below the backend: writes to a node alone would go round it, as no guest's do.
        disks = [disk for disk in self.vm.disks if disk.id or not self.vm.block_jobs]
        disk = self.chance.choice(disks)
        sectors = self.size(disk) // SECTOR
        offset = self.chance.randrange(sectors)
        length = self.chance.randint(1, min(sectors - offset, 1 << self.chance.randrange(12)))
        self.truth.stale(disk.name)
        said = self.vm.io(disk.name, command.format(offset * SECTOR, length * SECTOR))
        assert said.startswith(f"{word} {length * SECTOR}/"), f"{disk.name}: {command}: {said}"

    def write_much(self) -> None:
        """The guest does this and that."""
        for _dummy in range(self.chance.randint(1, 5)):
            self.chance.choice([self.write, self.write, self.zero, self.discard])()

    # Its owner

    def freeze(self) -> None:
        """Remember the disks as they are now."""
        if self.vm.alive:
            self.truth.freeze(self.vm)

    def leftovers(self) -> list[str]:
        """Return what a set has left behind in QEMU and on disk."""
        return leftovers(self.vm, self.directory)

    def victims(self) -> dict[str, int]:
        """Return the processes that a run needs beside its own."""
        return {"QEMU": self.vm.pid}

    def release(self) -> None:
        """Jobs go as fast as they can."""
        for job in self.vm.block_jobs:
            # It may have ended.
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("block-job-set-speed", device=job["device"], speed=0)

    def settle(self) -> None:
        """Whoever looks after what was killed notices it."""

    def restart(self) -> None:
        """The VM is switched off and on."""
        self.end()
        self.begin()

    def end(self, kill: bool | None = None) -> None:
        """QEMU ends."""
        kill = self.chance.random() < 0.4 if kill is None else kill
        print(f"    QEMU {'is killed' if kill else 'quits'}")
        if self.vm.alive:
            (self.vm.kill if kill else self.vm.quit)()
        self.truth.stale()
        self.shrunk = False

    def begin(self) -> None:
        """QEMU starts again."""
        self.vm.kill()
        # A snapshot's node has a name of its own until then.
        self.vm.disks = tuple(
            dataclasses.replace(disk, node=f"node-{disk.name}") if disk.id else disk for disk in self.vm.disks
        )
        self.vm.restart()

    def replace(self, disk: Disk, **changes: t.Any) -> None:
        """Note what has become of a disk."""
        self.vm.disks = tuple(
            dataclasses.replace(one, **changes) if one.name == disk.name else one for one in self.vm.disks
        )

    def lose_bitmap(self) -> None:
        """Somebody removes or disables one of our bitmaps."""
        found = [place for place in self.bitmaps() if place[1].startswith("vmfleet-")]
        if found:
            node, name = self.chance.choice(found)
            verb = self.chance.choice(["remove", "disable"])
            # Refused for one that is in use, or inconsistent.
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute(f"block-dirty-bitmap-{verb}", node=node, name=name)

    def add_bitmap(self) -> None:
        """Somebody else tracks changes too."""
        disk = self.chance.choice(self.vm.disks)
        name = self.chance.choice(["other", "vmfleet", "vmfleet-00000000-0123456789abcdef"]) + str(len(self.bitmaps()))
        persistent = disk.format == "qcow2" and self.chance.random() < 0.5
        with contextlib.suppress(QmpError):
            self.vm.qmp.execute("block-dirty-bitmap-add", node=disk.node, name=name, persistent=persistent)

    def bitmaps(self) -> set[tuple[str, str]]:
        """Return all named bitmaps, as node and name."""
        return {
            (node["node-name"], bitmap["name"])
            for node in self.nodes()
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name")
        }
