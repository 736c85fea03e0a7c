# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Processes: one that is told from a later one of the same number, and one that ends with its parent."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import process as host_process
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process, die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PARENT = """
import subprocess, time
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import die_with_parent
print(subprocess.Popen(die_with_parent(["sleep", "60"])).pid, flush=True)
time.sleep(60)
"""


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
    while host_process.process_stat(pid)[0] != state:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestProcess:
    def test_is_known_by_any_of_its_threads(self, child: subprocess.Popen[bytes]) -> None:
        assert Process.of_thread(threading.get_native_id()) == Process.of(os.getpid())
        found: list[Process | None] = []
        thread = threading.Thread(target=lambda: found.append(Process.of_thread(threading.get_native_id())))
        thread.start()
        thread.join()
        assert found == [Process.of(os.getpid())]
        assert Process.of_thread(child.pid) == Process.of(child.pid)
        child.kill()
        child.wait()
        assert Process.of_thread(child.pid) is None

    def test_has_a_command_line(self, child: subprocess.Popen[bytes]) -> None:
        wait_for_state(child.pid, "S")
        process = Process.of(child.pid)
        assert process
        assert process.arguments[1] == "60"
        child.kill()
        child.wait()
        assert process.arguments == []

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


class TestDieWithParent:
    def test_a_command_is_run_as_it_is(self) -> None:
        command = ["sh", "-c", 'printf "%s|" "$0" "$@"; nice', "a b", "'c'", ""]
        done = subprocess.run(die_with_parent(command, niceness=3), capture_output=True, text=True, check=True)
        assert done.stdout == f"a b|'c'||{os.nice(0) + 3}\n"

    def test_its_exit_status_is_that_of_the_command(self) -> None:
        assert subprocess.run(die_with_parent(["sh", "-c", "exit 7"]), check=False).returncode == 7

    def test_what_is_not_installed(self) -> None:
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            die_with_parent(["no-such-program"])

    @pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
    def test_it_ends_with_its_parent(self, end: signal.Signals) -> None:
        parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
        assert parent.stdout
        child = Process.of(int(parent.stdout.readline()))
        assert child
        assert child.alive
        parent.send_signal(end)
        parent.wait()
        deadline = time.monotonic() + 10
        while child.alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        parent.stdout.close()

    def test_it_does_not_begin_where_its_parent_has_ended(self, tmp_path: Path) -> None:
        command = die_with_parent(["touch", str(tmp_path / "begun")])
        # As if another process had started it.
        command[command.index(str(os.getpid()))] = "1"
        assert subprocess.run(command, check=False).returncode == 0
        assert not (tmp_path / "begun").exists()


def test_too_many_open_files_end_no_process(child: subprocess.Popen[bytes]) -> None:
    found = Process.of(child.pid)
    assert found
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            assert found.alive
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.alive
