# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a set: claim its id, write down how far it has come, publish it with one rename, or take it back. Remove sets.

What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host.files import remove, set_mode, sync_directory
from .documents import Manifest
from .repository import (
    DESCRIPTION,
    INTENT,
    MANIFEST,
    PUBLISHED_MODE,
    STAGING,
    UNFINISHED,
    read_document,
    write_document,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .documents import Failure, Intent
    from .repository import Repository


BLOCK = 512
"""The unit of st_blocks, in bytes."""
REMOVED = ".removed"
IN_THE_WAY = frozenset({errno.EISDIR, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST})
"""Why what is left of a set may stay. Any other error says that the repository cannot be worked on."""


def outstanding(repository: Repository, intent: Intent) -> int:
    """Return the bytes that a set that grows here will still take; 0 where it has come to its end."""
    if not os.path.isdir(_path(repository, intent)):
        return 0
    total = 0
    for disk in intent.disks:
        try:
            # Reserved bytes count as allocated: free space is already less by them.
            allocated = os.stat(repository.image_path(intent, disk.image.image)).st_blocks * BLOCK
        except OSError:
            allocated = 0
        total += max(0, disk.expected - allocated)
    return total


def begin(repository: Repository, intent: Intent) -> None:
    """Claim a set's id. FileExistsError where somebody has; what they left without an intent goes first."""
    path = _path(repository, intent)
    if os.path.isdir(path) and repository.intent(intent.vm.name, intent.id) is None:
        left = remove_directory(path)
        if left:
            raise BackupError(f"VM {intent.vm.name}: {left}; remove it by hand, or give the set another id")
    os.mkdir(path, 0o700)
    update(repository, intent)
    sync_directory(repository.directory(intent.vm.name))


def update(repository: Repository, intent: Intent) -> None:
    """Write an intent, in place of what was intended before."""
    write_document(_path(repository, intent, INTENT), asdict(intent))


def write_description(repository: Repository, intent: Intent, description: dict[str, Any]) -> None:
    """Write down how the VM was built."""
    write_document(_path(repository, intent, DESCRIPTION), description, PUBLISHED_MODE)


def describe(repository: Repository, intent: Intent, manifest: Manifest) -> None:
    """Write the manifest of a set whose images are all on stable storage; its sequence number is given here."""
    sets = repository.records(intent.vm.name).sets
    manifest = replace(manifest, sequence=sets[-1].sequence + 1 if sets else 1)
    write_document(_path(repository, intent, MANIFEST), asdict(manifest), PUBLISHED_MODE)


def publish(repository: Repository, intent: Intent) -> Manifest:
    """Make a described set seen, by one rename."""
    name = intent.vm.name
    final = repository.set_path(name, intent.id)
    if os.path.lexists(final):
        # rename(2) would replace an empty directory without a word.
        raise BackupError(f"VM {name}: {final} has appeared while the set was made, and is no set; move it away")
    for disk in intent.disks:
        set_mode(repository.image_path(intent, disk.image.image), PUBLISHED_MODE)
    os.rename(_path(repository, intent), final)
    sync_directory(repository.directory(name))
    manifest: Manifest | None = read_document(os.path.join(final, MANIFEST), Manifest)
    if manifest is None:
        raise BackupError(f"VM {name}: the manifest of {final} vanished while the set was published")
    return manifest


def record_failure(repository: Repository, vm: str, failure: Failure) -> None:
    """Write down how an attempt has ended."""
    write_document(repository.failure_path(vm, failure.id), asdict(failure))


def discard_images(repository: Repository, intent: Intent) -> None:
    """Give back the space that an attempt has taken; its intent stays."""
    for disk in intent.disks:
        remove(repository.image_path(intent, disk.image.image))


def discard(repository: Repository, intent: Intent) -> None:
    """Remove what an attempt has left, its intent last: what a crash leaves of it is still known to be ours."""
    there = repository.intent(intent.vm.name, intent.id)
    if there and there.attempt == intent.attempt:
        remove_directory(_path(repository, intent))
        sync_directory(repository.directory(intent.vm.name))


def _path(repository: Repository, intent: Intent, *file: str) -> str:
    """Return the path of the directory in which a set grows, or of a file there."""
    return os.path.join(repository.staging_path(intent.vm.name, intent.id), *file)


def untidy(repository: Repository, vm: str, set_id: str) -> bool:
    """Return whether tidy() has something to remove."""
    return bool(_traces(repository, vm, set_id))


def tidy(repository: Repository, vm: str, set_id: str) -> None:
    """Remove the traces of the making of a published set, and all litter of its VM.

    What cannot be removed does no harm, and litter() goes on to tell it.
    """
    for path in _traces(repository, vm, set_id):
        if os.path.isdir(path):
            remove_directory(path)
        else:
            remove(path)


def _traces(repository: Repository, vm: str, set_id: str) -> list[str]:
    intent = os.path.join(repository.set_path(vm, set_id), INTENT)
    making = (intent + UNFINISHED, intent, repository.failure_path(vm, set_id))
    return [*(path for path in making if os.path.lexists(path)), *litter(repository, vm)]


def litter(repository: Repository, vm: str) -> list[str]:
    """Return what killed processes have left of a VM. All of it is hidden, as a set's id may look like its names."""
    directory = repository.directory(vm)
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


def remove_set(repository: Repository, vm: str, set_id: str) -> str:
    """Remove a set, and return what could not be removed and why; empty where all could.

    It is not listed any more from the first moment on. tidy() removes later what a crash, or an error, leaves of it.
    """
    directory = repository.directory(vm)
    going = os.path.join(directory, f".{set_id}{REMOVED}")
    number = 1
    while os.path.lexists(going):
        # Another set of this id was removed before, and not all of it could be.
        number += 1
        going = os.path.join(directory, f".{set_id}.{number}{REMOVED}")
    os.rename(repository.set_path(vm, set_id), going)
    sync_directory(directory)
    left = remove_directory(going)
    sync_directory(directory)
    return left


def remove_directory(path: str) -> str:
    """Remove a directory with its files, an intent last; return what has to stay, with the reasons.

    That is a directory, which somebody has put there, an immutable file, or on NFS one that somebody has open.
    """
    entries = sorted(os.listdir(path), key=lambda entry: entry == INTENT)
    left = [_remove_if_possible(remove, os.path.join(path, entry)) for entry in entries]
    if not any(left):
        left.append(_remove_if_possible(os.rmdir, path))
    return "; ".join(filter(None, left))


def _remove_if_possible(call: Callable[[str], object], path: str) -> str:
    """Remove something with this call; return why it has to stay."""
    try:
        call(path)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        return f"{path} cannot be removed ({error.strerror})"
    return ""
