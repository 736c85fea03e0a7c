# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository: where its files are, how its documents are read and written, and the locks of its VMs.

C(REPOSITORY/<vm>/<set id>/) is a set if it holds a valid manifest. C(.<set id>.staging/) beside it is where a set
grows, described by its intent; C(.<set id>.failed.json) remembers an attempt that did not end well;
C(.<set id>.removed/) is a set that goes; C(.<set id>.consolidation.json) tells of an increment that becomes a full
image; C(.lock) is never unlinked. What else is said of a set is in C(annotations.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._common.fields import DocumentError, load
from .._host.directory import Directory, LinkedEntry, WrongEntry, exposed
from .._host.files import AT_ONCE
from .._host.lock import HELD, locked
from .documents import Consolidation, Failure, Intent, Manifest, Marker
from .json_file import OddDocument, read_document, read_named, warn_of
from .names import REPOSITORY_FILE, vm_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from typing import Any

    from .._host.files import DirectCalls
    from .documents import DiskImage


MANIFEST = "manifest.json"
INTENT = "intent.json"
DESCRIPTION = "vm.json"
LOCK = ".lock"
STAGING = ".staging"
REMOVED = ".removed"
FAILED = ".failed.json"
CONSOLIDATION_SUFFIX = ".consolidation.json"
PUBLISHED_MODE = 0o440
HARMLESS = frozenset({"lost+found", ".snapshot"})
"""What a directory may hold and still count as empty."""


@dataclass(frozen=True)
class VmRecords:
    """All that a repository holds about one VM. C(sets) are in the order of their making.

    C(described) are the attempts whose manifest is written, so that only the rename is missing; C(strays) the ids whose
    place is taken by something that is no set. C(odd) says, by name, which entries are something else than their names
    say, and what to do; they are left alone. Of these, C(unread) are the ids of sets whose manifest cannot be used.
    C(barred) says why no set may be made: somebody else may be making one, or is of a later release.
    """

    sets: tuple[Manifest, ...] = ()
    intents: tuple[Intent, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[Consolidation, ...] = ()
    described: frozenset[str] = frozenset()
    strays: frozenset[str] = frozenset()
    odd: dict[str, str] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    barred: str = ""

    def published(self, set_id: str) -> Manifest | None:
        return next((found for found in self.sets if found.id == set_id), None)

    def failure(self, set_id: str) -> Failure | None:
        return next((found for found in self.failures if found.id == set_id), None)


@dataclass(frozen=True)
class Repository:
    """An open repository. C(uuid) is empty for one that is only planned: it holds nothing."""

    path: str
    uuid: str
    trust_others: bool = field(default=False, compare=False)
    """Whether others than root and this user may write here."""
    _manifests: dict[tuple[str, str], tuple[tuple[int, ...], Manifest]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Those that were read before, with the state of their files: a VM of many sets is looked at often."""

    @property
    def tag(self) -> str:
        """Return what tells this repository's jobs and fdsets from those of others."""
        return self.uuid[:8]

    def directory(self, vm: str) -> str:
        """Return the path of a VM's directory."""
        return os.path.join(self.path, vm_directory(vm))

    def has(self, vm: str) -> bool:
        """Return whether anything is known of a VM here: its directory stays when its sets are gone."""
        return os.path.lexists(self.directory(vm))

    def opened(self, vm: str, *below: str) -> Directory:
        """Open a VM's directory, or one below. FileNotFoundError where there is none, WrongEntry for another thing."""
        return Directory.at(self.path, vm_directory(vm), *below)

    def set_path(self, vm: str, set_id: str) -> str:
        """Return the path of a published set."""
        return f"{self.directory(vm)}/{set_id}"

    def set_image_path(self, manifest: Manifest, image: DiskImage) -> str:
        """Return the path of an image of a published set."""
        return f"{self.set_path(manifest.vm.name, manifest.id)}/{image.image}"

    def staging_path(self, vm: str, set_id: str) -> str:
        """Return where a set grows: as deep as the set itself, so that relative backing files hold before and after."""
        return os.path.join(self.directory(vm), staging_name(set_id))

    def image_path(self, intent: Intent, image: str) -> str:
        """Return the path of an image that grows."""
        return os.path.join(self.staging_path(intent.vm.name, intent.id), image)

    @contextlib.asynccontextmanager
    async def lock(self, vm: str, calls: DirectCalls = AT_ONCE) -> AsyncIterator[int]:
        """Hold the lock of one VM in this repository, for a moment."""
        # A file system that was unmounted meanwhile would otherwise get directories under its mount point.
        await calls.run(self.check_same)
        path = os.path.join(self.directory(vm), LOCK)
        async with locked(path, f"VM {vm}", calls=calls) as fd:
            await calls.run(_check_lock, self, vm)
            yield fd

    def check_same(self) -> None:
        """Raise BackupError where another repository is at this path by now, or none."""
        if open_repository(self.path) != self:
            raise BackupError(
                f"repository: {self.path} is another repository now: its file system was unmounted, or its disk was"
                " exchanged; mount the right one again"
            )

    def records(self, vm: str) -> VmRecords:
        """Read all that is there about a VM. BackupError where a later release has written what this one must know."""
        try:
            directory = self.opened(vm)
        except FileNotFoundError:
            return VmRecords()
        with directory:
            return _records(self, directory)

    def manifest(self, directory: Directory, entry: os.DirEntry[str]) -> Manifest | None:
        """Read the manifest of a set, or return the one that was read before where its file is the same.

        None where there is none. WrongEntry where it is something else, or the set is a link.
        """
        name = entry.name
        if not entry.is_dir(follow_symlinks=False):
            if entry.is_symlink():
                raise directory.wrong(name, "a directory")
            return None
        key = directory.path, name
        known = self._manifests.get(key)
        if known and known[0] == _state(os.stat(f"{name}/{MANIFEST}", dir_fd=directory.fd, follow_symlinks=False)):
            return known[1]
        with directory.directory(name) as place:
            status = place.regular(MANIFEST)
            found: Manifest | None = read_document(
                place, MANIFEST, Manifest, status, lambda one: _misplaced(one, directory, one.id, name)
            )
        if found and found.repository != self.uuid:
            # It was brought here from another repository. Its bitmaps are that one's.
            found = replace(found, disks=tuple(replace(disk, bitmap=None) for disk in found.disks))
        if found:
            self._manifests[key] = _state(status), found
        return found

    def intent_in(self, directory: Directory, name: str, staging: Directory) -> Intent | None:
        """Read the intent of a set that grows in the directory C(staging), which has this name."""

        def misplaced(intent: Intent) -> str:
            ours = all(job.startswith(f"vmfleet.{self.tag}.{intent.attempt}.") for job in intent.jobs)
            ours = ours and all(bitmap.startswith(f"vmfleet-{self.tag}-") for bitmap in intent.bitmaps)
            reason = _misplaced(intent, directory, staging_name(intent.id), name)
            return reason or ("" if ours else "its jobs or bitmaps are not of this repository")

        found: Intent | None = read_document(staging, INTENT, Intent, misplaced=misplaced)
        return found

    def damage(self, manifest: Manifest, image: DiskImage, directory: str = "") -> str:
        """Return what is wrong with an image's file, as far as its metadata tells; empty where nothing is.

        C(directory) is the VM's, for whoever asks of thousands.
        """
        path = f"{directory or self.directory(manifest.vm.name)}/{manifest.id}/{image.image}"
        try:
            status = os.stat(path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return f"image {path} is missing"
        if not stat.S_ISREG(status.st_mode) or status.st_size != image.bytes:
            return f"image {path} is not the file that its manifest describes ({image.bytes} bytes)"
        return ""

    def intents(self, odd: list[str] | None = None) -> tuple[Intent, ...]:
        """Read all intents of the repository, whoever works on them. Those that cannot be used are added to C(odd)."""
        found: list[Intent] = []
        with contextlib.suppress(FileNotFoundError), Directory.at(self.path) as root:
            for entry in root.entries():
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    # Whoever reads this VM tells why it cannot be read.
                    with contextlib.suppress(OSError), root.directory(entry.name) as directory:
                        found += self.intents_in(directory, odd)
        return tuple(found)

    def intents_in(self, directory: Directory, odd: list[str] | None = None) -> list[Intent]:
        """Read the intents in a VM's directory."""
        found: list[Intent] = []
        wrong: dict[str, str] = {}
        for name in directory.names():
            if name.startswith(".") and name.endswith(STAGING):
                try:
                    with directory.directory(name) as staging:
                        intent = self.intent_in(directory, name, staging)
                    found += [intent] if intent else []
                except FileNotFoundError:
                    continue
                except WrongEntry as error:
                    wrong[name] = str(error)
        warn_of(directory, wrong)
        if odd is not None:
            odd += wrong.values()
        return found

    def intent(self, vm: str, set_id: str) -> Intent | None:
        """Read the intent of a set that grows; None where there is none. WrongEntry for one that cannot be used."""
        name = staging_name(set_id)
        try:
            with self.opened(vm) as directory, directory.directory(name) as staging:
                return self.intent_in(directory, name, staging)
        except FileNotFoundError:
            return None


def _records(repository: Repository, directory: Directory) -> VmRecords:
    found: dict[Any, list[Any]] = {Intent: [], Failure: [], Consolidation: [], STAGING: []}
    read: list[Manifest | None] = []
    entries = directory.entries()
    odd: dict[str, WrongEntry] = {}
    for entry in entries:
        try:
            if not entry.name.startswith("."):
                read.append(repository.manifest(directory, entry))
                continue
            for kind, document in _documents(repository, directory, entry):
                found[kind] += [document] if document else []
        except FileNotFoundError:
            # Another process has removed it meanwhile.
            continue
        except WrongEntry as error:
            odd[entry.name] = error
    visible = {entry.name for entry in entries if not entry.name.startswith(".")}
    unused = {name: error for name, error in odd.items() if isinstance(error, OddDocument)}
    barring = [str(error) for name, error in unused.items() if error.newer or name.endswith(STAGING)]
    sets = sorted(filter(None, read), key=lambda one: one.sequence)
    ids = {manifest.id for manifest in sets}
    # A second name of a set that is there hides nothing.
    told = {
        name: str(error)
        for name, error in odd.items()
        if not (isinstance(error, LinkedEntry) and error.target in ids and name in visible)
    }
    warn_of(directory, told)
    return VmRecords(
        tuple(_as_noted(repository, one, found[Consolidation]) for one in sets),
        tuple(found[Intent]),
        tuple(found[Failure]),
        tuple(found[Consolidation]),
        described=frozenset(manifest.attempt for manifest in found[STAGING]),
        strays=frozenset(visible - ids),
        odd=told,
        unread=frozenset(visible & unused.keys()),
        barred="; ".join(barring),
    )


def _documents(repository: Repository, directory: Directory, entry: os.DirEntry[str]) -> Iterator[tuple[Any, Any]]:
    """Yield the documents of a hidden entry in a VM's directory, each with its kind; None for one that is not there."""
    name = entry.name
    if name.endswith(FAILED):
        yield Failure, read_named(directory, name, Failure, failure_name)
    elif name.endswith(CONSOLIDATION_SUFFIX):
        yield Consolidation, read_named(directory, name, Consolidation, note_name)
    elif name.endswith(STAGING):
        with directory.directory(name) as staging:
            yield Intent, repository.intent_in(directory, name, staging)
            yield STAGING, read_document(staging, MANIFEST, Manifest)
    elif name.endswith(REMOVED) and not entry.is_dir(follow_symlinks=False):
        raise directory.wrong(name, "a directory")


def _as_noted(repository: Repository, manifest: Manifest, notes: Iterable[Consolidation]) -> Manifest:
    """Return the manifest as it will be, where the file of an image is the new one already."""
    for note in notes:
        old = manifest.disk(note.image.name)
        if note.attempt != manifest.attempt or old is None or old.image != note.image.image:
            continue
        # A file that is neither of the two is damaged: then the increment and what it builds on stay as they are.
        if repository.damage(manifest, old) and not repository.damage(manifest, note.image):
            disks = tuple(note.image if disk is old else disk for disk in manifest.disks)
            manifest = replace(manifest, disks=disks)
    return manifest


def _misplaced(document: Manifest | Intent, directory: Directory, wanted: str, name: str) -> str:
    """Return why a document does not belong below the directory of a VM; empty where it does."""
    if vm_directory(document.vm.name) != directory.path.rpartition("/")[2]:
        return f"it is of VM {document.vm.name}, and not of this one"
    return "" if wanted == name else f"it is of set {document.id}, and not of this one"


def staging_name(set_id: str) -> str:
    """Return the name of the directory in which a set grows."""
    return f".{set_id}{STAGING}"


def failure_name(set_id: str) -> str:
    """Return the name of the record of a failure."""
    return f".{set_id}{FAILED}"


def note_name(set_id: str) -> str:
    """Return the name of the note that an increment of a set becomes a full image."""
    return f".{set_id}{CONSOLIDATION_SUFFIX}"


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def check_owner(repository: Repository, vm: str = "") -> None:
    """Raise BackupError where others could change the repository, or the directory of a VM: what is in it is theirs."""
    if repository.trust_others:
        return
    with Directory.at(repository.path) as root:
        names = (REPOSITORY_FILE, vm_directory(vm)) if vm else (REPOSITORY_FILE,)
        found = [(root.path, os.fstat(root.fd)), *((root.join(name), root.status(name)) for name in names)]
    for path, status in found:
        fault = exposed(path, status) if status else ""
        if fault:
            raise BackupError(f"repository: {fault}")


def open_repository(path: str, trust_others: bool = False) -> Repository:
    """Open the repository at C(path); BackupError where there is none."""
    marker = os.path.join(path, REPOSITORY_FILE)
    try:
        with Directory.at(path) as root:
            return Repository(path, Marker.parse(load(root.read(REPOSITORY_FILE, Marker.MOST))).uuid, trust_others)
    except FileNotFoundError:
        raise BackupError(
            f"repository: {path} is not a repository: there is no {REPOSITORY_FILE} in it. Is its file system mounted?"
            " A new repository is made with create_repository: true"
        ) from None
    except (OSError, DocumentError) as error:
        raise BackupError(f"repository: {marker} cannot be read: {error}") from error


def _check_lock(repository: Repository, vm: str) -> None:
    """Raise BackupError where others could exchange the lock that is held, or where it does not keep them out."""
    check_owner(repository, vm)
    with repository.opened(vm) as directory:
        path, fd = directory.join(LOCK), directory.open(LOCK, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except HELD:
        return
    except OSError as error:
        raise BackupError(f"repository: {path}: the file system has no locks: {error.strerror}") from error
    finally:
        os.close(fd)
    raise BackupError(
        f"repository: {path}: flock does not work on this file system; use another, or other mount options"
    )
