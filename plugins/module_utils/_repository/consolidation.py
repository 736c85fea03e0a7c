# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write down that an increment becomes a full image, and what its set is after that.

Called with the VM's lock held.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from .._host.files import remove, sync_directory
from .repository import MANIFEST, PUBLISHED_MODE, write_document

if TYPE_CHECKING:
    from .documents import Consolidation, Manifest
    from .repository import Repository


def write_note(repository: Repository, vm: str, note: Consolidation) -> None:
    """Write down which image a file is about to become."""
    write_document(repository.note_path(vm, note.id), asdict(note))


def remove_note(repository: Repository, vm: str, set_id: str) -> None:
    """Remove the note of a file that is again what its manifest says."""
    remove(repository.note_path(vm, set_id))
    sync_directory(repository.directory(vm))


def rewrite_manifest(repository: Repository, manifest: Manifest) -> None:
    """Replace the manifest of a published set."""
    path = os.path.join(repository.set_path(manifest.vm.name, manifest.id), MANIFEST)
    write_document(path, asdict(manifest), PUBLISHED_MODE)
