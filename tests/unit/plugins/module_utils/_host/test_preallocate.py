# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Space is reserved, and what is written is brought to stable storage."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_bytes(b"header")
    return path


def test_flush_raises_what_fsync_says(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        preallocate.flush(str(image))


class TestWriteback:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
        """What the kernel was asked for; it is at it until `done` is set."""
        calls: list[list[int]] = []

        done = self.done = threading.Event()

        def sync_file_range(*arguments: Any) -> int:
            calls.append([argument.value for argument in arguments])
            done.wait(30)
            return 0

        monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(sync_file_range=sync_file_range))
        return calls

    @staticmethod
    def thread(writeback: preallocate.Writeback) -> threading.Thread:
        assert writeback._thread
        return writeback._thread

    def test_one_call_at_a_time_that_nobody_waits_for(self, calls: list[list[int]]) -> None:
        writeback = preallocate.Writeback(7)
        for _dummy in range(3):
            writeback.nudge()
        first = self.thread(writeback)
        assert first.daemon
        self.done.set()
        first.join(30)
        assert calls == [[7, 0, 0, preallocate.SYNC_FILE_RANGE_WRITE]]
        writeback.nudge()
        self.thread(writeback).join(30)
        assert len(calls) == 2

    def test_kernel_has_it(self, image: Path) -> None:
        with image.open("r+b") as file:
            preallocate._write_out(file.fileno())
        assert image.read_bytes() == b"header"


def test_reserving_tells_the_file(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    with pytest.raises(BackupError, match=r"image: .* while its space was reserved"):
        preallocate.top_up(str(tmp_path / "image"), 1 << 62)
