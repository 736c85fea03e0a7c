# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Processes: one that is told from a later one of the same number."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import process as host_process
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose name looks like the fields that follow it in /proc/PID/stat."""
    program = tmp_path / "a) Z 1 (b"
    shutil.copy(shutil.which("sleep") or "", program)
    process = subprocess.Popen([program, "60"])
    yield process
    process.kill()
    process.wait()


def wait_for_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 10
    while host_process._process_stat(pid)[0] != state:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestProcess:
    def test_lives(self, child: subprocess.Popen[bytes]) -> None:
        wait_for_state(child.pid, "S")
        process = Process.of(child.pid)
        assert process
        assert process.pid == child.pid
        assert process.alive
        assert not process.stopped

    def test_later_one_of_the_same_pid_is_another(self, child: subprocess.Popen[bytes]) -> None:
        process = Process.of(child.pid)
        assert process
        assert not Process(process.pid, process.start + 1).alive

    def test_stopped_one_lives(self, child: subprocess.Popen[bytes]) -> None:
        child.send_signal(signal.SIGSTOP)
        wait_for_state(child.pid, "T")
        process = Process.of(child.pid)
        assert process
        assert process.stopped
        assert process.alive

    def test_zombie_and_what_is_gone_do_not_live(self, child: subprocess.Popen[bytes]) -> None:
        process = Process.of(child.pid)
        assert process
        child.kill()
        wait_for_state(child.pid, "Z")
        assert not process.alive
        child.wait()
        assert not process.alive
        assert not process.stopped
        assert Process.of(child.pid) is None
