# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe what is asked of a verification, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._repository.catalog import Depth

if TYPE_CHECKING:
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.documents import DiskImage, Manifest
    from . import boot_options

    Step = tuple[Manifest, DiskImage]

    Key = tuple[str, str]


LOOKS = 3
"""How often a set is looked at that others change meanwhile."""
REMEDY = "bring the file back from a copy of the repository, or make a new full backup (level: full)"


@dataclass(frozen=True)
class VerifyOptions:
    """What is asked for. C(boot) is there for the depth that needs it."""

    depth: str
    boot: boot_options.BootOptions | None = None
    check_mode: bool = False


@dataclass(frozen=True)
class Finding:
    """What is found of one disk of a set; of the set as a whole where C(disk) is empty.

    C(depth) is how deep the look went: where there is an error, to it. C(guilty) is false of an error that says nothing
    about the set that is not said elsewhere, such as that there is no room for a throwaway VM.
    """

    vm: str
    id: str
    disk: str
    depth: str
    error: str = ""
    note: str = ""
    console: tuple[str, ...] = ()
    guilty: bool = True

    @property
    def text(self) -> str:
        return f"disk {self.disk}: {self.error}" if self.disk else self.error

    @property
    def where(self) -> str:
        return f"VM {self.vm}" + (f", set {self.id}" if self.id else "") + f": {self.text}"

    def result(self) -> dict[str, Any]:
        """An entry of the module's return value C(results)."""
        found: dict[str, Any] = {
            "vm": self.vm,
            "id": self.id,
            "disk": self.disk,
            "depth": self.depth,
            "ok": not self.error,
            "error": self.error,
            "note": self.note,
        }
        return {**found, "console": list(self.console)} if self.depth == Depth.BOOT and not self.disk else found


@dataclass
class Look:
    """One look at one set. C(chains) are the images of the disks that are good so far, each one's own first.

    C(findings) are what was found wrong, by disk; C(damaged) the same of images, by set id and disk.
    """

    held: VmCatalog
    manifest: Manifest
    chains: dict[str, list[Step]] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    damaged: dict[Key, Finding] = field(default_factory=dict)

    def fail(self, disk: str, depth: str, error: str, **more: Any) -> None:
        """Note what is wrong; a broken disk is not looked at any deeper."""
        self.findings[disk] = Finding(self.held.name, self.manifest.id, disk, depth, error, **more)
        self.chains.pop(disk, None)

    def images(self) -> dict[Key, Step]:
        """The images of all good chains, each once."""
        return {(step[0].id, step[1].name): step for steps in self.chains.values() for step in steps}

    def guilty(self) -> list[Finding]:
        """What is wrong with the set."""
        return [finding for finding in self.findings.values() if finding.guilty]

    def note_damage(self, depth: str, damaged: dict[Key, str]) -> None:
        """Fail the disks that need one of these images."""
        self.damaged.update({key: Finding(self.held.name, *key, depth, error) for key, error in damaged.items()})
        for disk, steps in list(self.chains.items()):
            keys = [(manifest.id, image.name) for manifest, image in steps]
            reasons = [damaged[key] for key in keys if key in damaged]
            if reasons:
                self.fail(disk, depth, "; ".join(reasons))
