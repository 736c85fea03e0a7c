# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether a process goes on: one that is fed, is busy, or waits. No time passes but where a test says so."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import progress
from ansible_collections.vmfleet.backup.plugins.module_utils._host.progress import (
    STANDSTILL,
    WITHOUT_DATA,
    Patience,
    work_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOTHING = f"it has done nothing for {STANDSTILL:g} s"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_waiting(pid: int) -> bool:
    """Return whether a process waits in a call, so that nothing comes of it any more by itself."""
    with open(f"/proc/{pid}/wchan", encoding="ascii") as place, open(f"/proc/{pid}/syscall", encoding="ascii") as call:
        return place.read() not in ("", "0") and call.read().split()[0] == "0"


def test_what_reads_now_and_then_goes_on(clock: Clock) -> None:
    with started("cat") as process:
        wait_until(lambda: is_waiting(process.pid))
        patience = Patience(process.pid)
        assert process.stdin
        for _piece in range(5):
            before = work_of(process.pid)
            clock.now += 0.9 * STANDSTILL
            process.stdin.write(b"x")
            process.stdin.flush()
            wait_until(lambda before=before: work_of(process.pid) != before)
            assert patience.ends() == ""
        wait_until(lambda: is_waiting(process.pid))
        # What has been done since the last look counts as done now.
        patience.ends()
        clock.now += 0.9 * STANDSTILL
        assert patience.ends() == ""
        clock.now += 0.1 * STANDSTILL
        assert patience.ends() == NOTHING


def test_what_is_busy_goes_on_but_not_for_ever(clock: Clock) -> None:
    with started(sys.executable, "-I", "-S", "-c", "print(flush=True)\nwhile True: pass") as process:
        assert process.stdout
        process.stdout.read(1)
        # From here on it reads and writes nothing.
        patience = Patience(process.pid)
        reasons = []
        while not any(reasons):
            before = work_of(process.pid)
            clock.now += 0.9 * STANDSTILL
            wait_until(lambda before=before: work_of(process.pid) != before)
            reasons.append(patience.ends())
        assert WITHOUT_DATA <= clock.now < WITHOUT_DATA + STANDSTILL
        assert reasons[-1] == f"it has read and written nothing for {WITHOUT_DATA:g} s"


def test_what_cannot_be_looked_into_has_the_longest_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc is that of another name space."""
    monkeypatch.setattr(progress, "proc_is_ours", lambda: False)
    patience = Patience(os.getpid())
    clock.now += WITHOUT_DATA - 1
    assert patience.ends() == ""
    clock.now += 1
    assert patience.ends() == f"it has read and written nothing for {WITHOUT_DATA:g} s"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_where_bytes_are_not_told_the_processor_is_asked() -> None:
    """As of a program that nobody may look into."""
    source, sink = os.pipe()
    with started("cat") as process:
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            work = work_of(process.pid)
            os.write(sink, f"{work.moved} {work.ticks is not None}".encode())
            os._exit(0)
        os.waitpid(child, 0)
    assert os.read(source, 100) == b"None True"
    os.close(source)
    os.close(sink)
