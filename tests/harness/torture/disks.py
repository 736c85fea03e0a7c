# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done to the disks: they get another size, come, change places and are copied."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.qemu import QmpError

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
    from ansible_collections.vmfleet.backup.tests.harness.torture.machine import Machine


class Disks:
    """The disks of a VM, in the hands of its owner."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.vm = machine.vm

    def resize(self) -> None:
        """A disk gets another size, online; QEMU refuses that while the disk has a job."""
        disk = self.machine.chance.choice(self.vm.disks)
        before = self.machine.size(disk)
        jobs = bool(self.vm.block_jobs)
        if jobs and self.machine.below.get(disk.name):
            # The bitmap in use may be that of a layer.
            return
        after = self.machine.new_size()
        if disk.throttle:
            if jobs and (self.machine.shrunk or self._in_increment(disk)):
                # Grown on again, it would look as if it had never been shrunk.
                return
            self.machine.shrunk = jobs and after < before
            how = {"device": disk.id}
        else:
            how = {"node_name": disk.node}
        # Also refused to an image with a bitmap that is inconsistent.
        with contextlib.suppress(QmpError):
            self.vm.qmp.execute("block_resize", size=after, **how)
        self.machine.truth.stale(disk.name)

    def _in_increment(self, disk: Disk) -> bool:
        """Whether a job uses a bitmap of this disk: a size that QEMU 7.2 does not refuse then is the end of QEMU."""
        return any(bitmap["busy"] for bitmap in self.vm.bitmaps(disk.node or "").values())

    def stretch(self) -> None:
        """A disk is cut short, and grows on beyond its old size: what was at its end is gone."""
        disk = self.machine.chance.choice(self.vm.disks)
        before = self.machine.size(disk)
        if not self.vm.block_jobs:
            how = {"device": disk.id} if disk.throttle else {"node_name": disk.node}
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("block_resize", size=self.machine.new_size(before // 2, before - MIB), **how)
                self.vm.qmp.execute("block_resize", size=self.machine.new_size(before, before + MIB), **how)
            self.machine.truth.stale(disk.name)

    def add(self) -> None:
        """A disk is plugged in."""
        name = f"hot{len(self.vm.disks)}"
        if len(self.vm.disks) < 5 and not self.vm.block_jobs:
            disk = dataclasses.replace(self.machine.make(name, self.machine.new_size()), id=None)
            file = {"driver": "file", "filename": str(disk.path)}
            options = {"driver": "qcow2", "node-name": disk.node, "discard": "unmap", "file": file}
            self.vm.qmp.execute("blockdev-add", **options)
            self.vm.disks = (*self.vm.disks, disk)
            self.machine.fill(disk)

    def swap(self) -> None:
        """Two disks change places at a restart."""
        two = self._two()
        if not two:
            return
        one, other = two
        self.machine.end()
        places = {one.name: other.path, other.name: one.path}
        self.vm.disks = tuple(
            dataclasses.replace(disk, path=places.get(disk.name, disk.path)) for disk in self.vm.disks
        )
        self.machine.begin()

    def copy(self) -> None:
        """A disk is replaced by a copy of another at a restart, bitmaps and all."""
        two = self._two()
        if not two:
            return
        one, other = two
        self.machine.end()
        assert one.path
        assert other.path
        shutil.copyfile(one.path, other.path)
        self.machine.begin()

    def _two(self) -> list[Disk]:
        whole = [disk for disk in self.vm.disks if disk.format == "qcow2" and not self.machine.below.get(disk.name)]
        return self.machine.chance.sample(whole, 2) if len(whole) > 1 else []
