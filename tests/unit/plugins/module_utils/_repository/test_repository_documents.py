# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A document is there as a whole, or as it was before, or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    Depth,
    Protection,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.json_file import OddDocument
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import TIME, read, write

if TYPE_CHECKING:
    from pathlib import Path

PROTECTION = Protection("s1", TIME)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "document"
    write(path, asdict(PROTECTION))
    assert read(path, Protection) == PROTECTION
    assert os.listdir(tmp_path) == ["document"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write(path, asdict(Protection("s2", TIME)), 0o440)
    assert read(path, Protection) == Protection("s2", TIME)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440


def test_one_of_many_bytes(tmp_path: Path) -> None:
    large = Verification("s1", "a1", Depth.IMAGE, TIME, ("ä" * 16384,) * 12)
    write(tmp_path / "document", asdict(large))
    assert read(tmp_path / "document", Verification) == large


def test_a_half_written_one_of_a_killed_process_goes(tmp_path: Path) -> None:
    (tmp_path / "document.new").write_text("{")
    write(tmp_path / "document", asdict(PROTECTION))
    assert os.listdir(tmp_path) == ["document"]


def test_the_old_one_stays_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "document"
    write(path, asdict(PROTECTION))
    with pytest.raises(TypeError):
        write(path, {"what": object()})
    assert read(path, Protection) == PROTECTION


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": 1}', '{"id": "s1"}', "\udcff"])
def test_one_that_is_not_whole_is_odd(tmp_path: Path, content: str) -> None:
    (tmp_path / "document").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(OddDocument, match=r"document is damaged or misplaced \(.*\); bring it back from a copy") as odd:
        read(tmp_path / "document", Protection)
    assert (odd.value.damaged, odd.value.newer) == (True, False)


def test_one_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read(tmp_path / "document", Protection) is None


def test_one_of_a_later_release_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "document").write_text(json.dumps({**asdict(PROTECTION), "schema": 2}))
    with pytest.raises(BackupError, match=r"document: its schema 2 is newer .* update vmfleet\.backup"):
        read(tmp_path / "document", Protection)


def test_one_that_is_something_else_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "document")
    with pytest.raises(BackupError, match="document is a named pipe, and not a file"):
        read(tmp_path / "document", Protection)


def test_one_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "document").touch()
    os.truncate(tmp_path / "document", Protection.MOST + 1)
    with pytest.raises(BackupError, match=f"document has more than {Protection.MOST} bytes"):
        read(tmp_path / "document", Protection)


def test_one_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "document", asdict(PROTECTION))

    def fail(_fd: int, _length: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(BackupError, match="document cannot be read: Input/output error"):
        read(tmp_path / "document", Protection)
