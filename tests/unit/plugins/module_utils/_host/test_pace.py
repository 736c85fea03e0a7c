# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reading beside another process: not far ahead of it, and never waiting for one that reads no more."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import checksum, pace
from ansible_collections.vmfleet.backup.plugins.module_utils._host.checksum import READ_SIZE, Stopped, sha256
from ansible_collections.vmfleet.backup.plugins.module_utils._host.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AHEAD = 4 * READ_SIZE
SIZE = 16 * READ_SIZE
READER = """
import os, sys
source = os.open(sys.argv[1], os.O_RDONLY)
for line in sys.stdin:
    os.read(source, int(line))
    print("read", flush=True)
"""


@pytest.fixture(autouse=True)
def _near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "AHEAD", AHEAD)
    monkeypatch.setattr(checksum, "AHEAD", AHEAD)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def reader(image: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reads as many bytes of the image as it is told."""
    command = [sys.executable, "-c", READER, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        read(process, 0)
        yield process
        process.kill()


def read(reader: subprocess.Popen[str], count: int) -> None:
    assert reader.stdin
    assert reader.stdout
    print(count, file=reader.stdin, flush=True)
    assert reader.stdout.readline() == "read\n"


class Told(Pace):
    """Tells each time that it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)

    def _theirs(self) -> int:
        found = super()._theirs()
        self.waits.release()
        return found


def test_it_is_never_far_ahead(image: Path, reader: subprocess.Popen[str]) -> None:
    with image.open("rb") as file:
        paced = Told()
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(sha256(str(image), file.fileno(), paced)))
        paced.begin(reader.pid)
        thread.start()
        far = 0
        # What the process has read to be started counts, too.
        for count in (READ_SIZE, 2 * READ_SIZE, 3 * READ_SIZE):
            for _look in range(2 * SIZE // READ_SIZE):
                paced.waits.acquire()
            assert thread.is_alive()
            assert far < os.lseek(file.fileno(), 0, os.SEEK_CUR) < SIZE
            far = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            read(reader, count)
        paced.end()
        thread.join()
        assert found == [hashlib.sha256(image.read_bytes()).hexdigest()]


@pytest.mark.parametrize("begun", [False, True])
def test_nobody_waits_for_one_that_has_ended(image: Path, reader: subprocess.Popen[str], *, begun: bool) -> None:
    paced = Pace()
    if begun:
        paced.begin(reader.pid)
        reader.kill()
        reader.wait()
    else:
        # It has failed before it read anything.
        paced.end()
    with image.open("rb") as file:
        assert sha256(str(image), file.fileno(), paced) == hashlib.sha256(image.read_bytes()).hexdigest()


def test_what_nobody_needs_is_not_read_to_its_end(image: Path) -> None:
    stop = threading.Event()
    stop.set()
    with image.open("rb") as file, pytest.raises(Stopped):
        sha256(str(image), file.fileno(), None, stop)
