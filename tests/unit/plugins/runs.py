# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Build runs of backup_set, and looks at their VMs: over a real repository, and without QEMU."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun, Settings
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import (
    LockedVm,
    VmSession,
    VmTask,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import (
    Observation,
    Plan,
    Policy,
    Space,
    VmPlan,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import HERE, UUID
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import TypeVar

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository, VmRecords

    T = TypeVar("T")

TAG = "12345678"
"""What marks the jobs of the runs' repositories."""
PLANNED = VmPlan("web01", "unix:/web01.qmp", "start", "", UUID)
ROOM = Space(free=1 << 30, reserve=0, promised=0, reservable=True)


@asynccontextmanager
async def begun_run(
    repository: Repository, vms: tuple[VmPlan, ...] = (PLANNED,), policy: Policy | None = None, **settings: Any
) -> AsyncIterator[BackupRun]:
    """Begin the run `run` that makes the set `today` of web01, or of other VMs, on the hypervisor HERE."""
    plan = Plan(repository.path, False, "run", "today", policy or Policy(reserve="0"), ROOM, vms)
    async with ThreadedCalls(Watch(repository.path, writing=True)) as calls:
        called = AsyncRepository(repository, calls)
        called.tag = TAG
        run = BackupRun.of(called, plan, Settings(**settings))
        yield replace(run, context=replace(run.context, hypervisor=HERE))


def in_run(repository: Repository, work: Callable[[BackupRun], Awaitable[T]], **options: Any) -> T:
    """Return what is done in a run of its own."""

    async def begin() -> T:
        async with begun_run(repository, **options) as run:
            return await work(run)

    return asyncio.run(begin())


def looked_at(run: BackupRun, seen: Observation, records: VmRecords, task: VmTask | None = None) -> VmSession:
    """Return a look at a VM without its locks."""
    return VmSession(run, task or VmTask(run.plan.vms[0]), seen, records)


async def locked(run: BackupRun, seen: Observation, fake: FakeMonitor | None, task: VmTask | None = None) -> LockedVm:
    """Return a look at a VM of the repository as it is, as if the VM's locks were held."""
    task = task or VmTask(run.plan.vms[0])
    # The lock is a file there.
    os.makedirs(os.path.dirname(run.repository.set_path(task.name, run.plan.id)), exist_ok=True)
    records = await run.repository.records(task.name)
    return LockedVm(run, task, seen, records, monitor(fake) if fake else None, 0)


def with_jobs(intent: Intent) -> Intent:
    """Return an intent whose jobs have the names that a run gives them."""
    disks = (replace(disk, job=f"vmfleet.{TAG}.{intent.attempt}.{number}") for number, disk in enumerate(intent.disks))
    return replace(intent, disks=tuple(disks))


def put_intent(repository: Repository, intent: Intent) -> list[str]:
    """Put an intent into a repository as it is, and its images with it, each of a few bytes; return their paths."""
    os.makedirs(repository.directory(intent.vm.name), exist_ok=True)
    staging.begin(repository, intent)
    paths = [repository.image_path(intent, disk.image.image) for disk in intent.disks]
    for path in paths:
        Path(path).write_bytes(b"abc")
    return paths
