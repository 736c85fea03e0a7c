# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What libvirt does with the disks of a domain: external and internal snapshots, copies, other sizes, other disks."""

from __future__ import annotations

import contextlib
import typing as t
from xml.etree import ElementTree

from ansible_collections.vmfleet.backup.tests.harness import snapshots
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, info, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.torture.domain_machine import DomainMachine

MOST_LAYERS = 4


class DomainDisks:
    """The disks of a domain, in the hands of its owner."""

    def __init__(self, machine: DomainMachine, untrack: Callable[[], None]) -> None:
        self.machine = machine
        self.vm = machine.vm
        self._untrack = untrack
        self._number = 0
        self._detached: list[Disk] = []
        """What can be attached again."""
        self._layers_inside: dict[str, dict[str, list[Path]]] = {}
        """What the disks were made of when an internal snapshot was taken."""

    def _any(self) -> Disk:
        return self.machine.chance.choice(self.vm.disks)

    def _next(self, what: str) -> str:
        self._number += 1
        return f"{what}{self._number}"

    def snapshot(self) -> None:
        """Take an external snapshot of some disks."""
        disks = [disk for disk in self.vm.disks if len(self.vm.layers(disk)) < MOST_LAYERS]
        if disks and not self.machine.asleep:
            name = self._next("snapshot")
            chosen = self.machine.chance.sample(disks, self.machine.chance.randint(1, len(disks)))
            specs = [
                f"{disk.id},file={self.machine.directory}/{disk.id}-{name}.qcow2"
                if disk in chosen
                else f"{disk.id},snapshot=no"
                for disk in self.vm.disks
            ]
            words = [word for spec in specs for word in ("--diskspec", spec)]
            self.machine.virsh("snapshot-create-as", NAME, name, "--no-metadata", "--disk-only", *words)

    def _layered(self) -> tuple[Disk | None, list[Path]]:
        """A disk with external snapshots, and its images from the top on."""
        layered = [(disk, self.vm.layers(disk)) for disk in self.vm.disks]
        layered = [(disk, images) for disk, images in layered if len(images) > 1]
        return self.machine.chance.choice(layered) if layered and not self.machine.asleep else (None, [])

    def commit(self) -> None:
        """Commit layers into one below, the active one among them or not; by hand while the domain is off."""
        disk, images = self._layered()
        if not disk or self.vm.storage_daemon:
            return
        base = self.machine.chance.randrange(1, len(images))
        top = self.machine.chance.choice([0, self.machine.chance.randrange(base)])
        before = self.machine.size(disk)
        if not self.vm.alive:
            self._commit_by_hand(disk)
        elif top == 0:
            words = ["--base", images[base], "--active", "--pivot", "--wait"]
            self.machine.virsh("blockcommit", NAME, disk.name, *words)
        else:
            words = ["--base", images[base], "--top", images[top], "--wait"]
            self.machine.virsh("blockcommit", NAME, disk.name, *words)
        if self.machine.size(self.vm.disk(disk.name)) != before:
            # The layer had been shrunk. What it is committed into keeps its length, and with it an older end: where
            # the disk has the size of its last set again, nothing tells of that.
            self._resize(self.vm.disk(disk.name))

    def _commit_by_hand(self, disk: Disk) -> None:
        print(f"    {disk.id}: by qemu-img")
        layer = info(disk.path)
        xml = self.vm.domain.xml("--inactive")
        [element] = [one for one in xml.iterfind("devices/disk") if one.find(f"target[@dev='{disk.id}']") is not None]
        for store in element.findall("backingStore"):
            element.remove(store)
        element.find("source").set("file", layer["full-backing-filename"])
        element.find("driver").set("type", layer["backing-filename-format"])
        qemu_img("commit", "-q", "-d", disk.path or "")
        self.machine.virsh("define", "/dev/stdin", stdin=ElementTree.tostring(xml, encoding="unicode"))

    def pull(self) -> None:
        """Copy what layers below hold into the active one; where there are none, after an external snapshot."""
        disk, images = self._layered()
        if not disk and self.vm.alive and not self.vm.block_jobs:
            self.snapshot()
            self.machine.write_much()
            disk, images = self._layered()
        if disk and self.vm.alive and not self.vm.block_jobs:
            last = self.machine.chance.randrange(1, len(images))
            if self._mergeable(images[: last + 1]):
                base = ["--base", images[last + 1]] if last + 1 < len(images) else []
                self.machine.virsh("blockpull", NAME, disk.name, *base, "--wait")
                # QEMU has what it has pulled in memory only, until somebody flushes: if it is killed, that is lost.
                self.machine.truth.stale(disk.name)

    def _mergeable(self, images: list[Path]) -> bool:
        """Whether libvirt merges all bitmaps of these layers: what it leaves as it is, nothing tells of."""
        found = [node for node in self.machine.nodes() if node["image"]["filename"] in map(str, images)]
        return all(snapshots.usable(bitmap) for node in found for bitmap in node.get("dirty-bitmaps", []))

    def copy(self) -> None:
        """Copy a disk to another image, and go on with that."""
        if self.vm.alive:
            target = self.machine.directory / f"{self._next('copy')}.img"
            disk = self._any()
            self.machine.virsh("blockcopy", NAME, disk.name, target, "--pivot", "--wait", "--transient-job")

    def resize(self) -> None:
        """Give a disk another size."""
        if not self.machine.asleep and not self.vm.storage_daemon:
            self._resize(self._any())

    def _resize(self, disk: Disk) -> None:
        size = self.machine.new_size(4 * MIB, 8 * MIB)
        if self.vm.alive:
            self.machine.virsh("blockresize", NAME, disk.name, f"{size}B", may_fail=True)
        else:
            # Refused where the image has internal snapshots, or bitmaps that are inconsistent.
            with contextlib.suppress(AssertionError):
                qemu_img("resize", "-q", "--shrink", "-f", disk.format, disk.path or "", str(size))
        self.machine.truth.stale(disk.name)

    def attach(self) -> None:
        """Attach a disk: a new one, or one that was detached, and perhaps changed by somebody meanwhile."""
        there = {*self._targets("--inactive"), *self._targets()}
        free = [target for target in ("sdb", "sdc") if target not in there]
        if not free or self.machine.asleep or self.vm.storage_daemon:
            return
        known = [disk for disk in self._detached if disk.id in free]
        if known and self.machine.chance.random() < 0.7:
            disk = self.machine.chance.choice(known)
            self._detached.remove(disk)
            if self.machine.chance.random() < 0.5:
                write(disk.path, f"write -P {self.machine.chance.randint(1, 255)} 65536 131072", fmt=disk.format)
        else:
            image = self.machine.image(free[0], "qcow2")
            disk = Disk(image.path, id=free[0], format="qcow2")
        what = ["--targetbus", "scsi", "--subdriver", disk.format, *self._how()]
        self.machine.virsh("attach-disk", NAME, disk.path or "", disk.name, *what)
        self.machine.truth.stale(disk.name)

    def detach(self) -> None:
        """Detach a disk on SCSI, for good or until the next start."""
        found = [disk for disk in self.vm.disks if disk.name.startswith("s")]
        if found and not self.machine.asleep and not self.vm.storage_daemon:
            disk = self.machine.chance.choice(found)
            how = [word for word in self._how() if word == "--live" or disk.id in self._targets("--inactive")]
            jobs = bool(self.vm.block_jobs)
            if self.machine.virsh("detach-disk", NAME, disk.name, *how):
                self.machine.truth.stale(disk.name)
                if disk.id not in self._targets("--inactive") and not jobs:
                    self._detached.append(disk)

    def _how(self) -> list[str]:
        return self.machine.chance.choice([["--live"], ["--live", "--config"]]) if self.vm.alive else ["--config"]

    def _targets(self, *which: str) -> list[str]:
        return [target.attrib["dev"] for target in self.vm.domain.xml(*which).iterfind("devices/disk/target")]

    def snapshot_inside(self) -> None:
        """Take an internal snapshot, or delete one."""
        if self._can_be_inside():
            inside = self._inside()
            if inside and self.machine.chance.random() < 0.3:
                self.machine.virsh("snapshot-delete", NAME, self.machine.chance.choice(inside), may_fail=True)
            else:
                self._take_inside()

    def revert(self) -> None:
        """Revert to an internal snapshot, perhaps to a new one: that needs the bitmaps to be gone."""
        if not self._can_be_inside():
            return
        if not self._inside():
            self._take_inside()
            self.machine.write_much()
        # Of an older one, what was below would have gone out of sight. Nobody wants that back.
        inside = [name for name in self._inside() if self._layers_inside[name] == self._layers()]
        if not inside:
            return
        if self.machine.chance.random() < 0.6 and not self.vm.block_jobs:
            self._untrack()
        self.machine.virsh("snapshot-revert", NAME, self.machine.chance.choice(inside), may_fail=True)
        self.machine.settle()
        self.machine.truth.stale()

    def _can_be_inside(self) -> bool:
        """Whether internal snapshots can be taken of all disks."""
        return not self.machine.asleep and not any(disk.format == "raw" for disk in self.vm.disks)

    def _inside(self) -> list[str]:
        """The internal snapshots that libvirt knows: the external ones are taken without metadata."""
        return self.vm.domain.virsh("snapshot-list", "--name").split()

    def _take_inside(self) -> None:
        name = self._next("inside")
        self._layers_inside[name] = self._layers()
        self.machine.virsh("snapshot-create-as", NAME, name, may_fail=True)

    def _layers(self) -> dict[str, list[Path]]:
        return {disk.name: self.vm.layers(disk) for disk in self.vm.disks}
