# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Build what a restore is about: a disk of a set, and where it goes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import DiskRestore, RestoreMethod
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image, manifest

if TYPE_CHECKING:
    from pathlib import Path


IMAGE = image()
MANIFEST = manifest("s1", IMAGE)


def disk_restore(target: Path | str, method: RestoreMethod = RestoreMethod.COPY, **more: Any) -> DiskRestore:
    """Return the restore of disk vda of set s1 of web01."""
    return replace(DiskRestore("vda", ((MANIFEST, IMAGE),), str(target), "qcow2", method), **more)
