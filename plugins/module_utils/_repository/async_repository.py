# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Call a repository whose file system may begin to hang, without keeping guests waiting: each call is awaited.

Every call that touches files may raise RepositoryHangs.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from . import removal, staging

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any, Concatenate, ParamSpec, TypeVar

    from .._host.worker import ThreadedCalls
    from .documents import Failure, Intent, Manifest
    from .repository import Repository, VmRecords

    P = ParamSpec("P")

    T = TypeVar("T")


class AsyncRepository:
    """A repository behind ThreadedCalls, which also serve for single files in it."""

    def __init__(self, repository: Repository, calls: ThreadedCalls) -> None:
        self.path = repository.path
        self.uuid = repository.uuid
        self.tag = repository.tag
        self.calls = calls
        self._repository = repository

    def set_path(self, vm: str, set_id: str) -> str:
        return self._repository.set_path(vm, set_id)

    def image_path(self, intent: Intent, image: str) -> str:
        return self._repository.image_path(intent, image)

    async def run(self, function: Callable[Concatenate[Repository, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of the repository, which is its first argument, and return what that returns."""
        return await self.calls.run(function, self._repository, *args, **kwargs)

    @asynccontextmanager
    async def lock(self, vm: str) -> AsyncIterator[int]:
        async with self._repository.lock(vm, self.calls) as fd:
            yield fd

    async def check_same(self) -> None:
        await self.calls.run(self._repository.check_same)

    async def records(self, vm: str) -> VmRecords:
        return await self.calls.run(self._repository.records, vm)

    async def intents(self) -> tuple[Intent, ...]:
        return await self.calls.run(self._repository.intents)

    async def intent(self, vm: str, set_id: str) -> Intent | None:
        return await self.calls.run(self._repository.intent, vm, set_id)

    async def begin(self, intent: Intent) -> None:
        await self.run(staging.begin, intent)

    async def update(self, intent: Intent) -> None:
        await self.run(staging.update, intent)

    async def write_description(self, intent: Intent, description: dict[str, Any]) -> None:
        await self.run(staging.write_description, intent, description)

    async def describe(self, intent: Intent, manifest: Manifest) -> None:
        await self.run(staging.describe, intent, manifest)

    async def publish(self, intent: Intent) -> Manifest:
        return await self.run(staging.publish, intent)

    async def untidy(self, vm: str, set_id: str) -> bool:
        return await self.run(removal.untidy, vm, set_id)

    async def tidy(self, vm: str, set_id: str) -> None:
        await self.run(removal.tidy, vm, set_id)

    async def record_failure(self, vm: str, failure: Failure) -> None:
        await self.run(staging.record_failure, vm, failure)

    async def discard_images(self, intent: Intent) -> None:
        await self.run(staging.discard_images, intent)

    async def discard(self, intent: Intent) -> None:
        await self.run(staging.discard, intent)
