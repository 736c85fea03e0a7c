# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures of the unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import create_repository

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository."""
    return create_repository(str(tmp_path / "repository"))


@pytest.fixture(autouse=True)
def _warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no warnings of other tests, as each module is a process of its own."""
    monkeypatch.setattr(errors, "_warnings", {})
