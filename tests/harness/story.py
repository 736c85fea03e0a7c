# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A domain of libvirt to which things happen between its sets and while one is made."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

SIZE = 8 * MIB
WEB01 = "libvirt:web01"
TARGETS = ("vda", "sda")


class Story:
    """A domain with two disks, its sets, and what its disks held at the moment of each."""

    def __init__(self, libvirt: Libvirt, directory: Path, **hardware: t.Any) -> None:
        self.sets = Sets(directory / "repository", libvirt.inside)
        self.directory = directory
        self.frozen: dict[str, dict[str, Path]] = {}
        # A disk on SCSI can be detached without the guest's consent.
        self.domain: Domain = libvirt.start(
            "web01",
            DomainDisk(patterned(directory / "a.qcow2", size=SIZE)),
            DomainDisk(patterned(directory / "b.qcow2", size=SIZE, seed=32), "sda", "scsi"),
            **hardware,
        )

    def write(self, number: int) -> None:
        """Write to both disks, in other places for each number."""
        for target in TARGETS:
            self.domain.write(target, number, number * 196608, 65536)

    def freeze(self, set_id: str) -> None:
        """Remember what the disks hold."""
        self.frozen[set_id] = {
            target: self.domain.freeze(target, self.directory / f"{set_id}-{target}") for target in TARGETS
        }

    def back_up(self, number: int) -> dict[str, str]:
        """Write, and make a set; returns its levels."""
        self.write(number)
        self.freeze(f"s{number}")
        self.sets.back_up(WEB01, id=f"s{number}")
        return self.sets.levels("web01", f"s{number}")

    def begin(self, number: int) -> dict[str, t.Any]:
        """Write, and start a set whose copies rest; returns the plan."""
        self.write(number)
        self.freeze(f"s{number}")
        return self.sets.start(WEB01, id=f"s{number}", level="full", speed="64K")

    def release(self) -> None:
        """Take the brake off all jobs."""
        for job in self.domain.qmp("query-block-jobs"):
            # One that has copied everything meanwhile has no brake any more.
            if job["status"] == "running":
                self.domain.qmp("block-job-set-speed", device=job["device"], speed=0)

    def attach(self) -> None:
        """Attach the overlay of the second disk again."""
        image = self.directory / "over-sda"
        self.domain.virsh("attach-disk", image, "sda", "--targetbus", "scsi", "--subdriver", "qcow2", "--live")

    def finish(self, plan: dict[str, t.Any], state: str = "completed") -> dict[str, t.Any]:
        """Bring a set to its end."""
        self.release()
        return result_of(succeed("backup_set", {"plan": plan, "state": state}, inside=self.sets.inside), "web01")

    def assert_good(self) -> None:
        """Every set holds what the disks held at its moment, and nothing of ours is left."""
        for set_id, copies in self.frozen.items():
            images = self.sets.images("web01", set_id)
            for target, copy in copies.items():
                assert identical(copy, images[target]), (set_id, target)
        assert self.domain.qmp("query-jobs") == []
        assert self.domain.qmp("query-fdsets") == []

    def snapshot(self, name: str, but: str = "") -> None:
        """Take an external snapshot of all disks, or of all but one."""
        specs = [
            f"{target},snapshot=no" if target == but else f"{target},file={self.directory}/{name}-{target}"
            for target in TARGETS
        ]
        words = [word for spec in specs for word in ("--diskspec", spec)]
        self.domain.virsh("snapshot-create-as", "--no-metadata", "--disk-only", "--name", name, *words)

    def refused(self, command: str, *words: str | Path) -> str:
        """Try a command of virsh that has to fail; returns what it says."""
        told = self.domain.libvirt.attempt("virsh", command, "--domain", "web01", *words)
        assert told.returncode != 0, told.stdout
        return told.stderr

    @property
    def nodes(self) -> set[str]:
        """The nodes that libvirt has made in QEMU for disks."""
        found = {node["node-name"] for node in self.domain.qmp("query-named-block-nodes", flat=True)}
        return {name for name in found if re.match(r"libvirt-\d+-", name)}
