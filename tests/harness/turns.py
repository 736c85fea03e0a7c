# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A domain of libvirt that is backed up while it runs, and while it is shut off."""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import daemon_place
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

ADDRESS = "libvirt:web"


class Turns:
    """A domain of two disks that is backed up while it runs, and while it is shut off."""

    def __init__(self, libvirt: Libvirt, directory: Path, **hardware: t.Any) -> None:
        self.sets = Sets(directory / "repository", libvirt.inside)
        self.inside = libvirt.inside
        self._directory = directory
        self.disks = {
            target: patterned(directory / f"{target}.qcow2", size=8 * MIB, seed=seed)
            for seed, target in enumerate(("vda", "vdb"))
        }
        found = (DomainDisk(path, target) for target, path in self.disks.items())
        self.domain = libvirt.define("web", *found, **hardware)
        self.frozen: dict[str, dict[str, Path]] = {}

    def write(self, pattern: int, offset: int, target: str = "vda") -> None:
        """Change a disk, as the guest or as an admin does."""
        if self.domain.state == "running":
            self.domain.write(target, pattern, offset, 65536)
        else:
            write(self.disks[target], f"write -P {pattern} {offset} 65536")

    def freeze(self, set_id: str) -> None:
        """Remember what the disks hold now."""
        if self.domain.state == "running":
            for target in self.disks:
                self.domain.io(target, "flush")
        copies = {target: self._directory / f"{set_id}-{target}" for target in self.disks}
        for target, copy in copies.items():
            qemu_img("convert", "-U", "-f", "qcow2", "-O", "qcow2", self.disks[target], copy)
        self.frozen[set_id] = copies

    def plan(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        return dict(self.sets.plan(ADDRESS, id=set_id, **options)["plan"])

    def make(self, plan: dict[str, t.Any]) -> dict[str, t.Any]:
        """Bring a plan to its end; returns the result."""
        result = succeed("backup_set", {"plan": plan}, inside=self.inside)
        assert result_of(result, "web")["state"] == "published", result
        return result

    def back_up(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """Make a set of what the disks hold now; returns the result."""
        self.freeze(set_id)
        return self.make(self.plan(set_id, **options))

    def check(self, *ids: str) -> None:
        """These sets, or all, hold what the disks held at their moments."""
        for set_id, copies in self.frozen.items():
            if ids and set_id not in ids:
                continue
            images = self.sets.images("web", set_id)
            for target, copy in copies.items():
                assert identical(copy, images[target]), (set_id, target)

    def assert_released(self) -> None:
        assert not list(self.domain.libvirt.seen_here("/run/vmfleet-locks").glob(f"{daemon_place.PLACE}*"))
        assert not [name for name in self.domain.libvirt.processes.values() if name.startswith("qemu-storage")]
