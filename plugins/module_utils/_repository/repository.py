# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository: where its files are, how its documents are read and written, and the locks of its VMs.

C(REPOSITORY/<vm>/<set id>/) is a set if it holds a valid manifest. C(.<set id>.staging/) beside it is where a set
grows, described by its intent; C(.<set id>.failed.json) remembers an attempt that did not end well;
C(.<set id>.removed/) is a set that goes; C(.<set id>.consolidation.json) tells of an increment that becomes a full
image; C(.lock) is never unlinked. What else is said of a set is in C(annotations.py).
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import stat
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._common.fields import DocumentError, NewerSchema, load
from .._host.files import AT_ONCE, remove, set_mode, step, sync_directory
from .._host.lock import locked
from .documents import Consolidation, Failure, Intent, Manifest, Marker
from .names import REPOSITORY_FILE, vm_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from typing import Any

    from .._host.files import DirectCalls
    from .documents import DiskImage


UNFINISHED = ".new"
"""What a file's name ends with while it is written."""
CHUNK = 1 << 16
"""Bytes that are read at once, more than most documents have."""
MANIFEST = "manifest.json"
INTENT = "intent.json"
DESCRIPTION = "vm.json"
STAGING = ".staging"
FAILED = ".failed.json"
CONSOLIDATION_SUFFIX = ".consolidation.json"
PUBLISHED_MODE = 0o440
HARMLESS = frozenset({"lost+found", ".snapshot"})
"""What a directory may hold and still count as empty."""


def read_document(path: str, kind: Any) -> Any:
    """Read a document; None where there is none, or one that is not whole. BackupError where its schema is newer."""
    try:
        return kind.parse(load(_content(path)))
    except NewerSchema as error:
        raise BackupError(f"{path}: {error}") from error
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise BackupError(f"repository: {path} cannot be read: {error.strerror}") from error


def _content(path: str) -> bytes:
    """Read a small file. Thousands are read at a time, and to make a file object takes longer than to read it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        while True:
            part = os.read(fd, CHUNK)
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(fd)


def write_document(path: str, content: dict[str, Any], mode: int = 0o600) -> None:
    """Write a document onto stable storage, whole or not at all."""
    temporary = path + UNFINISHED
    remove(temporary)
    with step(path, "it was written"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as sink:
            json.dump(content, sink, indent=1)
            sink.write("\n")
            sink.flush()
            set_mode(temporary, mode, sink.fileno())
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    sync_directory(os.path.dirname(path))


@dataclass(frozen=True)
class VmRecords:
    """All that a repository holds about one VM. C(sets) are in the order of their making.

    C(described) are the attempts whose manifest is written, so that only the rename is missing; C(strays) the ids whose
    place is taken by something that is no set.
    """

    sets: tuple[Manifest, ...] = ()
    intents: tuple[Intent, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[Consolidation, ...] = ()
    described: frozenset[str] = frozenset()
    strays: frozenset[str] = frozenset()

    def published(self, set_id: str) -> Manifest | None:
        return next((found for found in self.sets if found.id == set_id), None)

    def failure(self, set_id: str) -> Failure | None:
        return next((found for found in self.failures if found.id == set_id), None)


@dataclass(frozen=True)
class Repository:
    """An open repository. C(uuid) is empty for one that is only planned: it holds nothing."""

    path: str
    uuid: str
    _manifests: dict[str, tuple[tuple[int, ...], Manifest]] = field(default_factory=dict, compare=False, repr=False)
    """Those that were read before, with the state of their files: a VM of many sets is looked at often."""

    @property
    def tag(self) -> str:
        """Return what tells this repository's jobs and fdsets from those of others."""
        return self.uuid[:8]

    def directory(self, vm: str) -> str:
        """Return the path of a VM's directory."""
        return os.path.join(self.path, vm_directory(vm))

    def set_path(self, vm: str, set_id: str) -> str:
        """Return the path of a published set."""
        return os.path.join(self.directory(vm), set_id)

    def set_image_path(self, manifest: Manifest, image: DiskImage) -> str:
        """Return the path of an image of a published set."""
        return os.path.join(self.set_path(manifest.vm.name, manifest.id), image.image)

    def staging_path(self, vm: str, set_id: str) -> str:
        """Return where a set grows: as deep as the set itself, so that relative backing files hold before and after."""
        return os.path.join(self.directory(vm), f".{set_id}{STAGING}")

    def image_path(self, intent: Intent, image: str) -> str:
        """Return the path of an image that grows."""
        return os.path.join(self.staging_path(intent.vm.name, intent.id), image)

    def failure_path(self, vm: str, set_id: str) -> str:
        """Return the path of the record of a failure."""
        return os.path.join(self.directory(vm), f".{set_id}{FAILED}")

    def note_path(self, vm: str, set_id: str) -> str:
        """Return the path of the note that an increment of a set becomes a full image."""
        return os.path.join(self.directory(vm), f".{set_id}{CONSOLIDATION_SUFFIX}")

    @asynccontextmanager
    async def lock(self, vm: str, calls: DirectCalls = AT_ONCE) -> AsyncIterator[int]:
        """Hold the lock of one VM in this repository, for a moment."""
        # A file system that was unmounted meanwhile would otherwise get directories under its mount point.
        await calls.run(self.check_same)
        path = os.path.join(self.directory(vm), ".lock")
        async with locked(path, f"VM {vm}", calls=calls) as fd:
            await calls.run(_probe_lock, path)
            yield fd

    def check_same(self) -> None:
        """Raise BackupError where another repository is at this path by now, or none."""
        if open_repository(self.path) != self:
            raise BackupError(
                f"repository: {self.path} is another repository now: its file system was unmounted, or its disk"
                " exchanged; bring the right one back"
            )

    def records(self, vm: str) -> VmRecords:
        """Read all that is there about a VM. BackupError where a later release has written what this one must know."""
        directory = self.directory(vm)
        sets: list[Manifest] = []
        intents: list[Intent] = []
        failures: list[Failure] = []
        notes: list[Consolidation] = []
        described: set[str] = set()
        strays: set[str] = set()
        try:
            entries = sorted(os.listdir(directory))
        except FileNotFoundError:
            return VmRecords()
        for entry in entries:
            path = os.path.join(directory, entry)
            if not entry.startswith("."):
                found = self._manifest(os.path.join(path, MANIFEST))
                if found and found.id == entry:
                    sets.append(found)
                else:
                    strays.add(entry)
            elif entry.endswith(FAILED):
                failure = read_document(path, Failure)
                failures += [failure] if failure else []
            elif entry.endswith(CONSOLIDATION_SUFFIX):
                note = read_document(path, Consolidation)
                notes += [note] if note else []
            elif entry.endswith(STAGING):
                intent = read_document(os.path.join(path, INTENT), Intent)
                intents += [intent] if intent else []
                manifest = read_document(os.path.join(path, MANIFEST), Manifest)
                described |= {manifest.attempt} if manifest else set()
        sets = [self._as_noted(found, notes) for found in sorted(sets, key=lambda found: found.sequence)]
        return VmRecords(
            tuple(sets), tuple(intents), tuple(failures), tuple(notes), frozenset(described), frozenset(strays)
        )

    def _as_noted(self, manifest: Manifest, notes: Iterable[Consolidation]) -> Manifest:
        """Return the manifest as it will be, where the file of an image is the new one already."""
        for note in notes:
            old = manifest.disk(note.image.name)
            if note.attempt != manifest.attempt or old is None:
                continue
            # A file that is neither of the two is damaged: then the increment and what it builds on stay as they are.
            if self.damage(manifest, old) and not self.damage(manifest, note.image):
                disks = tuple(note.image if disk is old else disk for disk in manifest.disks)
                manifest = replace(manifest, disks=disks)
        return manifest

    def _manifest(self, path: str) -> Manifest | None:
        """Read a manifest, or return the one that was read before where its file is the same."""
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        state = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if self._manifests.get(path, ((),))[0] != state:
            found: Manifest | None = read_document(path, Manifest)
            if found is None:
                return None
            self._manifests[path] = (state, found)
        return self._manifests[path][1]

    def any_manifest(self, directory: str) -> Manifest | None:
        """Return some manifest in a VM's directory, whose name does not always tell the VM's."""
        entries = sorted(os.listdir(directory), reverse=True)
        found = (self._manifest(os.path.join(directory, entry, MANIFEST)) for entry in entries if entry[0] != ".")
        return next((manifest for manifest in found if manifest), None)

    def damage(self, manifest: Manifest, image: DiskImage) -> str:
        """Return what is wrong with an image's file, as far as its metadata tells; empty where nothing is."""
        path = self.set_image_path(manifest, image)
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return f"image {path} is missing"
        if not stat.S_ISREG(status.st_mode) or status.st_size != image.bytes:
            return f"image {path} is not the file that its manifest describes ({image.bytes} bytes)"
        return ""

    def intents(self) -> tuple[Intent, ...]:
        """Read all intents of the repository, whoever works on them."""
        pattern = os.path.join(glob.escape(self.path), "*", ".*" + STAGING, INTENT)
        found = (read_document(path, Intent) for path in glob.glob(pattern))
        return tuple(intent for intent in found if intent)

    def intent(self, vm: str, set_id: str) -> Intent | None:
        """Read the intent of a set that grows; None where there is none."""
        found: Intent | None = read_document(os.path.join(self.staging_path(vm, set_id), INTENT), Intent)
        return found


def open_repository(path: str) -> Repository:
    """Open the repository at C(path); BackupError where there is none."""
    marker = os.path.join(path, REPOSITORY_FILE)
    try:
        return Repository(path, Marker.parse(load(_content(marker))).uuid)
    except FileNotFoundError:
        raise BackupError(
            f"repository: {path} is not a repository: there is no {REPOSITORY_FILE} in it. Is its file system mounted?"
            " A new repository is made with create_repository: true"
        ) from None
    except (OSError, DocumentError) as error:
        raise BackupError(f"repository: {marker} cannot be read: {error}") from error


def _probe_lock(path: str) -> None:
    """Raise BackupError where flock does not keep a second holder out: nothing would keep two backups apart."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise BackupError(f"repository: {path}: the file system has no locks: {error.strerror}") from error
        return
    finally:
        os.close(fd)
    raise BackupError(
        f"repository: {path}: flock does not work on this file system; use another, or other mount options"
    )
