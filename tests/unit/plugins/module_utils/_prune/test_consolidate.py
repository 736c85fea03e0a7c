# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a killed consolidation has left, and when none is begun."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._prune.consolidate import consolidate, finish_consolidation
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import RetentionDecision
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Consolidation, Level
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_note
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import (
    IMAGE_BYTES,
    begin,
    image,
    intent,
    manifest,
    put,
)

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

VM = "web01"
INCREMENT = image("vda", "s1", bytes=IMAGE_BYTES)
FULL = replace(INCREMENT, level=Level.FULL, parent=None, bytes=5)


@pytest.fixture
def increment(repository: Repository) -> Manifest:
    """The second set of a chain."""
    put(repository, manifest("s1", image(bytes=IMAGE_BYTES)), None)
    made = manifest("s2", INCREMENT, sequence=2)
    put(repository, made, None)
    return made


def become_full(repository: Repository) -> None:
    Path(repository.set_path(VM, "s2"), INCREMENT.image).write_bytes(b"abcde")


def note(repository: Repository, attempt: str) -> None:
    with repository.opened(VM) as directory:
        write_note(directory, Consolidation("s2", attempt, FULL))


def consolidated(repository: Repository) -> dict[str, str]:
    """Return what goes wrong when the second set is to become a full one."""
    decision = RetentionDecision("s2", keep=True, reason="last", consolidate=True)
    return asyncio.run(consolidate(repository, read_catalog(repository, VM), [decision]))


@pytest.mark.parametrize(("renamed", "level"), [(True, Level.FULL), (False, Level.INCREMENTAL)])
def test_the_manifest_says_what_the_file_is(
    repository: Repository, increment: Manifest, renamed: bool, level: Level
) -> None:
    """The process was killed before the new file got the name of the old one, or after."""
    note(repository, increment.attempt)
    growing = Path(repository.directory(VM), ".s2.vda.qcow2.consolidating")
    growing.touch()
    if renamed:
        become_full(repository)
    finish_consolidation(repository, VM)
    records = repository.records(VM)
    found = records.published("s2")
    assert found
    assert (found.level, found.disks) == (level, (FULL if renamed else INCREMENT,))
    assert records.notes == ()
    assert sorted(os.listdir(repository.directory(VM))) == ["s1", "s2"]


def test_a_note_of_another_attempt_says_nothing(repository: Repository, increment: Manifest) -> None:
    note(repository, "another")
    become_full(repository)
    finish_consolidation(repository, VM)
    records = repository.records(VM)
    assert records.notes == ()
    assert records.published("s2") == increment


@pytest.mark.usefixtures("increment")
def test_no_full_image_is_made_of_a_damaged_one(repository: Repository) -> None:
    put(repository, manifest("s3", replace(INCREMENT, sha256="0" * 64), sequence=3), None)
    decision = RetentionDecision("s3", keep=True, reason="last", consolidate=True)
    errors = asyncio.run(consolidate(repository, read_catalog(repository, VM), [decision]))
    assert list(errors) == ["s3"]
    assert "is not what was written" in errors["s3"]
    assert sorted(os.listdir(repository.directory(VM))) == ["s1", "s2", "s3"]


@pytest.mark.usefixtures("increment")
def test_space_that_running_backups_need_is_not_taken(repository: Repository) -> None:
    made = intent("s9", image("vda"))
    begin(repository, replace(made, disks=tuple(replace(disk, expected=1 << 50) for disk in made.disks)))
    errors = consolidated(repository)
    assert "of which sets that are being made take 1024.0 TiB" in errors["s2"]


def test_a_set_without_increments_stays_as_it_is(repository: Repository) -> None:
    put(repository, manifest("s2", image(bytes=3)))
    assert consolidated(repository) == {}
