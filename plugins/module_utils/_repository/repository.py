# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository: a directory tree of sets.

C(REPOSITORY/<vm>/<set id>/) is a set if it holds a valid manifest. C(.<set id>.staging/) beside it is where a set
grows, described by its intent; C(.<set id>.failed.json) remembers an attempt that did not end well;
C(.<set id>.removed/) is a set that goes; C(.<set id>.consolidation.json) tells of an increment that becomes a full
image; C(.lock) is never unlinked. What else is said of a set is in C(_marks).
What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import stat
import uuid as uuids
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._common.version import SCHEMA
from .._host.files import remove, set_mode, sync_directory
from .._host.io_thread import AT_ONCE
from .._host.lock import locked
from .documents import Consolidation, Failure, Intent, Manifest
from .json_file import UNFINISHED, read_document, write_document
from .names import REPOSITORY_FILE, vm_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from typing import Any

    from .._host.io_thread import DirectCalls
    from .documents import DiskImage


MANIFEST = "manifest.json"
INTENT = "intent.json"
DESCRIPTION = "vm.json"
STAGING = ".staging"
FAILED = ".failed.json"
REMOVED = ".removed"
CONSOLIDATION_SUFFIX = ".consolidation.json"
PUBLISHED_MODE = 0o440
BLOCK = 512
"""The unit of st_blocks, in bytes."""
IN_THE_WAY = frozenset({errno.EISDIR, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST})
"""Why what is left of a set may stay. Any other error says that the repository cannot be worked on."""
HARMLESS = frozenset({"lost+found", ".snapshot"})
"""What a directory may hold and still count as empty."""


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
        """What tells this repository's jobs and fdsets from those of others."""
        return self.uuid[:8]

    def directory(self, vm: str) -> str:
        return os.path.join(self.path, vm_directory(vm))

    def set_path(self, vm: str, set_id: str) -> str:
        return os.path.join(self.directory(vm), set_id)

    def staging(self, vm: str, set_id: str) -> str:
        """Where a set grows: as deep as the set itself, so that relative backing files hold before and after."""
        return os.path.join(self.directory(vm), f".{set_id}{STAGING}")

    def failure_path(self, vm: str, set_id: str) -> str:
        return os.path.join(self.directory(vm), f".{set_id}{FAILED}")

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
        """BackupError where another repository is at this path by now, or none."""
        if open_repository(self.path) != self:
            raise BackupError(
                f"repository: {self.path} is another repository now: its file system was unmounted, or its disk"
                " exchanged; bring the right one back"
            )

    def shelf(self, vm: str) -> VmRecords:
        """What is there about a VM. Raises BackupError where a later release has written what this one must know."""
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
        """The manifest as it will be, where the file of an image is the new one already."""
        for note in notes:
            old = manifest.disk(note.image.name)
            if note.attempt != manifest.attempt or old is None:
                continue
            # A file that is neither the one nor the other is damaged: what the increment builds on is to stay.
            if self.damage(manifest, old) and not self.damage(manifest, note.image):
                disks = tuple(note.image if disk is old else disk for disk in manifest.disks)
                manifest = replace(manifest, disks=disks)
        return manifest

    def _manifest(self, path: str) -> Manifest | None:
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
        """Some manifest in a VM's directory: the directory's name does not always tell the VM's."""
        entries = sorted(os.listdir(directory), reverse=True)
        found = (self._manifest(os.path.join(directory, entry, MANIFEST)) for entry in entries if entry[0] != ".")
        return next((manifest for manifest in found if manifest), None)

    def damage(self, manifest: Manifest, image: DiskImage) -> str:
        """What is wrong with an image's file, as far as its metadata tells; empty where nothing is."""
        path = f"{self.set_path(manifest.vm.name, manifest.id)}/{image.image}"
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return f"image {path} is missing"
        if not stat.S_ISREG(status.st_mode) or status.st_size != image.bytes:
            return f"image {path} is not the file that its manifest describes ({image.bytes} bytes)"
        return ""

    def intents(self) -> tuple[Intent, ...]:
        """All intents of the repository, whoever works on them."""
        pattern = os.path.join(glob.escape(self.path), "*", ".*" + STAGING, INTENT)
        found = (read_document(path, Intent) for path in glob.glob(pattern))
        return tuple(intent for intent in found if intent)

    def outstanding(self, intent: Intent) -> int:
        """Bytes that a set that grows here will still take; none where it has come to its end."""
        if not os.path.isdir(self.staging(intent.vm.name, intent.id)):
            return 0
        total = 0
        for disk in intent.disks:
            try:
                # Reserved bytes count as allocated: free space is already less by them.
                allocated = os.stat(self.image_path(intent, disk.image.image)).st_blocks * BLOCK
            except OSError:
                allocated = 0
            total += max(0, disk.expected - allocated)
        return total

    def image_path(self, intent: Intent, image: str) -> str:
        return os.path.join(self.staging(intent.vm.name, intent.id), image)

    def begin(self, intent: Intent) -> None:
        """Claim a set's id. FileExistsError where somebody has; what they left without an intent goes first."""
        staging = self.staging(intent.vm.name, intent.id)
        if os.path.isdir(staging) and self.intent(intent.vm.name, intent.id) is None:
            left = _empty(staging)
            if left:
                raise BackupError(f"VM {intent.vm.name}: {left}; remove it by hand, or give the set another id")
        os.mkdir(staging, 0o700)
        self.update(intent)
        sync_directory(self.directory(intent.vm.name))

    def update(self, intent: Intent) -> None:
        write_document(os.path.join(self.staging(intent.vm.name, intent.id), INTENT), asdict(intent))

    def write_description(self, intent: Intent, description: dict[str, Any]) -> None:
        """Write down how the VM was built."""
        write_document(os.path.join(self.staging(intent.vm.name, intent.id), DESCRIPTION), description, PUBLISHED_MODE)

    def intent(self, vm: str, set_id: str) -> Intent | None:
        found: Intent | None = read_document(os.path.join(self.staging(vm, set_id), INTENT), Intent)
        return found

    def describe(self, intent: Intent, manifest: Manifest) -> None:
        """Write the manifest of a set whose images are all on stable storage; its sequence number is given here."""
        sets = self.shelf(intent.vm.name).sets
        manifest = replace(manifest, sequence=sets[-1].sequence + 1 if sets else 1)
        staging = self.staging(intent.vm.name, intent.id)
        write_document(os.path.join(staging, MANIFEST), asdict(manifest), PUBLISHED_MODE)

    def publish(self, intent: Intent) -> Manifest:
        """Make a described set seen, by one rename."""
        name, set_id = intent.vm.name, intent.id
        final = self.set_path(name, set_id)
        if os.path.lexists(final):
            # rename(2) would replace an empty directory without a word.
            raise BackupError(f"VM {name}: {final} has appeared while the set was made, and is no set; move it away")
        for disk in intent.disks:
            set_mode(self.image_path(intent, disk.image.image), PUBLISHED_MODE)
        os.rename(self.staging(name, set_id), final)
        sync_directory(self.directory(name))
        manifest: Manifest | None = read_document(os.path.join(final, MANIFEST), Manifest)
        if manifest is None:
            raise BackupError(f"VM {name}: the manifest of {final} vanished while the set was published")
        return manifest

    def untidy(self, vm: str, set_id: str) -> bool:
        """Whether there are traces of the making of a published set in it or beside it, or of what came to nothing."""
        return bool(self._traces(vm, set_id))

    def tidy(self, vm: str, set_id: str) -> None:
        """Remove those traces. What stands in the way of that is told by litter() as before: it does no harm."""
        for path in self._traces(vm, set_id):
            if os.path.isdir(path):
                _empty(path)
            else:
                remove(path)

    def _traces(self, vm: str, set_id: str) -> list[str]:
        """What processes that are done or dead have left, of the making of this set or of what came to nothing."""
        intent = os.path.join(self.set_path(vm, set_id), INTENT)
        making = (intent + UNFINISHED, intent, self.failure_path(vm, set_id))
        return [*(path for path in making if os.path.lexists(path)), *self.litter(vm)]

    def litter(self, vm: str) -> list[str]:
        """What killed processes have left. Nothing but hidden files is looked at: a set's id may look like theirs."""
        directory = self.directory(vm)
        found = []
        for entry in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            if not entry.startswith("."):
                continue
            path = os.path.join(directory, entry)
            half_written = entry.endswith(UNFINISHED)
            half_removed = entry.endswith(REMOVED)
            unclaimed = entry.endswith(STAGING) and not os.path.lexists(os.path.join(path, INTENT))
            if half_written or half_removed or unclaimed:
                found.append(path)
        return found

    def remove_set(self, vm: str, set_id: str) -> str:
        """Remove a set: it is listed no more from the first moment on, and what a crash leaves of it tidy() takes.

        Returns what could not be removed and why, empty where all could. That is for tidy(), too.
        """
        going = os.path.join(self.directory(vm), f".{set_id}{REMOVED}")
        number = 1
        while os.path.lexists(going):
            # What could not be removed of another one.
            number += 1
            going = os.path.join(self.directory(vm), f".{set_id}.{number}{REMOVED}")
        os.rename(self.set_path(vm, set_id), going)
        sync_directory(self.directory(vm))
        left = _empty(going)
        sync_directory(self.directory(vm))
        return left

    def note_path(self, vm: str, set_id: str) -> str:
        return os.path.join(self.directory(vm), f".{set_id}{CONSOLIDATION_SUFFIX}")

    def write_note(self, vm: str, note: Consolidation) -> None:
        """Say which image a file is about to become."""
        write_document(self.note_path(vm, note.id), asdict(note))

    def remove_note(self, vm: str, set_id: str) -> None:
        """The file and what is said of it are one again."""
        remove(self.note_path(vm, set_id))
        sync_directory(self.directory(vm))

    def rewrite_manifest(self, manifest: Manifest) -> None:
        """Replace what is said of a published set."""
        write_document(
            os.path.join(self.set_path(manifest.vm.name, manifest.id), MANIFEST), asdict(manifest), PUBLISHED_MODE
        )

    def record_failure(self, vm: str, failure: Failure) -> None:
        write_document(self.failure_path(vm, failure.id), asdict(failure))

    def discard_images(self, intent: Intent) -> None:
        """Give back the space that an attempt has taken; its intent stays."""
        for disk in intent.disks:
            remove(self.image_path(intent, disk.image.image))

    def discard(self, intent: Intent) -> None:
        """Remove what an attempt has left, its intent last: what a crash leaves of it is still known to be ours."""
        staging = self.staging(intent.vm.name, intent.id)
        there = self.intent(intent.vm.name, intent.id)
        if there and there.attempt == intent.attempt:
            _empty(staging)
            sync_directory(self.directory(intent.vm.name))


def open_repository(path: str) -> Repository:
    """The repository at C(path); BackupError where there is none."""
    marker = os.path.join(path, REPOSITORY_FILE)
    try:
        with open(marker, encoding="utf-8") as source:
            found = json.load(source)
        if found["schema"] > SCHEMA:
            raise BackupError(
                "repository: {} has format version {}, newer than this collection; update vmfleet.backup".format(
                    path, found["schema"]
                )
            )
        return Repository(path, str(uuids.UUID(found["uuid"])))
    except FileNotFoundError:
        raise BackupError(
            f"repository: {path} is not a repository: there is no {REPOSITORY_FILE} in it. Is its file system mounted?"
            " A new repository is made with create_repository: true"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackupError(f"repository: {marker} cannot be read: {error}") from error


def _probe_lock(path: str) -> None:
    """BackupError where flock does not keep a second holder out: nothing would keep two backups apart."""
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


def _empty(directory: str) -> str:
    """Remove a directory with its files; what cannot be removed stays, and is returned with the reason.

    That is a directory, which somebody has put there, an immutable file, or on NFS one that somebody has open.
    """
    left = []
    for entry in sorted(os.listdir(directory), key=lambda entry: entry == INTENT):
        path = os.path.join(directory, entry)
        try:
            remove(path)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            left.append(f"{path} cannot be removed ({error.strerror})")
    if not left:
        try:
            os.rmdir(directory)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            left.append(f"{directory} cannot be removed ({error.strerror})")
    return "; ".join(left)
