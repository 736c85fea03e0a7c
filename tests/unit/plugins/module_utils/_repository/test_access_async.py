# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository that is called through a thread does what one does that is called at once, until it hangs."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, RepositoryHangs
from ansible_collections.vmfleet.backup.plugins.module_utils._host import worker
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository
from ansible_collections.vmfleet.backup.tests.unit.plugins.module_utils._repository.attempts import (
    FAILURE,
    begin,
    intent,
    manifest,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def work_on(repository: Repository, work: Callable[[AsyncRepository], Awaitable[None]]) -> None:
    """Run a coroutine with a repository that is called through a thread."""

    async def run() -> None:
        async with ThreadedCalls(Watch(repository.path)) as calls:
            await work(AsyncRepository(repository, calls))

    asyncio.run(run())


def test_it_is_known_by_what_the_repository_is_known_by(repository: Repository) -> None:
    async def look(there: AsyncRepository) -> None:
        assert (there.path, there.uuid, there.tag) == (repository.path, repository.uuid, repository.tag)
        assert there.set_path("web01", "s1") == repository.set_path("web01", "s1")
        assert there.image_path(intent(), "vda.qcow2") == repository.image_path(intent(), "vda.qcow2")

    work_on(repository, look)


def test_a_set_from_its_beginning_to_its_end(repository: Repository) -> None:
    async def make(there: AsyncRepository) -> None:
        await there.check_same()
        async with there.lock("web01"):
            await there.begin(intent())
            await there.write_description(intent(), {"machine": "q35"})
            (disk,) = intent().disks
            with open(there.image_path(intent(), disk.image.image), "wb") as image:
                image.write(b"abc")
            copying = intent(phase="copying")
            await there.update(copying)
            assert await there.intents() == (copying,)
            assert await there.intent("web01", "s1") == copying
            await there.describe(copying, manifest(copying))
            published = await there.publish(copying)
            assert (await there.records("web01")).sets == (published,)
            assert await there.untidy("web01", "s1")
            await there.tidy("web01", "s1")
            assert not await there.untidy("web01", "s1")

    work_on(repository, make)
    assert sorted(os.listdir(repository.set_path("web01", "s1"))) == ["manifest.json", "vda.qcow2", "vm.json"]


def test_an_attempt_that_is_taken_back(repository: Repository) -> None:
    async def take_back(there: AsyncRepository) -> None:
        begin(repository, intent())
        await there.record_failure("web01", FAILURE)
        await there.discard_images(intent())
        assert os.listdir(repository.staging_path("web01", "s1")) == ["intent.json"]
        await there.discard(intent())
        assert (await there.records("web01")).intents == ()

    work_on(repository, take_back)
    assert os.listdir(repository.directory("web01")) == [".s1.failed.json"]


def test_files_are_touched_in_the_thread(repository: Repository) -> None:
    async def ask(there: AsyncRepository) -> None:
        found, thread = await there.run(lambda called, more: ((called, more), threading.get_ident()), "more")
        assert found == (repository, "more")
        assert thread != threading.get_ident()

    work_on(repository, ask)


def test_the_lock_keeps_others_out(repository: Repository) -> None:
    async def hold(there: AsyncRepository) -> None:
        async with there.lock("web01"):
            waiting = asyncio.ensure_future(repository.lock("web01").__aenter__())
            await asyncio.sleep(0.1)
            assert not waiting.done()
        await waiting

    work_on(repository, hold)


def test_errors_are_those_of_the_repository(repository: Repository) -> None:
    async def fail(there: AsyncRepository) -> None:
        await there.begin(intent())
        with pytest.raises(FileExistsError):
            await there.begin(intent(attempt="a2"))
        os.mkdir(repository.set_path("web01", "s1"))
        with pytest.raises(BackupError, match="move it away"):
            await there.publish(intent())

    work_on(repository, fail)


class HangingWatch(Watch):
    """Watches over a file system that answers no more."""

    async def ask(self) -> str:
        self.hangs = True
        return "it hangs"


def test_whoever_waits_for_one_that_hangs_is_told(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MOMENT", 0.01)
    source, sink = os.pipe()

    async def hang() -> None:
        calls = ThreadedCalls(HangingWatch(repository.path))
        there = AsyncRepository(repository, calls)
        with pytest.raises(RepositoryHangs, match="it hangs"):
            await there.run(lambda _repository: os.read(source, 1))
        waiting: list[Any] = [there.begin(intent()), there.records("web01"), there.tidy("web01", "s1")]
        for call in waiting:
            with pytest.raises(RepositoryHangs, match="it hangs"):
                await call

    asyncio.run(hang())
    os.close(sink)
    assert os.listdir(repository.directory("web01")) == []
