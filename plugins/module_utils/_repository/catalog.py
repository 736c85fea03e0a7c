# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read all that a repository holds of a VM, for restore, verify, prune and reports. Needs no QEMU and no locks."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused
from .._common.formats import parse_time
from .annotations import annotation_path, failed_sets, is_read, read_annotations
from .chain import broken_images, walk
from .documents import Intent
from .names import vm_directory
from .repository import FAILED, HARMLESS, INTENT, STAGING, read_document
from .staging import litter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from .annotation_documents import Pin, Protection, Verification
    from .annotations import SetAnnotations
    from .documents import DiskImage, Manifest
    from .repository import Repository, VmRecords


CONSOLIDATING_SUFFIX = ".consolidating"
"""What the name of a hidden file ends with in which an increment becomes a full image."""
MAX_NAMES = 30
"""VMs that are listed where one is not found."""


@dataclass(frozen=True)
class VmCatalog:
    """One VM in a repository. C(broken) says, by set id and disk, why an image cannot be read whole."""

    name: str
    records: VmRecords
    annotations: SetAnnotations
    broken: Mapping[tuple[str, str], str]

    @property
    def broken_sets(self) -> dict[str, str]:
        """Return why sets cannot be restored whole, by id."""
        found: dict[str, str] = {}
        for (set_id, disk), reason in self.broken.items():
            found.setdefault(set_id, f"disk {disk}: {reason}")
        return found

    @property
    def failed_sets(self) -> dict[str, str]:
        """Return why sets are not to be relied on, by id."""
        return failed_sets(self.records.sets, self.annotations)

    def find(self, set_id: str = "", before: datetime | None = None) -> Manifest:
        """Return the set with this id, or the newest one, or the newest that was begun no later than C(before)."""
        if set_id:
            found = self.records.published(set_id)
            if found is None:
                raise Refused("id", f"VM {self.name} has no set {set_id}; it has: {self._ids()}")
            return found
        fitting = [one for one in self.records.sets if before is None or start_time(one) <= before]
        if not fitting:
            when = f" from before {before.isoformat()}" if before else ""
            raise Refused("before" if before else "vm", f"VM {self.name} has no set{when}; it has: {self._ids()}")
        return fitting[-1]

    def chain(self, manifest: Manifest, disk: str) -> list[tuple[Manifest, DiskImage]]:
        """Return the images that make up a disk of a set, its own first. BackupError names the one that is missing."""
        reason = self.broken.get((manifest.id, disk), "")
        steps, broken = walk(self.records.sets, manifest, disk)
        if broken or reason:
            raise BackupError(f"VM {self.name}, set {manifest.id}, disk {disk}: {reason or broken}")
        return steps

    def _ids(self) -> str:
        return ", ".join(one.id for one in self.records.sets) or "none"


def read_catalog(repository: Repository, vm: str) -> VmCatalog:
    """Read all that a repository holds of one VM."""
    records = repository.records(vm)
    return VmCatalog(vm, records, read_annotations(repository, vm), broken_images(records.sets, repository.damage))


def leftovers(repository: Repository, catalog: VmCatalog) -> list[dict[str, str]]:
    """Return what stands in a VM's directory besides sets, and what it is."""

    def found(path: str, what: str) -> dict[str, str]:
        return {"vm": catalog.name, "path": path, "what": what}

    records = catalog.records
    left = [
        found(
            repository.staging_path(catalog.name, intent.id),
            f"set {intent.id} is being made by hypervisor {intent.hypervisor.name} since {intent.started}",
        )
        for intent in records.intents
    ]
    left += [
        found(repository.failure_path(catalog.name, failure.id), f"set {failure.id} {failure.state}: {failure.error}")
        for failure in records.failures
    ]
    left += [
        found(repository.set_path(catalog.name, stray), "no set: no valid manifest") for stray in sorted(records.strays)
    ]
    left += [
        found(repository.note_path(catalog.name, note.id), f"set {note.id} becomes a full one; the next prune goes on")
        for note in records.notes
    ]
    left += [found(path, said) for path, said in _stale_annotations(repository, catalog)]
    left += [
        found(path, "an increment that becomes a full image, or was to; the next prune goes on")
        for path in consolidating_files(repository, catalog.name)
    ]
    return left + [found(path, "left by a process that was killed") for path in litter(repository, catalog.name)]


def _stale_annotations(repository: Repository, catalog: VmCatalog) -> Iterator[tuple[str, str]]:
    """Return the annotations that nobody needs any more, each with the reason."""
    there = {manifest.id for manifest in catalog.records.sets} | catalog.records.strays
    annotations: list[Protection | Verification | Pin] = [
        *catalog.annotations.protections,
        *catalog.annotations.verifications,
        *catalog.annotations.pins,
    ]
    for annotation in annotations:
        if annotation.id not in there:
            yield annotation_path(repository, catalog.name, annotation), f"said of set {annotation.id}, which is gone"
    for pin in catalog.annotations.pins:
        if pin.id in there and not is_read(pin):
            yield annotation_path(repository, catalog.name, pin), f"{pin.path}, which has read set {pin.id}, is gone"


def consolidating_files(repository: Repository, vm: str) -> list[str]:
    """Return the files in which increments become full images, or were to."""
    directory = repository.directory(vm)
    entries = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    return [
        os.path.join(directory, entry)
        for entry in entries
        if entry.startswith(".") and entry.endswith(CONSOLIDATING_SUFFIX)
    ]


def require_sets(repository: Repository, catalog: VmCatalog) -> None:
    """Refuse a VM that a repository has no set of, and tell of which it has some: mostly the name is misspelt."""
    if catalog.records.sets:
        return
    known = vm_names(repository)
    more = f" and {len(known) - MAX_NAMES} others" if len(known) > MAX_NAMES else ""
    raise Refused(
        "vm", f"VM {catalog.name} has no set; the repository knows of: {', '.join(known[:MAX_NAMES]) or 'none'}{more}"
    )


def vm_names(repository: Repository) -> list[str]:
    """Return the VMs that a repository has sets of, is getting some, or was to, by the names in their documents."""
    names = set()
    for directory in glob.glob(os.path.join(glob.escape(repository.path), "*", "")):
        entry = os.path.basename(os.path.dirname(directory))
        if entry in HARMLESS:
            continue
        try:
            found = repository.any_manifest(directory) or _any_intent(directory)
            used = not found and _was_used(repository, entry)
        except (BackupError, OSError):
            # Whoever reads this VM tells why it cannot be read.
            found, used = None, True
        if found:
            names.add(found.vm.name)
        elif used and vm_directory(entry) == entry:
            names.add(entry)
    return sorted(names)


def _any_intent(directory: str) -> Intent | None:
    """Return some intent in a VM's directory."""
    paths = glob.glob(os.path.join(glob.escape(directory), f".*{STAGING}", INTENT))
    return next((intent for intent in (read_document(path, Intent) for path in paths) if intent), None)


def _was_used(repository: Repository, vm: str) -> bool:
    """Return whether there are traces of sets of a VM that has none."""
    failed = glob.glob(os.path.join(glob.escape(repository.directory(vm)), f".*{FAILED}"))
    return bool(failed or litter(repository, vm))


def start_time(manifest: Manifest) -> datetime:
    """Return when a set was begun."""
    return parse_time(manifest.started)
