# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write down that an increment becomes a full image, and what its set is after that.

Called with the VM's lock held, and with its directory, or that of the set, open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .json_file import write_document
from .repository import MANIFEST, PUBLISHED_MODE, note_name

if TYPE_CHECKING:
    from .._host.directory import Directory
    from .documents import Consolidation, Manifest


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
