# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe what is asked of a verification, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._repository.annotations import DEPTHS, Depth

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.documents import DiskImage, Manifest
    from .boot_options import BootOptions

    ImageKey = tuple[str, str]
    """The id of a set and the name of a disk."""
    SetImage = tuple[Manifest, DiskImage]
    """An image with the set that it is in."""


REMEDY = "bring the file back from a copy of the repository, or make a new full backup (level: full)"


@dataclass(frozen=True)
class VerifyOptions:
    """What is asked for. C(boot) is there for the depth that needs it."""

    depth: Depth
    boot: BootOptions | None = None
    check_mode: bool = False

    def includes(self, depth: Depth) -> bool:
        """Return whether a depth is to be checked."""
        return DEPTHS.index(depth) <= DEPTHS.index(self.depth)


@dataclass(frozen=True)
class Finding:
    """What was found of one disk of a set; of the set as a whole where C(disk) is empty.

    C(depth) is how deep the check went: where there is an error, to it. C(is_backup_fault) is false of an error that
    says nothing about the set, such as that there is no room for a throwaway VM.
    """

    vm: str
    id: str
    disk: str
    depth: Depth
    error: str = ""
    note: str = ""
    console: tuple[str, ...] = ()
    is_backup_fault: bool = True

    @property
    def set_name(self) -> str:
        return f"{self.vm}/{self.id}"

    @property
    def text(self) -> str:
        return f"disk {self.disk}: {self.error}" if self.disk else self.error

    @property
    def full_text(self) -> str:
        return f"VM {self.vm}" + (f", set {self.id}" if self.id else "") + f": {self.text}"

    def result(self) -> dict[str, Any]:
        """Return an entry of the module's return value C(results)."""
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
class SetCheck:
    """The check of one set. C(chains) are the images of the disks that are good so far, each one's own first.

    C(findings) are what was found wrong, by disk; C(damaged) the same of images.
    """

    catalog: VmCatalog
    manifest: Manifest
    chains: dict[str, list[SetImage]] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    damaged: dict[ImageKey, Finding] = field(default_factory=dict)

    def fail(self, disk: str, depth: Depth, error: str, **more: Any) -> None:
        """Note what is wrong; a broken disk is not checked any deeper."""
        self.findings[disk] = Finding(self.catalog.name, self.manifest.id, disk, depth, error, **more)
        self.chains.pop(disk, None)

    def images(self) -> dict[ImageKey, SetImage]:
        """Return the images of all good chains, each once."""
        return {
            (manifest.id, image.name): (manifest, image) for chain in self.chains.values() for manifest, image in chain
        }

    def faults(self) -> list[Finding]:
        """Return what is wrong with the set."""
        return [finding for finding in self.findings.values() if finding.is_backup_fault]

    def fail_images(self, depth: Depth, errors: dict[ImageKey, str]) -> None:
        """Fail the disks that need one of these images."""
        self.damaged.update({key: Finding(self.catalog.name, *key, depth, error) for key, error in errors.items()})
        for disk, chain in list(self.chains.items()):
            keys = [(manifest.id, image.name) for manifest, image in chain]
            reasons = [errors[key] for key in keys if key in errors]
            if reasons:
                self.fail(disk, depth, "; ".join(reasons))


def bad_sets(findings: Iterable[Finding]) -> list[str]:
    """Return the sets that are not good, each as C(VM/ID)."""
    return list(dict.fromkeys(finding.set_name for finding in findings if finding.error))


def headline(findings: Sequence[Finding]) -> str:
    """Return how many of the sets are good."""
    sets = {finding.set_name for finding in findings}
    return f"{len(sets) - len(bad_sets(findings))} of {len(sets)} sets are good"


def describe(findings: Sequence[Finding]) -> list[str]:
    """Return what was found for people to read, first what is not good."""
    lines = []
    for finding in findings:
        if finding.error:
            disk = f"{finding.disk}: " if finding.disk else ""
            lines.append(f"NOT GOOD  {finding.set_name}  {disk}{finding.error}")
            lines += [f"          | {line}" for line in finding.console]
    bad = bad_sets(findings)
    good: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda one: (one.vm.casefold(), one.id.casefold())):
        if finding.set_name not in bad:
            good.setdefault(finding.set_name, []).append(finding)
    for name, found in good.items():
        disks = ", ".join(finding.disk for finding in found if finding.disk)
        lines.append(f"good      {name}  {disks}")
        lines += [f"          {finding.note}" for finding in found if finding.note]
    return lines
