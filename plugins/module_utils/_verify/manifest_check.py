# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the manifest of a set, its files, and the description of its VM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host.directory import WrongEntry
from .._host.files import UNFINISHED
from .._repository.annotations import Depth
from .._repository.description import is_as_written, read_description
from .._repository.repository import DESCRIPTION, INTENT, MANIFEST
from .model import REMEDY, Finding

if TYPE_CHECKING:
    from .._repository.catalog import VmCatalog
    from .._repository.documents import Manifest
    from .._repository.repository import Repository, VmRecords
    from .model import SetCheck


def check_manifest(repository: Repository, check: SetCheck) -> None:
    """Find the chain of each disk, and check what stands in the directory of the set."""
    catalog, manifest = check.catalog, check.manifest
    for image in manifest.disks:
        try:
            check.chains[image.name] = catalog.chain(manifest, image.name)
        except BackupError:
            reason = catalog.broken.get((manifest.id, image.name), "its chain is not complete")
            check.fail(image.name, Depth.MANIFEST, f"{reason}; {REMEDY}")
    reasons = [*_unexpected(repository, catalog, manifest), *_bad_description(repository, manifest)]
    if reasons:
        check.fail("", Depth.MANIFEST, "; ".join(reasons))


def _unexpected(repository: Repository, catalog: VmCatalog, manifest: Manifest) -> list[str]:
    """Return what does not belong to a set like this one."""
    path = repository.set_path(catalog.name, manifest.id)
    images = {image.image for image in manifest.disks}
    expected = {MANIFEST, DESCRIPTION, *images}
    # A killed process leaves these behind.
    expected |= {INTENT, *(name + UNFINISHED for name in (MANIFEST, DESCRIPTION, INTENT))}
    # NFS keeps a removed file under such a name while somebody reads it.
    with repository.opened(catalog.name, manifest.id) as place:
        entries = [entry for entry in place.names() if not entry.startswith(".nfs")]
    return [
        f"{os.path.join(path, entry)} does not belong to the set; move it away"
        for entry in entries
        if entry not in expected
    ]


def _bad_description(repository: Repository, manifest: Manifest) -> list[str]:
    """Return what is wrong with the description of the VM."""
    path = os.path.join(repository.set_path(manifest.vm.name, manifest.id), DESCRIPTION)
    try:
        read_description(repository, manifest)
        if not is_as_written(repository, manifest):
            return [f"{path} is not what was written: its SHA-256 is another one than that in the manifest; {REMEDY}"]
    except WrongEntry as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return [f"{path} cannot be read ({why}), and no other file says how the VM was built; {REMEDY}"]
    return []


def lost_set(repository: Repository, vm: str, set_id: str, records: VmRecords) -> Finding:
    """Return what is said of a set that has lost its manifest, or stands elsewhere."""
    path = os.path.join(repository.set_path(vm, set_id), MANIFEST)
    error = f"{path} is missing or damaged, so that this is no set any more; {REMEDY} and move the directory away"
    return Finding(vm, set_id, "", Depth.MANIFEST, records.odd.get(set_id, error))
