# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a set: claim its id, write down how far it has come, publish it with one rename, or take it back.

What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._common.fields import LONG
from .._host.confinement import set_file_label
from .._host.directory import WrongEntry
from .._host.files import UNFINISHED, set_mode
from .documents import LARGE, Manifest
from .json_file import dump, read_document, write_document
from .repository import (
    DESCRIPTION,
    INTENT,
    MANIFEST,
    PUBLISHED_MODE,
    REMOVED,
    STAGING,
    failure_name,
    staging_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._host.directory import Directory
    from .documents import Failure, Intent
    from .repository import Repository


BLOCK = 512
"""The unit of st_blocks, in bytes."""
IN_THE_WAY = frozenset({errno.EISDIR, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST})
"""Why what is left of a set may stay. Any other error says that the repository cannot be worked on."""


def outstanding(repository: Repository, intent: Intent) -> int:
    """Return the bytes that a set that grows here will still take; 0 where it has come to its end."""
    total = 0
    try:
        with opened(repository, intent) as staging:
            for disk in intent.disks:
                status = staging.status(disk.image.image)
                # Reserved bytes count as allocated: free space is already less by them.
                total += max(0, disk.expected - (status.st_blocks * BLOCK if status else 0))
    except (FileNotFoundError, WrongEntry):
        return 0
    return total


def begin(repository: Repository, intent: Intent) -> None:
    """Claim a set's id. FileExistsError where somebody has; what they left without an intent goes first."""
    name = staging_name(intent.id)
    with repository.opened(intent.vm.name) as directory:
        if directory.status(name) and repository.intent(intent.vm.name, intent.id) is None:
            left = remove_directory(directory, name)
            if left:
                raise BackupError(f"VM {intent.vm.name}: {left}; remove it by hand, or give the set another id")
        directory.make(name)
        update(repository, intent)
        directory.sync()


def update(repository: Repository, intent: Intent) -> None:
    """Write an intent, in place of what was intended before."""
    with opened(repository, intent) as staging:
        # It is written again and again, and for programs only.
        write_document(staging, INTENT, intent, indent=None)


def write_description(repository: Repository, intent: Intent, description: dict[str, Any]) -> None:
    """Write down how the VM was built."""
    with opened(repository, intent) as staging:
        staging.write(DESCRIPTION, dump(description), PUBLISHED_MODE)


def describe(repository: Repository, intent: Intent, manifest: Manifest) -> None:
    """Write the manifest of a set whose images are all on stable storage; its sequence number is given here."""
    records = repository.records(intent.vm.name)
    newest = records.sets[-1].sequence if records.sets else 0
    # Sets whose manifest cannot be read may be the newest ones, and come back.
    manifest = replace(manifest, sequence=newest + 1 + len(records.unread))
    with opened(repository, intent) as staging:
        digest = _digest_of_description(staging)
        write_document(staging, MANIFEST, replace(manifest, description_sha256=digest), PUBLISHED_MODE)


def _digest_of_description(staging: Directory) -> str | None:
    """Return the SHA-256 of vm.json; None where there is none that anybody could read."""
    try:
        return hashlib.sha256(staging.read(DESCRIPTION, LARGE)).hexdigest()
    except (FileNotFoundError, WrongEntry):
        return None


def publish(repository: Repository, intent: Intent) -> Manifest:
    """Make a described set seen, by one rename."""
    name = intent.vm.name
    with repository.opened(name) as directory:
        appeared = BackupError(
            f"VM {name}: {directory.join(intent.id)} has appeared while the set was made, and is no set; move it away"
        )
        if directory.status(intent.id):
            # rename(2) would replace an empty directory without a word.
            raise appeared
        with directory.directory(staging_name(intent.id)) as staging:
            for disk in intent.disks:
                _set_mode(staging, disk.image.image)
            if staging.status(DESCRIPTION):
                staging.regular(DESCRIPTION)
        try:
            directory.rename(staging_name(intent.id), intent.id)
        except OSError as error:
            if directory.status(intent.id):
                raise appeared from error
            raise
        directory.sync()
        with directory.directory(intent.id) as published:
            manifest: Manifest | None = read_document(published, MANIFEST, Manifest)
    if manifest is None:
        raise BackupError(f"VM {name}: the manifest of {published.path} vanished while the set was published")
    return manifest


def restore_labels(repository: Repository, intent: Intent) -> None:
    """Give images that were labelled for QEMU the labels that they had before, once their jobs have ended.

    QEMU is asked for the label at each write, even to a file that it has open.
    """
    with opened(repository, intent) as staging:
        for disk in intent.disks:
            if disk.label:
                fd = staging.open(disk.image.image)
                try:
                    set_file_label(staging.join(disk.image.image), disk.label, fd)
                finally:
                    os.close(fd)


def _set_mode(directory: Directory, image: str) -> None:
    fd = directory.open(image)
    try:
        set_mode(directory.join(image), PUBLISHED_MODE, fd)
    finally:
        os.close(fd)


def record_failure(repository: Repository, vm: str, failure: Failure) -> None:
    """Write down how an attempt has ended."""
    with repository.opened(vm) as directory:
        write_document(directory, failure_name(failure.id), replace(failure, error=failure.error[:LONG]))


def remove_failure(repository: Repository, vm: str, failure: Failure) -> None:
    """Forget how an attempt has ended."""
    with repository.opened(vm) as directory:
        directory.remove(failure_name(failure.id))


def discard_images(repository: Repository, intent: Intent) -> None:
    """Give back the space that an attempt has taken; its intent stays."""
    with contextlib.suppress(FileNotFoundError), opened(repository, intent) as staging:
        for disk in intent.disks:
            staging.remove(disk.image.image)


def discard(repository: Repository, intent: Intent) -> None:
    """Remove what an attempt has left, its intent last: what a crash leaves of it is still known to be ours."""
    try:
        there = repository.intent(intent.vm.name, intent.id)
    except WrongEntry:
        # Something else stands there, which is not ours.
        return
    if there and there.attempt == intent.attempt:
        with repository.opened(intent.vm.name) as directory:
            remove_directory(directory, staging_name(intent.id))
            directory.sync()


def opened(repository: Repository, intent: Intent) -> Directory:
    """Open the directory in which a set grows."""
    return repository.opened(intent.vm.name, staging_name(intent.id))


def untidy(repository: Repository, vm: str, set_id: str) -> bool:
    """Return whether tidy() has something to remove."""
    try:
        with repository.opened(vm) as directory:
            return bool(_traces(directory, set_id) or litter(directory))
    except FileNotFoundError:
        return False


def tidy(repository: Repository, vm: str, set_id: str = "") -> None:
    """Remove the traces of the making of a published set, and all litter of its VM.

    What cannot be removed does no harm, and litter() goes on to tell it.
    """
    try:
        directory = repository.opened(vm)
    except FileNotFoundError:
        return
    with directory:
        for trace in _traces(directory, set_id):
            if trace == failure_name(set_id):
                remove_file(directory, trace)
            else:
                with directory.directory(set_id) as place:
                    remove_file(place, trace)
        for name in litter(directory):
            if name.endswith(UNFINISHED):
                remove_file(directory, name)
            else:
                remove_directory(directory, name)


def _traces(directory: Directory, set_id: str) -> list[str]:
    """Return what is left of the making of a published set: names in its directory, and one beside that."""
    found = []
    if set_id and directory.is_directory(set_id):
        with directory.directory(set_id) as place:
            found += [name for name in (INTENT + UNFINISHED, INTENT) if place.status(name)]
    if set_id and directory.status(failure_name(set_id)):
        found.append(failure_name(set_id))
    return found


def litter(directory: Directory) -> list[str]:
    """Return what killed processes have left of a VM. All of it is hidden, as a set's id may look like its names."""
    found = []
    for name in directory.names():
        if not name.startswith("."):
            continue
        ours = name.endswith((REMOVED, STAGING)) and directory.is_directory(name)
        if name.endswith(UNFINISHED) or (ours and not _is_claimed(directory, name)):
            found.append(name)
    return found


def _is_claimed(directory: Directory, name: str) -> bool:
    """Return whether a set may grow in a directory."""
    if name.endswith(REMOVED):
        return False
    try:
        with directory.directory(name) as staging:
            return staging.status(INTENT) is not None
    except FileNotFoundError:
        # Another process has removed it meanwhile.
        return True


def remove_directory(directory: Directory, name: str) -> str:
    """Remove a directory with its files, an intent last; return what has to stay, with the reasons.

    That is a directory, which somebody has put there, an immutable file, or on NFS one that somebody has open; and all
    of it where it is no directory, but a link to one.
    """
    try:
        place = directory.directory(name)
    except WrongEntry as error:
        return str(error)
    with place:
        entries = sorted(place.names(), key=lambda entry: entry == INTENT)
        left = [remove_file(place, entry) for entry in entries]
    if not any(left):
        left.append(_remove_if_possible(directory.remove_directory, name))
    return "; ".join(filter(None, left))


def remove_file(directory: Directory, name: str) -> str:
    """Remove a file; return why it has to stay."""
    return _remove_if_possible(directory.remove, name)


def _remove_if_possible(call: Callable[[str], object], name: str) -> str:
    """Remove something with this call; return why it has to stay."""
    try:
        call(name)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        return f"{error.filename} cannot be removed ({error.strerror})"
    return ""
