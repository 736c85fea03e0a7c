# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures of the tests in guests of tools/confined."""

from __future__ import annotations

import shutil
import tempfile
import typing as t
from pathlib import Path

import pytest

# Before their import: a failed assertion in there is to tell what it saw.
pytest.register_assert_rewrite("ansible_collections.vmfleet.backup.tests.harness")

from ansible_collections.vmfleet.backup.tests.harness.confined import IS_HERE
from ansible_collections.vmfleet.backup.tests.harness.fixtures import (
    clean,
    directory,
    start_module,
    storage,
    vms,
)
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

__all__ = ["clean", "directory", "start_module", "storage", "vms"]


@pytest.fixture(autouse=True)
def _guest(request: pytest.FixtureRequest) -> None:
    assert request.path.stem == f"test_{IS_HERE}", "this is for a guest of `make confined` with another kernel"


@pytest.fixture
def place() -> t.Iterator[Path]:
    """An empty directory below /srv, an ext4 of the guest's own, where nothing is allowed to QEMU."""
    path = Path(tempfile.mkdtemp(prefix="vmfleet-test-", dir="/srv"))
    path.chmod(0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sets(place: Path) -> Sets:
    """A repository that is still to be made."""
    return Sets(place / "repository")


@pytest.fixture
def target(place: Path) -> Path:
    """Where a copy goes."""
    return place / "disk.qcow2"
