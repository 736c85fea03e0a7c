# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the fields of a repository's JSON files: manifests, intents, failures, annotations.

The files have the fields of these classes. Times are UTC (ISO 8601), sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from .._common.formats import COLLECTION_VERSION, SCHEMA, Word, read_words
from .._host.process import Hypervisor

if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")


class Level(Word):
    """How much of a disk an image holds. C(AUTO) is only asked for, never made."""

    AUTO = "auto"
    FULL = "full"
    INCREMENTAL = "incremental"
    """What has changed since the set before."""
    DIFFERENTIAL = "differential"
    """What has changed since the newest full set."""


class Phase(Word):
    """How far an attempt had come when its intent was written."""

    PREPARING = "preparing"
    """Images may exist, and the jobs may have been started a moment ago."""
    COPYING = "copying"
    """QEMU has started the jobs."""


class Depth(Word):
    """How deep a verification looks. Each depth includes those before it."""

    MANIFEST = "manifest"
    CHECKSUM = "checksum"
    IMAGE = "image"
    BOOT = "boot"
    """That a guest does not start says nothing of the sets that build on its own."""


DEPTHS = tuple(Depth)
"""From the least deep to the deepest."""
MERGED = ".merged"
"""What is added to the name of an image's bitmap for the one that its increment is made from, across layers."""


class DocumentError(ValueError):
    """A file does not say what a file of its kind says."""


class NewerSchema(DocumentError):
    """A later release of the collection wrote the file."""


@dataclass(frozen=True)
class Parent:
    """The set that an increment builds on, and its image for this disk.

    C(attempt) tells that set from another one of the same id; C(sha256) is None where no checksum was asked for.
    """

    id: str
    sha256: str | None
    attempt: str = ""


@dataclass(frozen=True)
class DiskImage:
    """One disk in a set. C(sha256) is None where no checksum was asked for, C(bytes) is the image file's size.

    C(bitmap) records the writes since this image, on the disk C(node); None where changes are not tracked.
    C(layers) are the files below C(source), the nearest first, as they were when the set was made.
    C(source_encrypted) says that the disk was encrypted where it stood, which its image is not; None in the sets of a
    release that did not look.
    """

    name: str
    node: str
    qdev: str
    source: str
    source_format: str
    virtual_size: int
    level: Level
    reason: str
    parent: Parent | None
    image: str
    format: str
    compression: str
    bytes: int = 0
    sha256: str | None = None
    bitmap: str | None = None
    layers: tuple[str, ...] = ()
    source_encrypted: bool | None = None

    @property
    def merged(self) -> str:
        """Return the bitmap from which an increment is copied whose changes several layers have recorded."""
        return f"{self.bitmap}{MERGED}" if self.bitmap else ""

    @classmethod
    def parse(cls, found: Any) -> DiskImage:
        parent = found.get("parent")
        layers = tuple(found.get("layers", ()))
        parsed = {**found, "layers": layers, "parent": _build(Parent, parent) if parent else None}
        read_words(parsed, level=Level)
        return _build(cls, parsed)


@dataclass(frozen=True)
class VmName:
    """Which VM a set is of. C(identity) is its uuid, or machine-id:name where it has none."""

    name: str
    identity: str
    uuid: str


@dataclass(frozen=True)
class Manifest:
    """A finished set. C(frozen_ms) is how long the guest's file systems were frozen for it."""

    repository: str
    vm: VmName
    id: str
    sequence: int
    level: Level
    run: str
    attempt: str
    started: str
    finished: str
    duration: float
    consistency: str
    qemu: str
    disks: tuple[DiskImage, ...]
    hypervisor: Hypervisor | None = None
    monitor: str = ""
    consistency_reason: str = ""
    frozen_ms: int = 0
    collection: str = COLLECTION_VERSION
    schema: int = SCHEMA

    @property
    def bytes(self) -> int:
        return sum(disk.bytes for disk in self.disks)

    def disk(self, name: str) -> DiskImage | None:
        return next((disk for disk in self.disks if disk.name == name), None)

    @classmethod
    def parse(cls, found: Any) -> Manifest:
        _check_schema(found)
        try:
            maker = found.get("hypervisor")
            parsed = {
                **found,
                "vm": _build(VmName, found["vm"]),
                "disks": tuple(DiskImage.parse(disk) for disk in found["disks"]),
                "hypervisor": _build(Hypervisor, maker) if maker else None,
            }
            read_words(parsed, level=Level)
            return _build(cls, parsed)
        except (KeyError, TypeError, AttributeError) as error:
            raise DocumentError(f"it is no manifest: {error!r}") from error


@dataclass(frozen=True)
class StagedDisk:
    """One disk of a set that grows: what the manifest will say of it, its job, and the bytes that the job may write."""

    image: DiskImage
    job: str
    expected: int
    inode: int = 0


@dataclass(frozen=True)
class Intent:
    """Who is making a set, from when on and how. It is the lock on the set's id between two looks at the jobs.

    C(begun) and C(deadline) are seconds of the hypervisor's CLOCK_BOOTTIME: nobody sets that clock.
    C(guest) is the VM's status at the start. C(process) is QEMU's pid and start time, empty over TCP. C(frozen) says
    that the guest's file systems may be frozen by us, through the agent's socket C(agent). C(progress) is where a set
    stood that did not advance while it was last watched: bytes copied, and since when, by that clock. C(spaces) are
    the name spaces in which C(process) and C(monitor) mean what they say; documents of before do not have them.
    """

    run: str
    attempt: str
    id: str
    vm: VmName
    hypervisor: Hypervisor
    monitor: str
    process: tuple[int, ...]
    level: Level
    consistency: str
    qemu: str
    guest: str
    started: str
    begun: float
    deadline: float | None
    checksum: bool
    disks: tuple[StagedDisk, ...]
    phase: Phase = Phase.PREPARING
    reserved: bool = False
    agent: str = ""
    frozen: bool = False
    frozen_ms: int = 0
    consistency_reason: str = ""
    progress: tuple[int, float] | tuple[()] = ()
    spaces: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def jobs(self) -> tuple[str, ...]:
        return tuple(disk.job for disk in self.disks)

    @property
    def bitmaps(self) -> frozenset[str]:
        """Return the bitmaps that this attempt may have added."""
        names = (name for disk in self.disks for name in (disk.image.bitmap, disk.image.merged))
        return frozenset(name for name in names if name)

    @classmethod
    def parse(cls, found: Any) -> Intent:
        _check_schema(found)
        try:
            disks = tuple(
                _build(StagedDisk, {**disk, "image": DiskImage.parse(disk["image"])}) for disk in found["disks"]
            )
            parsed = {
                **found,
                "vm": _build(VmName, found["vm"]),
                "hypervisor": _build(Hypervisor, found["hypervisor"]),
                "process": tuple(found["process"]),
                "progress": tuple(found.get("progress", ())),
                "disks": disks,
            }
            read_words(parsed, level=Level, phase=Phase)
            return _build(cls, parsed)
        except (KeyError, TypeError, AttributeError) as error:
            raise DocumentError(f"it is no intent: {error!r}") from error


@dataclass(frozen=True)
class Failure:
    """How the last attempt at a set ended that did not end well. C(state) is failed or cancelled."""

    run: str
    attempt: str
    id: str
    state: str
    error: str
    started: str
    ended: str
    schema: int = field(default=SCHEMA)

    @classmethod
    def parse(cls, found: Any) -> Failure:
        return _parse(cls, found, "record of a failure")


@dataclass(frozen=True)
class Protection:
    """A set that is not to be removed, whatever the rules say."""

    id: str
    since: str
    schema: int = SCHEMA

    @classmethod
    def parse(cls, found: Any) -> Protection:
        return _parse(cls, found, "mark of protection")


@dataclass(frozen=True)
class Pin:
    """Somebody's overlay on an image of a set: C(path) on the machine C(host), made by which that image is read."""

    id: str
    disk: str
    path: str
    host: str
    machine_id: str
    since: str
    schema: int = SCHEMA

    @classmethod
    def parse(cls, found: Any) -> Pin:
        return _parse(cls, found, "pin")


@dataclass(frozen=True)
class Verification:
    """How the last look at a set of this C(attempt) ended. C(errors) are empty where all was well."""

    id: str
    attempt: str
    depth: Depth
    when: str
    errors: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        return not self.errors

    @classmethod
    def parse(cls, found: Any) -> Verification:
        _check_schema(found)
        parsed = {**found, "errors": tuple(found.get("errors", ()))}
        read_words(parsed, depth=Depth)
        return _parse(cls, parsed, "verification")


@dataclass(frozen=True)
class Consolidation:
    """An increment of the set C(id) becomes a full image: C(image) is what the manifest is going to say of it.

    While this stands, the file may be the one or the other, and their sizes tell which.
    """

    id: str
    attempt: str
    image: DiskImage
    schema: int = SCHEMA

    @classmethod
    def parse(cls, found: Any) -> Consolidation:
        _check_schema(found)
        try:
            return _build(cls, {**found, "image": DiskImage.parse(found["image"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise DocumentError(f"it is no note of a consolidation: {error!r}") from error


@dataclass(frozen=True)
class Restoration:
    """What stands beside a restored disk: where it came from, and what its file is known by.

    C(mtime) is in nanoseconds.
    """

    repository: str
    vm: str
    id: str
    attempt: str
    disk: str
    method: str
    format: str
    inode: int
    size: int
    mtime: int
    when: str
    schema: int = SCHEMA

    @classmethod
    def parse(cls, found: Any) -> Restoration:
        return _parse(cls, found, "receipt of a restore")


def _parse(cls: type[T], found: Any, what: str) -> T:
    _check_schema(found)
    try:
        return _build(cls, found)
    except TypeError as error:
        raise DocumentError(f"it is no {what}: {error!r}") from error


def _check_schema(found: Any) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        raise DocumentError("it has no schema number")
    if found["schema"] > SCHEMA:
        raise NewerSchema("its schema {} is newer than this collection; update vmfleet.backup".format(found["schema"]))


def _build(cls: type[T], found: dict[str, Any]) -> T:
    """Build an object of C(cls), without fields that a later release has added to the same schema."""
    try:
        return cls(**found)
    except TypeError:
        names = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in found.items() if name in names})
