# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the engine knows without QEMU: turns, checksums, and what it says in the end."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
import yaml

from ansible_collections.vmfleet.backup.plugins.module_utils import _engine
from ansible_collections.vmfleet.backup.plugins.module_utils._documents import COLLECTION_VERSION, DiskImage, Growing
from ansible_collections.vmfleet.backup.plugins.module_utils._engine import Outcome, describe, summarize
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import BackupError

IMAGE = DiskImage("vda", "n0", "", "/src", "qcow2", 1, "full", "", None, "vda.qcow2", "qcow2", "none")
OUTCOMES = [
    Outcome("web01", "s1", "failed", error="target full", changed=True),
    Outcome("db01", "s1", "published", bytes=3 << 20, duration=1.25, path="/srv/db01/s1", changed=True),
    Outcome("mail01", "s1", "published", bytes=5 << 20, duration=2.0, path="/srv/mail01/s1"),
    Outcome("old", "s1", "skipped", reason="migrating (inmigrate)"),
]


def test_the_version_in_manifests_is_that_of_the_collection() -> None:
    galaxy = yaml.safe_load((Path(__file__).parents[4] / "galaxy.yml").read_text(encoding="utf-8"))
    assert galaxy["version"] == COLLECTION_VERSION


def test_results_read_well_and_end_with_what_went_wrong() -> None:
    assert describe(OUTCOMES) == [
        "published  db01    full, 3.0 MiB in 1.2 s, /srv/db01/s1",
        "published  mail01  full, 5.0 MiB in 2.0 s, /srv/mail01/s1 (was there)",
        "skipped    old     migrating (inmigrate)",
        "failed     web01   target full",
    ]


def test_summary() -> None:
    summary = summarize(OUTCOMES)
    assert (summary["published"], summary["failed"], summary["skipped"], summary["running"]) == (2, 1, 1, 0)
    assert (summary["changed"], summary["bytes"]) == (2, 3 << 20)


def test_turns_are_limited_but_what_copies_already_always_counts() -> None:
    async def run() -> None:
        turns = _engine._Turns(2)
        turns.join("a")
        turns.join("b")
        turns.join("c")
        assert turns.try_take("a")
        assert not turns.try_take("d")
        waiting = asyncio.ensure_future(turns.take("d"))
        await turns.leave("c")
        await asyncio.sleep(0)
        assert not waiting.done()
        await turns.leave("b")
        await asyncio.wait_for(waiting, 1)
        assert turns.taken == {"a", "d"}

    asyncio.run(run())


def test_no_limit() -> None:
    async def run() -> None:
        turns = _engine._Turns(0)
        assert all(turns.try_take(str(number)) for number in range(100))

    asyncio.run(run())


def test_a_finished_image_is_flushed_and_summed(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"abc" * 1000)
    disk = Growing(IMAGE, "job0", 1, os.stat(path).st_ino)
    done = _engine._finish_image(str(path), disk, checksum=True)
    assert (done.bytes, done.sha256) == (3000, hashlib.sha256(b"abc" * 1000).hexdigest())
    assert _engine._finish_image(str(path), disk, checksum=False).sha256 is None


def test_an_image_that_was_replaced_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    path.write_bytes(b"abc")
    with pytest.raises(BackupError, match="not the file"):
        _engine._finish_image(str(path), Growing(IMAGE, "job0", 1, os.stat(path).st_ino + 1), checksum=True)
