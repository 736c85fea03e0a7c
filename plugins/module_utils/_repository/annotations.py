# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Annotate published sets, which stay as they are: protected, in use by an overlay, verified.

C(.<set id>.protected.json), C(.<set id>.pin-<8 hex>.json) and C(.<set id>.verified.json) stand in the VM's directory.
What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from .._host.directory import WrongEntry
from .._host.process import machine_id
from .annotation_documents import DEPTHS, Depth, Pin, Protection, Verification
from .json_file import read_document, warn_of, write_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .documents import Manifest
    from .repository import Repository


SUFFIX = ".json"
PROTECTED = ".protected"
VERIFIED = ".verified"
PIN = ".pin-"
PARTIAL = ".partial"
"""What the name of a restored disk ends with until it is complete."""


@dataclass(frozen=True)
class SetAnnotations:
    """All that is said of the sets of one VM. C(odd) is that of VmRecords, of the annotations."""

    protections: tuple[Protection, ...] = ()
    pins: tuple[Pin, ...] = ()
    verifications: tuple[Verification, ...] = ()
    odd: dict[str, str] = field(default_factory=dict)

    def protected(self, set_id: str) -> bool:
        """Return whether a set is protected."""
        return any(annotation.id == set_id for annotation in self.protections)

    def pins_of(self, set_id: str) -> tuple[Pin, ...]:
        """Return the pins on the images of a set."""
        return tuple(annotation for annotation in self.pins if annotation.id == set_id)

    def verification(self, manifest: Manifest) -> Verification | None:
        """Return how the last verification of a set ended; None for one that was never verified."""
        return self._verified.get(manifest.attempt)

    @cached_property
    def _verified(self) -> dict[str, Verification]:
        return {annotation.attempt: annotation for annotation in self.verifications}


def read_annotations(repository: Repository, vm: str) -> SetAnnotations:
    """Read what is said of the sets of one VM, whether they are still there or not."""
    kinds: dict[Any, list[Any]] = {Protection: [], Pin: [], Verification: []}
    odd: dict[str, str] = {}
    try:
        directory = repository.opened(vm)
    except FileNotFoundError:
        return SetAnnotations()
    with directory:
        for name in directory.names():
            kind = _kind(name[1 : -len(SUFFIX)]) if name[0] == "." and name.endswith(SUFFIX) else None
            if kind:
                try:
                    kinds[kind].append(read_document(directory, name, kind, misplaced=_misplaced(name)))
                except WrongEntry as error:
                    odd[name] = str(error)
        warn_of(directory, odd)
    protections, pins, verifications = (tuple(filter(None, found)) for found in kinds.values())
    return SetAnnotations(protections, pins, verifications, odd)


def _misplaced(name: str) -> Callable[[Any], str]:
    return lambda found: "" if annotation_name(found) == name else f"it is of set {found.id}, or of something else"


def _kind(stem: str) -> Any:
    if stem.endswith(PROTECTED):
        return Protection
    if stem.endswith(VERIFIED):
        return Verification
    return Pin if PIN in stem else None


def is_read(pin: Pin) -> bool:
    """Return whether what a pin stands for is still there. Only the machine that it is on can say that it is gone."""
    return pin.machine_id != machine_id() or any(may_be_there(pin.path + end) for end in ("", PARTIAL))


def may_be_there(path: str) -> bool:
    """Return False only where there is certainly nothing. A path that this user may not look up may be there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def write_annotation(repository: Repository, vm: str, annotation: Protection | Pin | Verification) -> None:
    """Write an annotation, in place of the one of its kind."""
    with repository.opened(vm) as directory:
        write_document(directory, annotation_name(annotation), annotation)


def remove_annotations(repository: Repository, vm: str, annotations: Iterable[Protection | Pin | Verification]) -> None:
    """Remove annotations."""
    with repository.opened(vm) as directory:
        for annotation in annotations:
            directory.remove(annotation_name(annotation))
        directory.sync()


def annotation_name(annotation: Protection | Pin | Verification) -> str:
    """Return the name of an annotation in its VM's directory."""
    if isinstance(annotation, Pin):
        # One overlay has one pin, however often it is made.
        place = f"{annotation.machine_id}:{annotation.path}".encode("utf-8", "surrogateescape")
        suffix = PIN + hashlib.sha256(place).hexdigest()[:8]
    else:
        suffix = PROTECTED if isinstance(annotation, Protection) else VERIFIED
    return f".{annotation.id}{suffix}{SUFFIX}"


def failed_sets(sets: Iterable[Manifest], annotations: SetAnnotations) -> dict[str, str]:
    """Return why sets are not to be relied on, by id: their verification has failed, or that of a set below them.

    A later and as deep verification of a set itself outweighs that of a set below it.
    """
    reasons: dict[str, str] = {}
    suspects: dict[str, Verification] = {}
    for manifest in sets:
        own = annotations.verification(manifest)
        below = (suspects.get(disk.parent.id) for disk in manifest.disks if disk.parent)
        suspect = next((found for found in below if found and not (own and _outweighs(own, found))), None)
        if suspect:
            reasons[manifest.id] = f"set {suspect.id} below it has failed its verification: {suspect.errors[0]}"
        unread = annotations.odd.get(f".{manifest.id}{VERIFIED}{SUFFIX}")
        if unread:
            # What it says may be that the set is bad.
            reasons[manifest.id] = unread
        if own and not own.ok:
            reasons[manifest.id] = own.errors[0]
            suspect = suspect if own.depth == Depth.BOOT else own
        if suspect:
            suspects[manifest.id] = suspect
    return reasons


def _outweighs(own: Verification, below: Verification) -> bool:
    as_deep = own.depth in DEPTHS and below.depth in DEPTHS and DEPTHS.index(own.depth) >= DEPTHS.index(below.depth)
    return own.ok and as_deep and own.when >= below.when
