# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is read of a worker that an older version has begun, and that runs on after an upgrade."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import worker_end, worker_place
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import WorkerPlace
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import begin, intent

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

KEY = "0123456789abcdef"
SAID = {
    "pid": 1,
    "start": 2,
    "space": "3",
    "key": KEY,
    "id": "s1",
    "since": "2026-11-30T01:00:05Z",
    "vms": ["web01"],
    "wanted": ["digest"],
}
"""What a worker of an older version says of itself: nothing of its run."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerPlace:
    monkeypatch.setattr(worker_place, "lock_directory", lambda: str(tmp_path))
    return WorkerPlace.of("/backup")


def begun(place: WorkerPlace) -> int:
    """Begin a worker of the older version; return the file descriptor of its lock."""
    fd = place.take()
    assert fd is not None
    os.pwrite(fd, json.dumps(SAID).encode(), 0)
    state = {"name": "web01", "id": "s1", "state": "running"}
    Path(place.progress).write_text(json.dumps({"key": KEY, "known": True, "vms": [state]}), encoding="utf-8")
    return fd


def test_one_of_an_older_version_is_followed_and_found_by_a_cancellation(place: WorkerPlace) -> None:
    fd = begun(place)
    found = place.follow(KEY, 0)
    assert found.who
    assert (found.running, found.known, found.who.key, found.who.run) == (True, True, KEY, "")
    worker = asyncio.run(worker_end.find("/backup"))
    assert worker
    assert worker.who == found.who
    os.close(fd)


def test_what_one_of_an_older_version_has_printed_is_told_of_nobody(place: WorkerPlace) -> None:
    """It does not say who has printed it. The next worker finds the sets published."""
    fd = begun(place)
    Path(place.result).write_text('{"changed": true, "vms": [], "headline": "1 of 1"}\n', encoding="utf-8")
    os.close(fd)
    found = place.follow(KEY, 60)
    assert (found.running, found.result) == (False, "")


def test_one_of_an_older_version_may_begin_any_set_that_is_not_published(
    place: WorkerPlace, repository: Repository
) -> None:
    fd = begun(place)
    worker = asyncio.run(worker_end.find("/backup"))
    assert worker
    begin(repository, intent("s1"))
    assert worker_end.begins(worker, "web01", repository.records("web01"))
    os.close(fd)


def test_one_that_says_too_little_is_about_to_begin(place: WorkerPlace) -> None:
    fd = place.take()
    assert fd is not None
    os.pwrite(fd, json.dumps(SAID).encode()[:40], 0)
    assert (place.who(), place.look().running) == (None, True)
    os.close(fd)
