# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which VMs are verified, and what is told of their sets, whatever is wrong with others."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Depth, read_annotations
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import Finding, VerifyOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.verify import known_vms, verify_all
from ansible_collections.vmfleet.backup.tests.unit.plugins.verifying import VM, image, publish, verify

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def test_good_set(repository: Repository) -> None:
    publish(repository, 1, image("a"), image("b"))
    publish(repository, 2, image("a", "s1"), image("b", "s1"))
    assert verify(repository) == [Finding(VM, "s2", disk, Depth.MANIFEST) for disk in "ab"]
    [mark] = read_annotations(repository, VM).verifications
    assert (mark.id, mark.attempt, mark.depth, mark.errors) == ("s2", "attempt-s2", Depth.MANIFEST, ())


def test_check_mode(repository: Repository) -> None:
    publish(repository, 1, image("a"))
    before = sorted(os.listdir(repository.directory(VM)))
    assert verify(repository, check=True) == [Finding(VM, "s1", "a", Depth.MANIFEST)]
    assert sorted(os.listdir(repository.directory(VM))) == before


def test_vms_of_a_repository(repository: Repository) -> None:
    publish(repository, 1, image("a"))
    for path in ("gone/s1/disk.qcow2", "reports/today/page.html", "notes/todo"):
        Path(repository.path, path).parent.mkdir(parents=True)
        Path(repository.path, path).touch()
    assert known_vms(repository) == ["gone", VM]


def spoil(repository: Repository, path: str, text: str) -> None:
    """Put something that cannot be read where a document of a VM stands."""
    document = Path(repository.path, path)
    document.parent.mkdir(parents=True)
    if text:
        document.write_text(text)
    else:
        document.symlink_to(document)


@pytest.mark.parametrize("text", ['{"schema": 99}', ""], ids=["newer", "unreadable"])
@pytest.mark.parametrize("document", ["s1/manifest.json", ".s1.staging/intent.json", ".s1.staging/manifest.json"])
def test_one_vm_that_cannot_be_read_does_not_stop_the_others(repository: Repository, document: str, text: str) -> None:
    publish(repository, 1, image("a"))
    spoil(repository, f"db01/{document}", text)
    names = known_vms(repository)
    assert names == ["db01", VM]
    findings, warnings = asyncio.run(verify_all(repository, names, "", VerifyOptions(Depth.MANIFEST)))
    assert [(one.vm, bool(one.error)) for one in findings] == [("db01", True), (VM, False)]
    assert document in findings[0].error
    assert not warnings


def test_what_may_be_a_vm_is_not_passed_over(repository: Repository) -> None:
    """It leads to where nobody gets to, as a file server that does not answer."""
    publish(repository, 1, image("a"))
    for name in ("db01", "lost+found"):
        Path(repository.path, name).symlink_to(Path(repository.path, name))
    assert known_vms(repository) == ["db01", VM]
