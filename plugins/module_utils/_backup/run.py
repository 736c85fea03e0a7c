# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what the VMs of a run share."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._host import preallocate
from .._host.process import this_hypervisor
from .._plan.model import RunContext
from .._qemu import block_jobs
from .scheduler import BandwidthLimiter, TimeSlice, VmSlots

if TYPE_CHECKING:
    from typing import Any

    from .._host.files import DirectCalls
    from .._plan.model import Plan
    from .._plan.space import SpaceTracker
    from .._repository.access import AsyncRepository
    from .._repository.documents import Intent
    from .task import Settings


class OpenImages:
    """Images that grow, each opened before its job began: the kernel tells only such an fd of every failed write."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._writebacks: dict[str, preallocate.Writeback] = {}

    def open(self, path: str, direct: bool) -> int:
        """Open an image, and return its inode. C(direct) says that it does not grow in the page cache."""
        self._fds[path] = fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if not direct:
            self._writebacks[path] = preallocate.Writeback(fd)
        return os.fstat(fd).st_ino

    def fd(self, path: str) -> int | None:
        return self._fds.get(path)

    def start_writeback(self, path: str) -> None:
        """Have an image written out while it grows, where it grows in the page cache."""
        writeback = self._writebacks.get(path)
        if writeback:
            writeback.nudge()

    def close(self, path: str, calls: DirectCalls) -> None:
        self._writebacks.pop(path, None)
        fd = self._fds.pop(path, None)
        if fd is not None:
            calls.close(fd)


@dataclass
class Preparation:
    """What those share that prepare their sets, one after the other: each has to see what the others have taken."""

    gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    space: SpaceTracker | None = None
    blanks: dict[Any, Any] = field(default_factory=dict)
    """Empty images of which others are copies."""


@dataclass(frozen=True)
class BackupRun:
    """A run of a plan. C(commands) lists what QEMU was told."""

    repository: AsyncRepository
    plan: Plan
    settings: Settings
    context: RunContext
    slots: VmSlots
    bandwidth: BandwidthLimiter
    slice: TimeSlice
    images: OpenImages = field(default_factory=OpenImages)
    preparation: Preparation = field(default_factory=Preparation)
    emergency: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one VM whose set is stopped for the guest's sake: that may be enough for the others."""
    commands: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, repository: AsyncRepository, plan: Plan, settings: Settings) -> BackupRun:
        """Begin a run. The event loop has to be running."""
        context = RunContext(
            plan.id,
            plan.run,
            repository.tag,
            this_hypervisor(),
            plan.policy,
            takeover=settings.takeover,
            supersede=settings.supersede,
            adopt=settings.adopt,
        )
        return cls(
            repository,
            plan,
            settings,
            context,
            VmSlots(settings.max_vms, (planned.name for planned in plan.vms)),
            BandwidthLimiter(settings.bandwidth, plan.policy.speed),
            TimeSlice(settings.slice),
        )

    @property
    def watched(self) -> bool:
        """Whether somebody will look at the copies while they run."""
        return self.settings.state != "started" or self.settings.unattended

    @property
    def bitmap_prefix(self) -> str:
        """What the names of all bitmaps of the repository begin with."""
        return f"vmfleet-{self.repository.tag}-"

    def is_ours(self, intent: Intent) -> bool:
        return intent.hypervisor.is_same(self.context.hypervisor)

    def fdset_tag(self, attempt: str = "") -> str:
        """Return what the tags of the repository's fdsets begin with, or those of an attempt."""
        return f"{block_jobs.TAG}{self.repository.tag}:" + (f"{attempt}:" if attempt else "")

    def image_paths(self, intent: Intent) -> list[str]:
        """Return where the images of a set grow, in the order of its disks."""
        return [self.repository.image_path(intent, disk.image.image) for disk in intent.disks]

    def close_images(self, intent: Intent) -> None:
        """Close the images of an attempt: those that are unlinked keep their space until then."""
        for path in self.image_paths(intent):
            self.images.close(path, self.repository.calls)
