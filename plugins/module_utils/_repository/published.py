# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Change published sets: say something of them, note that an increment becomes full, remove them.

Called with the VM's lock held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .annotations import annotation_name
from .json_file import write_document
from .repository import MANIFEST, PUBLISHED_MODE, REMOVED, note_name
from .staging import remove_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._host.directory import Directory
    from .annotations import Pin, Protection, Verification
    from .documents import Consolidation, Manifest
    from .repository import Repository


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


def write_note(directory: Directory, note: Consolidation) -> None:
    """Write down which image a file is about to become."""
    write_document(directory, note_name(note.id), note)


def remove_note(directory: Directory, set_id: str) -> None:
    """Remove the note of a file that is again what its manifest says."""
    directory.remove(note_name(set_id))
    directory.sync()


def rewrite_manifest(place: Directory, manifest: Manifest) -> None:
    """Replace the manifest of a published set."""
    write_document(place, MANIFEST, manifest, PUBLISHED_MODE)


def remove_set(repository: Repository, vm: str, set_id: str) -> str:
    """Remove a set, and return what could not be removed and why; empty where all could.

    It is not listed any more from the first moment on. tidy() removes later what a crash, or an error, leaves of it.
    """
    with repository.opened(vm) as directory:
        going = f".{set_id}{REMOVED}"
        number = 1
        while directory.status(going):
            # Another set of this id was removed before, and not all of it could be.
            number += 1
            going = f".{set_id}.{number}{REMOVED}"
        directory.rename(set_id, going)
        directory.sync()
        left = remove_directory(directory, going)
        directory.sync()
    return left
