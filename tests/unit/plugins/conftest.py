# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures of the unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import Directory
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Marker
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.json_file import write_document
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import REPOSITORY_FILE
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository, that of the sets and intents in builders."""
    path = tmp_path / "repository"
    path.mkdir(mode=0o700)
    with Directory.at(str(path)) as root:
        write_document(root, REPOSITORY_FILE, Marker(REPOSITORY))
    return open_repository(str(path))


@pytest.fixture(autouse=True)
def _warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no warnings of other tests, as each module is a process of its own."""
    monkeypatch.setattr(errors, "_warnings", {})
