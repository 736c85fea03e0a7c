# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write down that an increment becomes a full image, and what its set is after that.

Called with the VM's lock held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .json_file import write_document
from .repository import MANIFEST, PUBLISHED_MODE, note_name

if TYPE_CHECKING:
    from .documents import Consolidation, Manifest
    from .repository import Repository


def write_note(repository: Repository, vm: str, note: Consolidation) -> None:
    """Write down which image a file is about to become."""
    with repository.opened(vm) as directory:
        write_document(directory, note_name(note.id), note)


def remove_note(repository: Repository, vm: str, set_id: str) -> None:
    """Remove the note of a file that is again what its manifest says."""
    with repository.opened(vm) as directory:
        directory.remove(note_name(set_id))
        directory.sync()


def rewrite_manifest(repository: Repository, manifest: Manifest) -> None:
    """Replace the manifest of a published set."""
    with repository.opened(manifest.vm.name, manifest.id) as place:
        write_document(place, MANIFEST, manifest, PUBLISHED_MODE)
