# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The domain, in the hands of its guest and its owner: what is written, and what becomes of its processes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, info, write
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.torture.domain_vm import SECOND_MONITOR, DomainVm
from ansible_collections.vmfleet.backup.tests.harness.torture.machine import SECTOR, Machine
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    import random
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
    from ansible_collections.vmfleet.backup.tests.harness.torture.truth import Truth


class DomainMachine(Machine):
    """A domain of small disks; those on SCSI need no guest to be detached."""

    known_off = True

    def __init__(self, directory: Path, libvirt: Libvirt, truth: Truth, chance: random.Random) -> None:
        self.chance = chance
        self.directory = directory
        self.truth = truth
        self.libvirt = libvirt
        self.vm = DomainVm(libvirt)
        self._sizes: set[int] = set()
        self.state: Path | None = None
        """The file with the memory of a domain that was saved."""
        self.asleep = False
        """Whether its memory was saved: to its disks belongs what is in it."""
        # libvirt has QEMU's user make images there.
        directory.chmod(0o777)
        disks = [self.image("vda", "qcow2"), self.image("sda", chance.choice(["qcow2", "qcow2", "raw"]))]
        # It can be saved with internal snapshots.
        libvirt.define(NAME, *disks, machine="pc", more=SECOND_MONITOR)
        self.begin()

    def image(self, target: str, fmt: str) -> DomainDisk:
        """Make the image of a disk, with some data everywhere, to the very end."""
        size = self.new_size(4 * MIB, 8 * MIB)
        path = create(self.directory / f"{target}-{size}.{fmt}", size, fmt)
        ends = [size * part // 8 // SECTOR * SECTOR for part in range(1, 9)]
        writes = (f"write -P {self.chance.randint(1, 255)} {end - (1 << 16)} {1 << 16}" for end in ends)
        write(path, *writes, fmt=fmt)
        return DomainDisk(path, target, "virtio" if target.startswith("v") else "scsi", fmt)

    def defined(self) -> set[str]:
        """Return the disks that it is started anew with."""
        return {target.attrib["dev"] for target in self.vm.domain.xml("--inactive").iterfind("devices/disk/target")}

    def virsh(self, command: str, *words: str | Path, may_fail: bool = False, stdin: str = "") -> bool:
        """Have libvirt do something to the domain; returns whether it was done. While there are jobs it may refuse."""
        busy = bool(self.vm.block_jobs)
        told = self.libvirt.attempt("virsh", command, *words, stdin=stdin)
        self.vm.forget()
        said = told.stderr.strip().replace("\n", " ")
        print(f"    virsh {command} {' '.join(map(str, words))}{': ' if said else ''}{said}")
        assert told.returncode == 0 or busy or may_fail, said
        return told.returncode == 0

    def size(self, disk: Disk) -> int:
        """Return the size of a disk now."""
        return super().size(disk) if self.vm.alive else int(info(disk.path)["virtual-size"])

    def bitmaps(self) -> set[tuple[str, str]]:
        """Return all bitmaps, or the stored ones, by node or by path."""
        if self.vm.alive:
            return super().bitmaps()
        found = {
            disk.node: info(disk.path)["format-specific"]["data"] for disk in self.vm.disks if disk.format != "raw"
        }
        return {(path or "", bitmap["name"]) for path, data in found.items() for bitmap in data.get("bitmaps", [])}

    def write_much(self) -> None:
        """The guest does this and that, or an admin: but nobody while a domain is copied that is off."""
        if self.vm.alive or not self.vm.storage_daemon:
            try:
                super().write_much()
            except subprocess.CalledProcessError as error:
                # The module that makes a set of it has a disk open for a moment, or for a copy by now.
                if "lock" not in error.stderr:
                    raise
                print(f"    {error.stderr.strip()}")

    def lose_bitmap(self) -> None:
        """Somebody removes or disables one of our bitmaps."""
        if self.vm.alive:
            super().lose_bitmap()

    def freeze(self) -> None:
        """Remember the disks as they are now."""
        # What its memory was saved with comes back with that.
        self.truth.freeze(self.vm, self.defined() if self.vm.alive else ())

    def leftovers(self) -> list[str]:
        """Return what a set has left behind."""
        found = [*leftovers(self.vm, self.directory), *self._left_open()] if self.vm.alive else []
        found += [f"process {words}" for words in self.libvirt.processes.values() if words.startswith("qemu-storage")]
        return found + [f"directory {self.vm.storage_daemon}"] * bool(self.vm.storage_daemon)

    def _left_open(self) -> list[str]:
        """What libvirt could not close when a disk was detached that was being copied."""
        known = {part.get("index") for disk in self.vm.domain.xml().iterfind("devices/disk") for part in disk.iter()}
        names = {node["node-name"] for node in self.nodes() if node["node-name"].startswith("libvirt-")}
        return [f"node {name}" for name in names if name.split("-")[1] not in known]

    def victims(self) -> dict[str, int]:
        """Return the processes that a run needs beside its own."""
        return {"libvirtd": self.libvirt.daemon, **({"QEMU": self.vm.pid} if self.vm.alive else {})}

    def settle(self) -> None:
        """What was killed is noticed by those who look after it."""
        if not self.libvirt.daemon:
            self.libvirt.start_daemon()
        if not self.vm.alive:
            wait_until(lambda: self.vm.domain.state == "shut off", "the end of the domain")
        self.vm.forget()

    def end(self, kill: bool | None = None) -> None:
        """QEMU ends, or the storage daemon of a domain that is off."""
        kill = self.chance.random() < 0.4 if kill is None else kill
        if not self.vm.alive:
            self._end_storage_daemon(kill)
        elif kill:
            print("    QEMU is killed")
            pid = self.vm.pid
            self.vm.domain.kill()
            wait_until(lambda: not self.libvirt.seen_here(f"/proc/{pid}").exists(), "the end of QEMU")
            self.settle()
        else:
            self.virsh("destroy", NAME)
        self.truth.stale()

    def _end_storage_daemon(self, kill: bool) -> None:
        place = self.vm.storage_daemon
        if place and (place / "pid").exists():
            print(f"    the storage daemon is {'killed' if kill else 'ended'}")
            pid = int((place / "pid").read_text())
            # It may have ended.
            with contextlib.suppress(AssertionError):
                self.libvirt.send_signal(signal.SIGKILL if kill else signal.SIGTERM, pid)
            wait_until(lambda: not self.libvirt.seen_here(f"/proc/{pid}").exists(), "the end of the storage daemon")

    def begin(self) -> None:
        """The domain is started, with the memory that it had when it was saved; that is refused while it is copied."""
        if self.vm.alive:
            return
        copied = self.vm.storage_daemon is not None
        words = ("restore", self.state) if self.state else ("start", NAME)
        if self.virsh(*words, may_fail=copied):
            self.state, self.asleep = None, False
        self.truth.stale()
