# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read what is said of published sets, which stay as they are: protected, in use by an overlay, verified.

C(.<set id>.protected.json), C(.<set id>.pin-<8 hex>.json) and C(.<set id>.verified.json) stand in the VM's directory.
They have the fields of the classes here. C(published.py) writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from .._common.fields import NAME, NUMBER_OF_SCHEMA, TEXT, TIME, Document, Newer, Said, Several, holds
from .._common.formats import SCHEMA, Word
from .._host.directory import WrongEntry
from .documents import ATTEMPT, LARGE, SET_ID
from .json_file import read_document, warn_of
from .names import mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .documents import Manifest
    from .repository import Repository


SUFFIX = ".json"
PROTECTED = ".protected"
VERIFIED = ".verified"
PIN = ".pin-"


class Depth(Word):
    """How deep a verification looks. Each depth includes those before it."""

    MANIFEST = "manifest"
    CHECKSUM = "checksum"
    IMAGE = "image"
    BOOT = "boot"
    """That a guest does not start says nothing of the sets that build on its own."""


DEPTHS = tuple(Depth)
"""From the least deep to the deepest."""


@dataclass(frozen=True)
class Protection(Document):
    """A set that is not to be removed, whatever the rules say."""

    id: str = field(metadata=SET_ID)
    since: str = field(metadata=TIME)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)


@dataclass(frozen=True)
class Pin(Document):
    """Somebody's overlay on an image of a set: C(path) on the machine C(host), made by which that image is read.

    C(mount) and C(file_system) are the place of an overlay (C(_host/mounts.py)). They are empty where it goes with its
    file system, and in what version 0.1.0 has written.
    """

    id: str = field(metadata=SET_ID)
    disk: str = field(metadata=NAME)
    path: str = field(metadata=NAME)
    host: str = field(metadata=TEXT)
    machine_id: str = field(metadata=TEXT)
    since: str = field(metadata=TIME)
    mount: str = field(default="", metadata=TEXT)
    file_system: str = field(default="", metadata=TEXT)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)


@dataclass(frozen=True)
class Verification(Document):
    """How the last look at a set of this C(attempt) ended. C(errors) are empty where all was well."""

    MOST: ClassVar[int] = LARGE

    id: str = field(metadata=SET_ID)
    attempt: str = field(metadata=ATTEMPT)
    depth: Depth = field(metadata=holds(Newer(Depth)))
    when: str = field(metadata=TIME)
    errors: tuple[str, ...] = field(default=(), metadata=holds(Several(Said())))
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)

    @property
    def ok(self) -> bool:
        return not self.errors


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


def annotation_name(annotation: Protection | Pin | Verification) -> str:
    """Return the name of an annotation in its VM's directory."""
    if isinstance(annotation, Pin):
        # One overlay has one pin, however often it is made.
        suffix = PIN + mark(f"{annotation.machine_id}:{annotation.path}")
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
