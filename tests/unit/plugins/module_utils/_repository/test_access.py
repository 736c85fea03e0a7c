# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Repositories are made once, and found."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import PREFIX
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import (
    check_creatable,
    check_writable,
    create_repository,
    find_repository,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository, open_repository

if TYPE_CHECKING:
    from pathlib import Path


class TestRepository:
    def test_is_made_once(self, tmp_path: Path) -> None:
        first = create_repository(str(tmp_path / "new"))
        assert create_repository(str(tmp_path / "new")) == first == open_repository(str(tmp_path / "new"))
        assert os.listdir(tmp_path / "new") == ["vmfleet.json"]
        assert len(first.tag) == 8

    def test_a_creator_that_died_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / ".vmfleet.json.0123").touch()
        create_repository(str(tmp_path))
        assert os.listdir(tmp_path) == ["vmfleet.json"]

    def test_one_who_looks_whether_files_can_be_made_is_no_obstacle(self, tmp_path: Path) -> None:
        # What scratch() makes where a file system has no files without a name.
        (tmp_path / (PREFIX + "0123")).touch()
        check_creatable(str(tmp_path))
        create_repository(str(tmp_path))
        assert os.listdir(tmp_path) == ["vmfleet.json"]

    def test_missing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BackupError, match="mounted"):
            find_repository(str(tmp_path), create=False)

    def test_is_not_made_by_looking(self, tmp_path: Path) -> None:
        assert find_repository(str(tmp_path / "new"), create=True) == Repository(str(tmp_path / "new"), "")
        assert os.listdir(tmp_path) == []

    def test_is_not_made_among_other_things(self, tmp_path: Path) -> None:
        (tmp_path / "holiday.jpg").touch()
        with pytest.raises(BackupError, match=r"holiday\.jpg"):
            check_creatable(str(tmp_path))

    def test_lost_and_found_is_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "lost+found").mkdir()
        check_creatable(str(tmp_path))

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "uuid": "no"}'])
    def test_broken(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "vmfleet.json").write_text(content)
        with pytest.raises(BackupError, match="cannot be read"):
            open_repository(str(tmp_path))

    def test_newer(self, tmp_path: Path) -> None:
        (tmp_path / "vmfleet.json").write_text('{"schema": 2, "uuid": ""}')
        with pytest.raises(BackupError, match=r"update vmfleet\.backup"):
            open_repository(str(tmp_path))

    def test_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_args: False)
        with pytest.raises(BackupError, match="not writable"):
            check_writable(Repository(str(tmp_path), ""))
