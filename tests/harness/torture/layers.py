# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done with external snapshots: they are taken, committed and pulled."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.vmfleet.backup.tests.harness import snapshots
from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
    from ansible_collections.vmfleet.backup.tests.harness.torture.machine import Machine


class Layers:
    """The external snapshots of a VM's disks."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.vm = machine.vm
        self._snapshots = 0

    def snapshot(self) -> None:
        """Somebody takes an external snapshot, by libvirt or by QEMU alone."""
        disk = self.machine.chance.choice([disk for disk in self.vm.disks if disk.id])
        like_libvirt = self.machine.chance.random() < 0.7
        below = self.machine.below.setdefault(disk.name, [])
        if len(below) < 3 and not any(job["type"] != "backup" for job in self.vm.block_jobs):
            self._snapshots += 1
            overlay = self.machine.directory / f"{disk.name}-{self._snapshots}.qcow2"
            node = f"snap-{disk.name}-{self._snapshots}"
            print(f"    {disk.name}: {node}{' with bitmaps' if like_libvirt else ''}")
            snapshots.take(self.vm, disk.node or "", overlay, node, like_libvirt)
            below.append(disk)
            self.machine.replace(disk, path=overlay, node=node, format="qcow2")

    def commit(self) -> None:
        """Layers are committed into one below, the active one among them or not, online or off."""
        disk, nodes = self._layered()
        if not disk or self.vm.block_jobs:
            return
        below = self.machine.below[disk.name]
        base = self.machine.chance.randrange(1, len(nodes))
        top = self.machine.chance.choice([0, self.machine.chance.randrange(base)])
        # QEMU does not commit or pull below a filter that is no root node.
        if disk.throttle or (top == 0 and base == 1 and self.machine.chance.random() < 0.3):
            self._commit_offline(disk)
            return
        like_libvirt = self.machine.chance.random() < 0.7
        print(f"    {disk.name}: {nodes[top]} into {nodes[base]}{' with bitmaps' if like_libvirt else ''}")
        before = self.machine.size(disk)
        snapshots.commit(self.vm, nodes[0], nodes[top], nodes[base], nodes[top + 1 : base], like_libvirt)
        if top == 0:
            disk = dataclasses.replace(disk, path=below[-base].path, format=below[-base].format, node=nodes[base])
            self.machine.replace(disk, path=disk.path, format=disk.format, node=disk.node)
            del below[-base:]
            if self.machine.size(disk) != before:
                # The layer had been shrunk. What it is committed into keeps its length, and with it an older end: where
                # the disk has the size of its last set again, nothing tells of that.
                self.vm.qmp.execute("block_resize", node_name=disk.node, size=self.machine.new_size())
                self.machine.truth.stale(disk.name)
        else:
            # The layers above `top` stay, and stand on the base.
            del below[len(below) - base + 1 : len(below) - top + 1]

    def _commit_offline(self, disk: Disk) -> None:
        print(f"    {disk.name}: by qemu-img")
        self.machine.end(kill=False)
        qemu_img("commit", "-q", "-d", disk.path or "")
        last = self.machine.below[disk.name].pop()
        self.machine.replace(disk, path=last.path, format=last.format)
        self.machine.begin()

    def pull(self) -> None:
        """What layers below hold is pulled into the active one."""
        disk, nodes = self._layered()
        if not disk or disk.throttle or self.vm.block_jobs:
            return
        below = self.machine.below[disk.name]
        last = self.machine.chance.randrange(1, len(nodes))
        layers = nodes[1 : last + 1]
        shared = [self.vm.bitmaps(node).get(name) for name in self.vm.bitmaps(nodes[0]) for node in layers]
        if not all(snapshots.usable(bitmap) for bitmap in shared if bitmap):
            # libvirt would leave the overlay's bitmap as it is, and nothing could tell that it is not whole.
            return
        print(f"    {disk.name}: {', '.join(layers)}")
        snapshots.pull(self.vm, nodes[0], layers, nodes[last + 1] if last + 1 < len(nodes) else None)
        del below[len(below) - last :]
        # QEMU has what it has pulled in memory only, until somebody flushes: if it is killed, that is lost.
        self.machine.truth.stale(disk.name)

    def _layered(self) -> tuple[Disk | None, list[str]]:
        """A disk with snapshots, and the nodes of its layers from the top on."""
        layered = [disk for disk in self.vm.disks if self.machine.below.get(disk.name)]
        if not layered:
            return None, []
        disk = self.machine.chance.choice(layered)
        paths = [layer.path for layer in (disk, *reversed(self.machine.below[disk.name]))]
        return disk, [snapshots.node_of(self.vm, path) for path in paths if path]
