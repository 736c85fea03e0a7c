# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A document is there as a whole, or as it was before, or not at all."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import LONG
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotation_documents import (
    Depth,
    Protection,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import (
    read_document,
    write_document,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import TIME

if TYPE_CHECKING:
    from pathlib import Path

PROTECTION = Protection("s1", TIME)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "document"
    write_document(str(path), asdict(PROTECTION))
    assert read_document(str(path), Protection) == PROTECTION
    assert os.listdir(tmp_path) == ["document"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_document(str(path), asdict(Protection("s2", TIME)), 0o440)
    assert read_document(str(path), Protection) == Protection("s2", TIME)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440


def test_one_of_many_bytes(tmp_path: Path) -> None:
    large = Verification("s1", "a1", Depth.IMAGE, TIME, ("ä" * LONG,) * 3)
    write_document(str(tmp_path / "document"), asdict(large))
    assert read_document(str(tmp_path / "document"), Verification) == large


def test_a_half_written_one_of_a_killed_process_goes(tmp_path: Path) -> None:
    (tmp_path / "document.new").write_text("{")
    write_document(str(tmp_path / "document"), asdict(PROTECTION))
    assert os.listdir(tmp_path) == ["document"]


def test_the_old_one_stays_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "document"
    write_document(str(path), asdict(PROTECTION))
    with pytest.raises(TypeError):
        write_document(str(path), {"what": object()})
    assert read_document(str(path), Protection) == PROTECTION


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": 1}', '{"id": "s1"}', "\udcff"])
def test_one_that_is_not_whole_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "document").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_document(str(tmp_path / "document"), Protection) is None


def test_one_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_document(str(tmp_path / "document"), Protection) is None
    (tmp_path / "file").touch()
    assert read_document(str(tmp_path / "file" / "document"), Protection) is None


def test_one_of_a_later_release_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "document").write_text(json.dumps({**asdict(PROTECTION), "schema": 2}))
    with pytest.raises(BackupError, match=r"document: its schema 2 is newer .* update vmfleet\.backup"):
        read_document(str(tmp_path / "document"), Protection)


def test_one_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="cannot be read: Is a directory"):
        read_document(str(tmp_path), Protection)
