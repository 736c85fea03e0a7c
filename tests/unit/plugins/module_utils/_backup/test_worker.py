# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which of two workers gives way that were given one repository by two paths."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import worker, worker_place
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.board import Board
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import Who, WorkerPlace
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALLER, LARGER = "0" * 16, "f" * 16


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_place, "lock_directory", lambda: str(tmp_path))


class Begun:
    """A worker that has its lock, and is about to open its repository."""

    def __init__(self, path: str, key: str) -> None:
        self.key = key
        self.place = WorkerPlace.of(path)
        lock = self.place.take()
        assert lock is not None
        self._lock = lock
        who = Who(1, 2, "3", key, "s1", "2026-11-30T01:00:05Z", ["web01"], [], "run")
        os.pwrite(lock, json.dumps(who._asdict()).encode(), 0)

    def open(self, before: Callable[[], object] = lambda: None) -> str:
        """Open the repository, with C(before) between the two halves of it; return why it has given way, if so."""

        def opened(uuid: str) -> None:
            before()
            worker._give_way(self.place, self.key, uuid)

        try:
            Board(self.place.progress, self.key, opened).open(REPOSITORY)
        except Refused as error:
            self.end()
            return str(error)
        return ""

    def end(self) -> None:
        os.close(self._lock)


PATHS = pytest.mark.parametrize("paths", [("/a", "/b"), ("/b", "/a")], ids=" and ".join)


@PATHS
def test_of_two_that_begin_at_once_the_one_with_the_larger_key_gives_way(paths: tuple[str, str]) -> None:
    """Each has put up its repository before any of them looks."""
    smaller, larger = Begun(paths[0], SMALLER), Begun(paths[1], LARGER)
    both = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        stays, goes = list(threads.map(lambda one: one.open(both.wait), (smaller, larger)))
    assert stays == ""
    assert goes.startswith("detach: process 1 makes the sets s1 in the same repository, by another path")
    assert smaller.place.look().begun
    smaller.end()


@pytest.mark.parametrize("keys", [(SMALLER, LARGER), (LARGER, SMALLER)], ids=["smaller first", "larger first"])
@PATHS
def test_the_one_that_has_begun_before_stays(paths: tuple[str, str], keys: tuple[str, str]) -> None:
    first, second = map(Begun, paths, keys)
    assert first.open() == ""
    assert second.open().startswith("detach: process 1 makes the sets s1 in the same repository")
    assert first.place.look().begun
    assert not second.place.look().begun
    first.end()


@PATHS
def test_one_that_waits_for_the_other_gives_way_when_that_one_begins_after_all(paths: tuple[str, str]) -> None:
    """The other one has looked before there was anything to see."""
    smaller, larger = Begun(paths[0], SMALLER), Begun(paths[1], LARGER)
    put_up, begins = threading.Event(), threading.Event()

    def opened(_uuid: str) -> None:
        put_up.set()
        begins.wait(60)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(Board(larger.place.progress, LARGER, opened).open, REPOSITORY)
        assert put_up.wait(60)
        threading.Timer(0.2, begins.set).start()
        assert smaller.open().startswith("detach: process 1 ")
    larger.end()


def test_nobody_waits_for_ever_for_one_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "YIELDING", 0.1)
    smaller, larger = Begun("/a", SMALLER), Begun("/b", LARGER)

    def goes_on_later() -> None:
        assert smaller.open() == ""

    assert larger.open(goes_on_later).startswith("detach: process 1 ")
    smaller.end()
