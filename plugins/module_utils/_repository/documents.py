# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the fields of a repository's JSON files: manifests, intents, failures, notes; annotations have their own file.

The files have the fields of these classes, and every field has a rule. Times are UTC (ISO 8601), sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from .._common.device_names import lasting_names
from .._common.fields import (
    FLAG,
    INODE,
    NAME,
    NUMBER_OF_SCHEMA,
    SAID,
    SECONDS,
    SIZE,
    TEXT,
    TIME,
    TOKEN,
    Document,
    Flag,
    Maybe,
    Names,
    Newer,
    Number,
    OneOf,
    Several,
    Text,
    Whole,
    holds,
    part,
)
from .._common.formats import COLLECTION_VERSION, SCHEMA, Word
from .names import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    COPIED = "copied"
    """All jobs have ended well, and the storage daemon that had them was ended; or there was nothing to copy."""


LARGE = 1 << 22
"""Bytes of the largest document that speaks of disks: of sixty with a hundred layers each."""
SET_ID = holds(Text("an id of a set", pattern=ID_PATTERN))
ATTEMPT = holds(Text("the name of an attempt", pattern=TOKEN))
ATTEMPT_OR_NONE = holds(Text("the name of an attempt", pattern=f"({TOKEN})?"))
UUID_PATTERN = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
UUID = holds(Text("a uuid", pattern=UUID_PATTERN))
SHA256 = holds(Maybe(Text("a checksum", pattern="[0-9a-f]{64}")))
IMAGE = holds(Text("the name of an image file", pattern=r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\.qcow2"))
BITMAP = holds(Maybe(Text("the name of a bitmap of ours", pattern="vmfleet-[0-9a-f]{8}-[0-9a-z]{1,32}")))
JOB = holds(Text("the id of a job of ours, or nothing", pattern=rf"(vmfleet\.[0-9a-f]{{8}}\.{TOKEN}\.[0-9]{{1,4}})?"))
COMPRESSION = holds(Text("a type of compression", pattern="[a-z0-9]{1,16}"))
CONSISTENCY = holds(OneOf("crash", "filesystem"))
LEVEL = holds(Newer(Level))


@dataclass(frozen=True)
class Marker(Document):
    """What makes a directory a repository."""

    uuid: str = field(metadata=UUID)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)


MERGED = ".merged"
"""What is added to the name of an image's bitmap for the one that its increment is made from, across layers."""


@dataclass(frozen=True)
class Parent:
    """The set that an increment builds on, and its image for this disk.

    C(attempt) tells that set from another one of the same id; C(sha256) is None where no checksum was asked for.
    C(disk) is what the disk is called there, where that is another name.
    """

    id: str = field(metadata=SET_ID)
    sha256: str | None = field(metadata=SHA256)
    attempt: str = field(default="", metadata=ATTEMPT_OR_NONE)
    disk: str = field(default="", metadata=TEXT)


@dataclass(frozen=True)
class DiskImage:
    """One disk in a set. C(sha256) is None where no checksum was asked for, C(bytes) is the image file's size.

    C(bitmap) records the writes since this image, on the disk C(node); None where changes are not tracked.
    C(layers) are the files below C(source), the nearest first, as they were when the set was made.
    C(source_encrypted) says that the disk was encrypted where it stood, which its image is not; None in the sets of a
    release that did not look.
    """

    name: str = field(metadata=NAME)
    node: str = field(metadata=TEXT)
    qdev: str = field(metadata=TEXT)
    source: str = field(metadata=TEXT)
    source_format: str = field(metadata=TEXT)
    virtual_size: int = field(metadata=SIZE)
    level: Level = field(metadata=LEVEL)
    reason: str = field(metadata=TEXT)
    parent: Parent | None = field(metadata=holds(Maybe(part(Parent))))
    image: str = field(metadata=IMAGE)
    format: str = field(metadata=holds(OneOf("qcow2")))
    compression: str = field(metadata=COMPRESSION)
    bytes: int = field(default=0, metadata=SIZE)
    sha256: str | None = field(default=None, metadata=SHA256)
    bitmap: str | None = field(default=None, metadata=BITMAP)
    layers: tuple[str, ...] = field(default=(), metadata=holds(Several(Text())))
    source_encrypted: bool | None = field(default=None, metadata=holds(Maybe(Flag())))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names by which other sets may know this disk, its own first."""
        return lasting_names(self.name, self.qdev)

    @property
    def name_in_parent(self) -> str:
        """Return what the disk is called in the set that this image builds on."""
        return (self.parent.disk if self.parent else "") or self.name

    @property
    def merged(self) -> str:
        """Return the bitmap from which an increment is copied whose changes several layers have recorded."""
        return f"{self.bitmap}{MERGED}" if self.bitmap else ""


@dataclass(frozen=True)
class VmName:
    """Which VM a set is of. C(identity) is its uuid, or machine-id:name where it has none."""

    name: str = field(metadata=NAME)
    identity: str = field(metadata=NAME)
    uuid: str = field(metadata=TEXT)


VM = holds(part(VmName))


@dataclass(frozen=True)
class Hypervisor:
    """The machine that makes a set, and its boot: no QEMU outlives that."""

    name: str = field(metadata=TEXT)
    machine_id: str = field(metadata=TEXT)
    boot_id: str = field(metadata=TEXT)

    def is_same(self, other: Hypervisor) -> bool:
        """Return whether both are one machine, maybe booted again.

        Containers on a machine may have a machine-id of their own, but have its boot. Images of machines and of
        containers are cloned with their machine-id, which therefore has to come with the same name.
        """
        if self.boot_id == other.boot_id:
            return True
        return (self.machine_id, self.name) == (other.machine_id, other.name)


@dataclass(frozen=True)
class Manifest(Document):
    """A finished set. C(frozen_ms) is how long the guest's file systems were frozen for it.

    C(libvirt_uri) is that of the Intent, and C(description_sha256) that of vm.json; documents of before have neither.
    """

    MOST: ClassVar[int] = LARGE

    repository: str = field(metadata=UUID)
    vm: VmName = field(metadata=VM)
    id: str = field(metadata=SET_ID)
    sequence: int = field(metadata=holds(Whole(1)))
    level: Level = field(metadata=LEVEL)
    run: str = field(metadata=TEXT)
    attempt: str = field(metadata=ATTEMPT)
    started: str = field(metadata=TIME)
    finished: str = field(metadata=TIME)
    duration: float = field(metadata=SECONDS)
    consistency: str = field(metadata=CONSISTENCY)
    qemu: str = field(metadata=TEXT)
    disks: tuple[DiskImage, ...] = field(metadata=holds(Several(part(DiskImage), 1)))
    hypervisor: Hypervisor | None = field(default=None, metadata=holds(Maybe(part(Hypervisor))))
    monitor: str = field(default="", metadata=TEXT)
    libvirt_uri: str = field(default="", metadata=TEXT)
    consistency_reason: str = field(default="", metadata=TEXT)
    frozen_ms: int = field(default=0, metadata=SIZE)
    description_sha256: str | None = field(default=None, metadata=SHA256)
    collection: str = field(default=COLLECTION_VERSION, metadata=TEXT)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)

    @property
    def bytes(self) -> int:
        return sum(disk.bytes for disk in self.disks)

    def disk(self, name: str) -> DiskImage | None:
        for disk in self.disks:
            if disk.name == name:
                return disk
        return None

    def find(self, names: Sequence[str]) -> DiskImage | None:
        """Return the image of the disk that goes by these names, its own first; None where no one image is meant."""
        own = self.disk(names[0]) if names else None
        if own:
            return own
        found = [disk for disk in self.disks if not set(names).isdisjoint(disk.names)]
        return found[0] if len(found) == 1 else None

    def fault(self) -> str:
        """Return what does not go together."""
        return _twice(self.disks)


@dataclass(frozen=True)
class StagedDisk:
    """One disk of a set that grows: what the manifest will say of it, its job, and the bytes that the job may write.

    C(label) is the SELinux context that the image gets back when its job has ended; empty where it has kept its own.
    A disk of a VM that is off, and has not changed since the set that its image builds on, has no job: nothing is
    copied, and the bitmap of the image below goes on for this one.
    """

    image: DiskImage = field(metadata=holds(part(DiskImage)))
    job: str = field(metadata=JOB)
    expected: int = field(metadata=SIZE)
    inode: int = field(default=0, metadata=INODE)
    label: str = field(default="", metadata=TEXT)


@dataclass(frozen=True)
class Intent(Document):
    """Who is making a set, from when on and how. It is the lock on the set's id between two looks at the jobs.

    C(begun) and C(deadline) are seconds of the hypervisor's CLOCK_BOOTTIME: nobody sets that clock.
    C(guest) is the VM's status at the start. C(process) is QEMU's pid and start time, empty over TCP. C(frozen) says
    that the guest's file systems may be frozen by us, through the agent's socket C(agent). C(progress) is where a set
    stood that did not advance while it was last watched: bytes copied, and since when, by that clock. C(spaces) are
    the name spaces in which C(process) and C(monitor) mean what they say; documents of before do not have them.
    C(libvirt_uri) is which libvirt a domain is of; empty where QEMU's own monitor is asked.
    """

    MOST: ClassVar[int] = LARGE

    run: str = field(metadata=TEXT)
    attempt: str = field(metadata=ATTEMPT)
    id: str = field(metadata=SET_ID)
    vm: VmName = field(metadata=VM)
    hypervisor: Hypervisor = field(metadata=holds(part(Hypervisor)))
    monitor: str = field(metadata=TEXT)
    process: tuple[int, ...] = field(metadata=holds(Several(Whole(), most=2)))
    level: Level = field(metadata=LEVEL)
    consistency: str = field(metadata=CONSISTENCY)
    qemu: str = field(metadata=TEXT)
    guest: str = field(metadata=TEXT)
    started: str = field(metadata=TIME)
    begun: float = field(metadata=SECONDS)
    deadline: float | None = field(metadata=holds(Maybe(Number())))
    checksum: bool = field(metadata=FLAG)
    disks: tuple[StagedDisk, ...] = field(metadata=holds(Several(part(StagedDisk), 1)))
    phase: Phase = field(default=Phase.PREPARING, metadata=holds(OneOf(*Phase)))
    reserved: bool = field(default=False, metadata=FLAG)
    agent: str = field(default="", metadata=TEXT)
    frozen: bool = field(default=False, metadata=FLAG)
    frozen_ms: int = field(default=0, metadata=SIZE)
    consistency_reason: str = field(default="", metadata=TEXT)
    progress: tuple[int, float] | tuple[()] = field(default=(), metadata=holds(Several(Number(), most=2)))
    spaces: dict[str, str] = field(default_factory=dict, metadata=holds(Names()))
    libvirt_uri: str = field(default="", metadata=TEXT)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)

    @property
    def jobs(self) -> tuple[str, ...]:
        return tuple(disk.job for disk in self.disks if disk.job)

    @property
    def bitmaps(self) -> frozenset[str]:
        """Return the bitmaps that this attempt may have added."""
        names = (name for disk in self.disks if disk.job for name in (disk.image.bitmap, disk.image.merged))
        return frozenset(name for name in names if name)

    def fault(self) -> str:
        """Return what does not go together."""
        if 1 in (len(self.process), len(self.progress)):
            return "process, progress: half of it is missing"
        if not all(f".{self.attempt}." in job for job in self.jobs):
            return "disks: a job is not of this attempt"
        return _twice([disk.image for disk in self.disks])


@dataclass(frozen=True)
class Failure(Document):
    """How the last attempt at a set ended that did not end well. C(state) is failed or cancelled."""

    MOST: ClassVar[int] = LARGE

    run: str = field(metadata=TEXT)
    attempt: str = field(metadata=ATTEMPT_OR_NONE)
    id: str = field(metadata=SET_ID)
    state: str = field(metadata=holds(OneOf("failed", "cancelled")))
    error: str = field(metadata=SAID)
    started: str = field(metadata=TIME)
    ended: str = field(metadata=TIME)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)


@dataclass(frozen=True)
class Consolidation(Document):
    """An increment of the set C(id) becomes a full image: C(image) is what the manifest is going to say of it.

    While this stands, the file may be the one or the other, and their sizes tell which.
    """

    MOST: ClassVar[int] = LARGE

    id: str = field(metadata=SET_ID)
    attempt: str = field(metadata=ATTEMPT)
    image: DiskImage = field(metadata=holds(part(DiskImage)))
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)

    def fault(self) -> str:
        """Return what does not go together."""
        return "image: it is not full" if self.image.level != Level.FULL or self.image.parent else ""


def _twice(disks: Sequence[DiskImage]) -> str:
    """Return what is wrong with disks of one name, or of one file; empty where there are none."""
    if len(disks) == len({disk.name for disk in disks}) == len({disk.image for disk in disks}):
        return ""
    return "disks: two of them have one name or one file"
