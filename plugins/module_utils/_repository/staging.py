# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a set: claim its id, write down how far it has come, publish it with one rename, or take it back.

What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host.files import remove, set_mode, sync_directory
from .documents import Manifest
from .json_file import read_document, write_document
from .removal import remove_directory
from .repository import DESCRIPTION, INTENT, MANIFEST, PUBLISHED_MODE

if TYPE_CHECKING:
    from typing import Any

    from .documents import Failure, Intent
    from .repository import Repository


BLOCK = 512
"""The unit of st_blocks, in bytes."""


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
