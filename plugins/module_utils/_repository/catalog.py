# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read all that a repository holds of a VM, for restore, verify, prune and reports. Needs no QEMU and no locks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused
from .._common.formats import parse_time
from .._host.directory import Directory, LinkedEntry, WrongEntry
from .annotations import annotation_name, failed_sets, read_annotations
from .chain import broken_below, walk
from .pins import is_read
from .repository import DESCRIPTION, MANIFEST, failure_name, note_name, staging_name
from .staging import litter
from .vm_names import unknown_vms, vm_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from .annotations import Pin, Protection, SetAnnotations, Verification
    from .documents import DiskImage, Manifest
    from .repository import Repository, VmRecords


CONSOLIDATING_SUFFIX = ".consolidating"
"""What the name of a hidden file ends with in which an increment becomes a full image."""


@dataclass(frozen=True)
class VmCatalog:
    """One VM in a repository. C(broken) says, by set id and disk, why an image cannot be read whole."""

    name: str
    records: VmRecords
    annotations: SetAnnotations
    broken: Mapping[tuple[str, str], str]

    @property
    def odd(self) -> dict[str, str]:
        """Return, by name, which entries are something else than their names say, and what to do."""
        return {**self.records.odd, **self.annotations.odd}

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
                reason = self.records.odd.get(set_id, f"VM {self.name} has no set {set_id}; it has: {self._ids()}")
                raise Refused("id", reason)
            return found
        fitting = [one for one in self.records.sets if before is None or start_time(one) <= before]
        if not fitting:
            when = f" from before {before.isoformat()}" if before else ""
            raise Refused("before" if before else "vm", f"VM {self.name} has no set{when}; it has: {self._ids()}")
        return fitting[-1]

    def disk(self, manifest: Manifest, name: str) -> DiskImage | None:
        """Return a disk of a set by a name that it has there, or in any other set of this VM."""
        known = (names for one in self.records.sets for names in (disk.names for disk in one.disks) if name in names)
        return manifest.find(tuple(dict.fromkeys([name, *(other for names in known for other in names)])))

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
    return VmCatalog(vm, records, read_annotations(repository, vm), _broken_images(repository, vm, records))


def _broken_images(repository: Repository, vm: str, records: VmRecords) -> dict[tuple[str, str], str]:
    """Return which images of all sets cannot be read whole, by set id and disk, and why."""
    by_id = {manifest.id: manifest for manifest in records.sets}
    broken: dict[tuple[str, str], str] = {}
    directory = repository.directory(vm)
    for manifest in records.sets:
        for image in manifest.disks:
            reason = repository.damage(manifest, image, directory) or broken_below(by_id, manifest, image)
            if image.parent and image.parent.id not in by_id:
                # What may be that set, and cannot be read.
                reason = records.odd.get(image.parent.id, reason)
            if not reason and image.parent:
                reason = broken.get((image.parent.id, image.name_in_parent), "")
            if reason:
                broken[(manifest.id, image.name)] = reason
    return broken


def leftovers(repository: Repository, catalog: VmCatalog) -> list[dict[str, str]]:
    """Return what stands in a VM's directory besides sets, and what it is."""
    records = catalog.records
    left = [
        (
            staging_name(intent.id),
            f"set {intent.id} is being made by hypervisor {intent.hypervisor.name} since {intent.started}",
        )
        for intent in records.intents
    ]
    left += [
        (failure_name(failure.id), f"set {failure.id} {failure.state}: {failure.error}") for failure in records.failures
    ]
    left += [(stray, "no set: no valid manifest") for stray in sorted(records.strays - catalog.odd.keys())]
    left += catalog.odd.items()
    left += [
        (note_name(note.id), f"set {note.id} becomes a full one; the next prune goes on") for note in records.notes
    ]
    left += _stale_annotations(catalog)
    with contextlib.suppress(FileNotFoundError), repository.opened(catalog.name) as directory:
        left += [
            (name, "an increment that becomes a full image, or was to; the next prune goes on")
            for name in consolidating_files(directory)
        ]
        left += [(name, "left by a process that was killed") for name in litter(directory)]
    place = repository.directory(catalog.name)
    return [{"vm": catalog.name, "path": f"{place}/{name}", "what": what} for name, what in left]


def _stale_annotations(catalog: VmCatalog) -> Iterator[tuple[str, str]]:
    """Return the annotations that nobody needs any more, each with the reason."""
    there = {manifest.id for manifest in catalog.records.sets} | catalog.records.strays
    annotations: list[Protection | Verification | Pin] = [
        *catalog.annotations.protections,
        *catalog.annotations.verifications,
        *catalog.annotations.pins,
    ]
    for annotation in annotations:
        if annotation.id not in there:
            yield annotation_name(annotation), f"said of set {annotation.id}, which is gone"
    for pin in catalog.annotations.pins:
        if pin.id in there and not is_read(pin):
            yield annotation_name(pin), f"{pin.path}, which has read set {pin.id}, is gone"


def consolidating_files(directory: Directory) -> list[str]:
    """Return the files of a VM in which increments become full images, or were to."""
    return [name for name in directory.names() if name.startswith(".") and name.endswith(CONSOLIDATING_SUFFIX)]


def require_sets(repository: Repository, catalog: VmCatalog) -> None:
    """Refuse a VM that a repository has no set of, and tell of which it has some: mostly the name is misspelt."""
    if catalog.records.sets:
        return
    raise unknown_vms([catalog.name], vm_names(repository), repository.path, option="vm")


def require_newest(repository: Repository, catalog: VmCatalog) -> None:
    """Refuse to choose the newest set where another one, which cannot be read, may be it."""
    lost = lost_sets(repository, catalog.name, catalog.records)
    if lost:
        place = repository.directory(catalog.name)
        reasons = "; ".join(catalog.records.odd.get(one, f"{place}/{one} has no manifest") for one in lost)
        ids = ", ".join(one.id for one in catalog.records.sets) or "none"
        raise Refused("id", f"VM {catalog.name}: it is unknown which set is the newest: {reasons}. Name one of: {ids}")


def lost_sets(repository: Repository, vm: str, records: VmRecords) -> list[str]:
    """Return those of a VM's strays that have been sets, or may be; others may keep what they like there."""

    def was_set(stray: str) -> bool:
        try:
            with repository.opened(vm, stray) as place:
                names = place.names()
        except FileNotFoundError:
            return False
        except WrongEntry as error:
            # A second name of a set that is there is not odd.
            return isinstance(error, LinkedEntry) and stray in records.odd
        return any(name in (MANIFEST, DESCRIPTION) or name.endswith(".qcow2") for name in names)

    return [stray for stray in sorted(records.strays) if was_set(stray)]


def start_time(manifest: Manifest) -> datetime:
    """Return when a set was begun."""
    return parse_time(manifest.started)
