# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which overlays of a VM there are, and what is not taken for one."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import read_annotations
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.checks import make_receipt
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import RestoreMethod
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.overlays import find_overlays, remove_overlays
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.pins import make_pin
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID, write
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import disk_restore

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

VM = "web01"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def write_receipt(repository: Repository, path: Path, vm: str = VM, method: str = RestoreMethod.OVERLAY) -> None:
    """Write a file that says of itself that it was restored."""
    path.touch()
    disk = disk_restore(path)
    receipt = replace(make_receipt(repository, disk, path.stat()), vm=vm, method=method)
    write(disk.receipt, asdict(receipt))


def test_overlays_in_a_directory(repository: Repository, images: Path) -> None:
    Path(repository.directory(VM)).mkdir()
    write_receipt(repository, images / "made")
    write_receipt(repository, images / "copy", method=RestoreMethod.COPY)
    write_receipt(repository, images / "another", vm="db01")
    write_receipt(replace(repository, uuid=UUID), images / "elsewhere")
    for path in (images / "pinned", images / "unfinished.partial", images / "below" / "disk"):
        write_annotation(repository, VM, make_pin(disk_restore(path, RestoreMethod.OVERLAY)))
    remote = replace(make_pin(disk_restore(images / "remote", RestoreMethod.OVERLAY)), machine_id="another")
    write_annotation(repository, VM, remote)
    found = find_overlays(repository, read_catalog(repository, VM), f"{images}/")
    assert found == [str(images / name) for name in ("made", "pinned")]


@pytest.mark.parametrize(
    ("vm", "method", "uuid", "message"),
    [
        (VM, RestoreMethod.COPY, "", "is no overlay that was made by a restore"),
        ("db01", RestoreMethod.OVERLAY, "", "is disk vda of VM db01, and not of VM web01"),
        (VM, RestoreMethod.OVERLAY, UUID, "is disk vda of VM web01 from another repository"),
    ],
)
def test_what_is_no_overlay_of_this_vm_stays(
    repository: Repository, images: Path, vm: str, method: RestoreMethod, uuid: str, message: str
) -> None:
    path = images / "disk"
    write_receipt(replace(repository, uuid=uuid or repository.uuid), path, vm, method)
    with pytest.raises(BackupError, match=message):
        asyncio.run(remove_overlays(repository, read_catalog(repository, VM), [str(path)], check_mode=False))
    assert path.exists()


@pytest.mark.parametrize("check_mode", [False, True])
def test_what_a_killed_restore_has_left(repository: Repository, images: Path, check_mode: bool) -> None:
    """Its file may not exist yet, but its pin does."""
    Path(repository.directory(VM)).mkdir()
    path = images / "disk"
    write_annotation(repository, VM, make_pin(disk_restore(path, RestoreMethod.OVERLAY)))
    targets = [str(path), str(images / "never")]
    gone = asyncio.run(remove_overlays(repository, read_catalog(repository, VM), targets, check_mode))
    assert gone == ([str(path)], [])
    assert bool(read_annotations(repository, VM).pins) == check_mode
