# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images on a share that is slow, and on one that stands still: the first is waited for, however long it takes.

Time passes by what happens: nearly an hour with each thing that qemu-img has done, and an hour where it does nothing.
"""

from __future__ import annotations

import asyncio
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import probe, progress
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_commands, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.filesystems import Mirror, NbdServer
from ansible_collections.vmfleet.backup.tests.harness.hostile import ask
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, Library, before_converting, prepared
from ansible_collections.vmfleet.backup.tests.harness.pruning import assert_whole

pytestmark = pytest.mark.usefixtures("clean")

LOOKS = 20
"""Looks without anything done, after which an hour has passed without it."""


class Clock:
    """Stands for the module `time`, in this process and in its forks: each process that is looked at has its own."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._now: dict[int, float] = {}
        self._last: dict[int, progress.Work] = {}
        self._idle = 0
        self._pid = 0
        self.stands_still = Path("/nowhere")
        """Once this is there, looks without anything done count."""

    def monotonic(self) -> float:
        return self._now.get(self._pid, 0.0)

    def look(self, pid: int) -> progress.Work:
        """Return what a process has done, and let time pass by it."""
        work = work_of(pid)
        self._pid = pid
        if self._last.get(pid) != work:
            self._pass(0.9 * progress.STANDSTILL)
            self._last[pid] = work
            self._idle = 0
        elif self.stands_still.exists():
            self._idle += 1
            if self._idle == LOOKS:
                self._pass(progress.STANDSTILL)
        return work

    def _pass(self, seconds: float) -> None:
        self._now[self._pid] = self.monotonic() + seconds
        self._record.write_text(str(max(self._now.values())))

    @property
    def passed(self) -> float:
        """The time that has passed for the process that has taken longest."""
        return float(self._record.read_text())


work_of = progress.work_of


@pytest.fixture
def clock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(directory / "clock")
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "work_of", clock.look)
    monkeypatch.setattr(qemu_img, "LOOK_INTERVAL", 0.01)
    return clock


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with prepared() as chain:
        yield chain


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("verb", ["verify", "restore", "consolidate"])
def test_what_goes_on_slowly_is_waited_for(
    template: Chain, directory: Path, clock: Clock, where: Path, verb: str
) -> None:
    below = directory / "below"
    below.mkdir()
    chain = template.copied(below)
    with Mirror(directory / "share", below, "--read-rate=2M") as share:
        library = Library(share.path / "repository")
        # The checksums are not what is slow here.
        if verb == "verify":
            result = ask("backup_verify", {"repository": str(library.path), "names": [NAME], "depth": "image"})
            assert not result["rc"], result
        elif verb == "restore":
            library.restore(directory=str(where), checksum=False)
            chain.assert_restored("s3", {disk: where / f"{disk}.qcow2" for disk in ("drive0", "drive1")})
        else:
            library.prune(keep_last=1, consolidate=True)
    assert clock.passed > 5 * progress.STANDSTILL
    if verb == "consolidate":
        assert_whole(chain, chain.library, "s3")


@pytest.mark.usefixtures("storage")
def test_a_target_that_stands_still_is_given_up(
    chain: Chain, directory: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "below").mkdir()
    clock.stands_still = directory / "stopped"
    monkeypatch.setattr(probe, "TIMEOUT", 2.0)
    with Mirror(directory / "share", directory / "below") as share:
        before_converting(directory, monkeypatch, f"kill -STOP {share.pid}; touch {clock.stands_still}")
        target = share.path / "disk"
        message = chain.library.fail_restore(disks=[{"name": "drive0", "target": str(target)}], checksum=False)
        assert f"{target}.partial: it has done nothing for 3600 s; does its file system hang?; and then: " in message
        assert f"{target}.partial is left there: its file system does not answer" in message
        share.go_on()
        monkeypatch.undo()
        chain.library.restore(disks=[{"name": "drive0", "target": str(target)}])
        chain.assert_restored("s3", {"drive0": target})


def test_a_source_that_stands_still_is_given_up(directory: Path, clock: Clock) -> None:
    """By NBD, whose bytes the kernel does not count: what has come is written to a file."""
    image = patterned(directory / "image.qcow2", size=8 * MIB)
    target = directory / "copy"
    clock.stands_still = directory / "stopped"
    with NbdServer(directory / "nbd", image, "qcow2") as server:
        command = image_commands.convert_command(server.url, str(target), "raw")
        asyncio.run(qemu_img.run_long(command))
        assert identical(image, target, other_format="raw")
        server.stop()
        clock.stands_still.touch()
        with pytest.raises(ToolError, match="it has done nothing for 3600 s; does its file system hang"):
            asyncio.run(qemu_img.run_long(command))
