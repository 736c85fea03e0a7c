# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Errors of open files tell which one; what a file system cannot keep is noted; nothing is left under other names."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.owners import write_owners
from ansible_collections.vmfleet.backup.plugins.module_utils._host import checksum, files, preallocate, texts
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import target_image
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import access
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """A limit that no file may outgrow: a write then fails, on a file descriptor, with no name in its error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def owners(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_owners(fd, {"job": "a" * 8192})
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("work", "step"),
    [
        (lambda path: texts.write_text(path, "a" * 8192), "it was written"),
        (lambda path: write(path, {"a": "b" * 8192}), "it was written"),
        (owners, "the owners of jobs were written"),
        (lambda path: target_image._make_file(path, target_image.Blank(8192, ((0, b"a" * 8192),))), "it was made"),
        (lambda path: checksum.sha256(path, os.open(path, os.O_RDONLY)), "its checksum was taken"),
        # What is no file cannot be brought there.
        (lambda path: preallocate.flush_open(path, os.pipe()[0]), "it was brought to stable storage"),
        (lambda path: target_image.Blank.of(path, os.open(path, os.O_RDONLY)), "it was read"),
    ],
)
def test_errors_tell_the_file_and_the_step(work: Callable[[str], object], step: str, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    if step not in ("it was written", "it was made", "the owners of jobs were written"):
        # A directory can be opened, and not be read.
        os.mkdir(path)
    with no_room(), pytest.raises(OSError, match=f"while {step}") as failed:
        work(path)
    assert str(failed.value.filename).startswith(path)
    words = errors.in_words(failed.value)
    assert words.startswith(path)
    assert "Errno" not in words


def test_the_kind_of_an_error_stays_and_the_innermost_step_is_told() -> None:
    with pytest.raises(FileNotFoundError) as failed, files.step("/outer", "that"), files.step("/inner", "this"):
        os.stat("/nowhere")
    assert failed.value.errno == errno.ENOENT
    assert errors.in_words(failed.value) == "/nowhere: No such file or directory while this"
    assert errors.in_words(ValueError("said")) == "said"
    assert errors.in_words(OSError("said")) == "said"


class TestPermissions:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(errors, "_warnings", {})

    def test_set(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        files.set_mode(str(path), 0o440)
        assert path.stat().st_mode & 0o777 == 0o440
        assert errors.kept_warnings() == []

    @pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS])
    def test_refused(self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_arguments: object) -> None:
            raise OSError(code, "no")

        monkeypatch.setattr(os, "chmod", refuse)
        for name in ("one", "other"):
            (tmp_path / name).touch()
            files.set_mode(str(tmp_path / name), 0o440)
        [warning] = errors.kept_warnings()
        assert "does not keep permissions" in warning
        assert warning.startswith(files._mount_point(str(tmp_path)) + ": ")

    def test_taken_and_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "chmod", lambda *_arguments: None)
        (tmp_path / "file").touch(0o644)
        files.set_mode(str(tmp_path / "file"), 0o600)
        assert "they stay as they are" in errors.kept_warnings()[0]

    def test_read_only_is_taken_back_where_it_is_all_that_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on SMB; `make confined` has a real one."""
        chmod = os.chmod
        monkeypatch.setattr(os, "chmod", lambda file, mode: chmod(file, 0o600 if mode & 0o200 else 0o400))
        (tmp_path / "file").touch()
        files.set_mode(str(tmp_path / "file"), 0o440)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
        assert errors.kept_warnings() == []

    def test_other_errors_are_errors(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="its permissions were set"):
            files.set_mode(str(tmp_path / "nothing"), 0o440)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_names_without_hard_links(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "link", refuse)
    source, name = tmp_path / "source", tmp_path / "name"
    source.write_text("new")
    files.claim(str(source), str(name))
    assert name.read_text() == "new"
    source.write_text("newer")
    with pytest.raises(FileExistsError):
        files.claim(str(source), str(name))
    assert name.read_text() == "new"
    repository = access.create_repository(str(tmp_path / "repository"))
    assert os.listdir(tmp_path / "repository") == ["vmfleet.json"]
    assert access.create_repository(repository.path) == repository


@pytest.mark.parametrize("nameless", [True, False])
def test_scratch(nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, mode)

    if not nameless:
        monkeypatch.setattr(os, "open", without)
    with files.scratch(str(tmp_path), ".mine.") as fd:
        os.write(fd, b"content")
        assert [name[:6] for name in os.listdir(tmp_path)] == ([] if nameless else [".mine."])
    assert os.listdir(tmp_path) == []
