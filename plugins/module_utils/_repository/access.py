# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find and create repositories, and call one whose file system may begin to hang, without keeping guests waiting.

Each such call is awaited, and may raise RepositoryHangs.
"""

from __future__ import annotations

import contextlib
import os
import uuid as uuids
from typing import TYPE_CHECKING

from .._common.errors import BackupError, why
from .._host.directory import Directory
from .._host.files import claim
from . import staging
from .documents import Marker
from .json_file import write_document
from .names import REPOSITORY_FILE, refuse_inside
from .repository import HARMLESS, Repository, check_owner, open_repository

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any, Concatenate, ParamSpec, TypeVar

    from .._host.worker import ThreadedCalls
    from .documents import Failure, Intent, Manifest
    from .repository import VmRecords

    P = ParamSpec("P")
    T = TypeVar("T")


TEMPORARY = f".{REPOSITORY_FILE}."
"""What the name of a marker begins with until it is written; a probe's file begins like that, too."""


def find_repository(path: str, create: bool, trust_others: bool = False) -> Repository:
    """Open the repository at C(path) for writing. Where C(create) allows to make it later, it has no uuid yet."""
    if create and not os.path.lexists(os.path.join(path, REPOSITORY_FILE)):
        refuse_inside("repository", os.path.dirname(os.path.realpath(path)))
        check_creatable(path)
        repository = Repository(path, "", trust_others)
        if os.path.isdir(path):
            check_owner(repository)
        return repository
    repository = open_repository(path, trust_others)
    check_writable(repository)
    return repository


def check_creatable(path: str) -> None:
    """Refuse to make a repository out of a directory that holds something else."""
    try:
        # Another hypervisor may be making the repository at this moment.
        found = sorted(entry for entry in set(os.listdir(path)) - HARMLESS if not entry.startswith(TEMPORARY))
    except FileNotFoundError:
        return
    except OSError as error:
        raise BackupError(f"repository: {path}: {why(error)}") from error
    if found and REPOSITORY_FILE not in found:
        others = ", ".join(found[:3])
        raise BackupError(
            f"repository: {path} holds {others} and is no repository; name an empty directory, or a new one"
        )


def create_repository(path: str, trust_others: bool = False) -> Repository:
    """Make a repository where there is none yet; the one that is there where somebody was first."""
    check_creatable(path)
    os.makedirs(path, mode=0o700, exist_ok=True)
    with Directory.at(path) as root:
        temporary = TEMPORARY + uuids.uuid4().hex
        # Another process may be faster, and remove ours as below.
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            write_document(root, temporary, Marker(str(uuids.uuid4())))
            claim(root.join(temporary), root.join(REPOSITORY_FILE))
        remove_half_made(path)
        root.sync()
    return open_repository(path, trust_others)


def remove_half_made(path: str) -> None:
    """Remove what processes have left that died while they made the repository, which is there now."""
    with Directory.at(path) as root:
        for name in root.names():
            if name.startswith(TEMPORARY):
                root.remove(name)


def check_writable(repository: Repository) -> None:
    """Raise BackupError where this user cannot write to the repository, or others can."""
    path = repository.path
    if not os.access(path, os.W_OK | os.X_OK):
        reason = "is mounted read-only" if os.statvfs(path).f_flag & os.ST_RDONLY else "is not writable"
        raise BackupError(f"repository: {path} {reason} for user {os.geteuid()}; remount it, or become its owner")
    check_owner(repository)


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

    async def run_long(self, function: Callable[Concatenate[Repository, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do as run() does, beside the other calls, which do not wait for it."""
        return await self.calls.run_long(function, self._repository, *args, **kwargs)

    @contextlib.asynccontextmanager
    async def lock(self, vm: str) -> AsyncIterator[int]:
        async with self._repository.lock(vm, self.calls) as fd:
            yield fd

    async def check_same(self) -> None:
        await self.calls.run(self._repository.check_same)

    async def records(self, vm: str) -> VmRecords:
        return await self.calls.run(self._repository.records, vm)

    async def intents(self, odd: list[str] | None = None) -> tuple[Intent, ...]:
        return await self.calls.run(self._repository.intents, odd)

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

    async def restore_labels(self, intent: Intent) -> None:
        await self.run(staging.restore_labels, intent)

    async def publish(self, intent: Intent) -> Manifest:
        return await self.run(staging.publish, intent)

    async def untidy(self, vm: str, set_id: str) -> bool:
        return await self.run(staging.untidy, vm, set_id)

    async def tidy(self, vm: str, set_id: str) -> None:
        await self.run(staging.tidy, vm, set_id)

    async def record_failure(self, vm: str, failure: Failure) -> None:
        await self.run(staging.record_failure, vm, failure)

    async def discard_images(self, intent: Intent) -> None:
        await self.run(staging.discard_images, intent)

    async def discard(self, intent: Intent) -> None:
        await self.run(staging.discard, intent)
