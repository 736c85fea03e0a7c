# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What does not belong to a set, and what a set has lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import lost_sets
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.manifest_check import lost_set
from ansible_collections.vmfleet.backup.tests.unit.plugins.verifying import VM, image, publish, verify

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import DiskImage
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((), "disks: a list of 0 is not a list of 1 to 4096"),
        ((image("a"), image("b", image="a.qcow2")), "disks: two of them have one name or one file"),
    ],
)
def test_odd_manifests(repository: Repository, images: tuple[DiskImage, ...], message: str) -> None:
    publish(repository, 1, *images)
    found = verify(repository)[0]
    assert found.disk == ""
    assert message in found.error


def test_files_that_do_not_belong_to_a_set(repository: Repository) -> None:
    publish(repository, 1, image("a"))
    path = Path(repository.set_path(VM, "s1"))
    # A killed process and NFS leave these behind.
    for name in ("intent.json", "manifest.json.new", ".nfs0001"):
        (path / name).touch()
    (path / "notes").touch()
    [found, good] = verify(repository)
    assert found.error == f"{path}/notes does not belong to the set; move it away"
    assert (good.disk, good.error) == ("a", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "it has no schema number"),
        ('{"schema": 99}', "its schema 99 is newer than this collection"),
        ("{", "it is not JSON: Expecting property name"),
        (None, "No such file or directory"),
    ],
)
def test_descriptions_that_cannot_be_read(repository: Repository, text: str | None, reason: str) -> None:
    publish(repository, 1, image("a"))
    path = Path(repository.set_path(VM, "s1"), "vm.json")
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    found = verify(repository)[0]
    assert found.error.startswith(f"{path} cannot be read ({reason}")


def test_a_set_below_the_name_of_another_vm(repository: Repository) -> None:
    publish(repository, 1, image("a"))
    os.rename(repository.directory(VM), repository.directory("db01"))
    [found] = verify(repository, vm="db01")
    path = f"{repository.set_path('db01', 's1')}/manifest.json"
    assert found.error.startswith(f"{path} is damaged or misplaced (it is of VM {VM}, and not of this one)")


def test_what_was_a_set_and_what_was_none(repository: Repository) -> None:
    for path in ("s1/disk.qcow2", "s2/vm.json", "notes/todo"):
        file = Path(repository.directory(VM), path)
        file.parent.mkdir(parents=True)
        file.touch()
    (file.parent.parent / "file").touch()
    place = Path(repository.directory(VM))
    (place / "moved").symlink_to("/elsewhere")
    records = repository.records(VM)
    assert records.strays == {"s2", "notes", "s1", "file", "moved"}
    assert lost_sets(repository, VM, records) == ["moved", "s1", "s2"]
    assert lost_set(repository, VM, "s1", records).error.startswith(f"{place}/s1/manifest.json is missing")
    found = lost_set(repository, VM, "moved", records).error
    assert found.startswith(f"{place}/moved is a symbolic link to /elsewhere, and not a directory")
