# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A disk and a chain of three sets of it: `s1` is full, `s2` and `s3` are increments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Bitmap, Disk
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import bitmap

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
        DiskImage,
        Manifest,
        Parent,
    )


def disk(*bitmaps: str | Bitmap, name: str = "vda", **more: Any) -> Disk:
    """Return a disk with these bitmaps."""
    found = tuple(entry if isinstance(entry, Bitmap) else bitmap(entry) for entry in bitmaps)
    return builders.disk(**{"name": name, "node": f"n-{name}", "bitmaps": found, **more})


def image(set_id: str, below: Parent | None = None, name: str = "vda", **more: Any) -> DiskImage:
    """Return a disk's image in a set, with the bitmap `b-<set>` (`b-<set>-<disk>` for other disks than vda)."""
    record = f"b-{set_id}" if name == "vda" else f"b-{set_id}-{name}"
    return builders.image(name, below, **{"sha256": f"sum-{set_id}", "bitmap": record, **more})


def manifest(set_id: str, sequence: int, *images: DiskImage) -> Manifest:
    """Return the manifest of a set."""
    return builders.manifest(set_id, *images, sequence=sequence)


def parent(set_id: str) -> Parent:
    """Return what an increment says of the image() that it builds on."""
    return builders.parent(set_id, sha256=f"sum-{set_id}")


S1 = manifest("s1", 1, image("s1"))
S2 = manifest("s2", 2, image("s2", parent("s1")))
S3 = manifest("s3", 3, image("s3", parent("s2")))
