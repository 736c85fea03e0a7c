# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what the VMs of a run share: slots to copy in, the bandwidth, the time of a call, the images that grow."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._host import preallocate
from .._host.process import this_machine
from .._plan.model import RunContext
from .._qemu import block_jobs
from .._repository.documents import Hypervisor
from .board import Board

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from .._host.files import DirectCalls
    from .._plan.model import Plan
    from .._plan.observe import SpaceTracker
    from .._qemu.model import Vm
    from .._repository.access import AsyncRepository
    from .._repository.documents import Intent


@dataclass(frozen=True)
class Settings:
    """How a run goes. Times are seconds; 0 waits without end. The last three are those of RunContext.

    C(bandwidth) is bytes/s for all jobs together, 0 for no limit; C(slice) is when to come back, done or not. Without
    C(begin), what is being made is gone on with, and nothing else. C(offline_timeout) is how long a VM that is off can
    be kept from starting.
    """

    state: str = "completed"
    max_vms: int = 4
    bandwidth: int = 0
    slice: float = 0
    timeout: float = 0
    offline_timeout: float = 0
    stall_timeout: float = 600
    unattended: bool = False
    begin: bool = True
    check_mode: bool = False
    takeover: bool = False
    supersede: bool = False
    adopt: bool = False

    def time_for(self, vm: Vm) -> float:
        """Return the seconds in which the set of a VM has to be copied; 0 for no limit."""
        limits = [self.timeout, self.offline_timeout if vm.is_off else 0]
        return min(filter(None, limits), default=0.0)


class VmSlots:
    """At most C(limit) VMs copy at a time, 0 for any number. One that is found copying counts, however many there are.

    Nobody is called before every one of C(expected) has arrived: only then is it known who comes first. One that does
    not answer holds the others up for GRACE seconds.
    """

    GRACE = 5.0

    def __init__(self, limit: int, expected: Iterable[str]) -> None:
        self._expected = set(expected)
        # Where there is a slot for everybody, nobody has to wait to learn who comes first.
        self.limit = limit if limit < len(self._expected) else 0
        self.taken: set[str] = set()
        self._waiting: dict[str, tuple[Any, asyncio.Future[None]]] = {}
        self._complete = asyncio.Event()
        self._begin = time.monotonic() + self.GRACE

    def join(self, name: str) -> None:
        """Count a VM that copies already."""
        self.taken.add(name)

    def has(self, name: str) -> bool:
        """Tell whether a VM may copy."""
        return not self.limit or name in self.taken

    def arrive(self, name: str) -> None:
        """Note that nobody has to wait any more to learn whether this VM comes first."""
        self._expected.discard(name)
        if not self._expected:
            self._complete.set()

    async def take(self, name: str, order: Any, until: asyncio.Event | None = None) -> bool:
        """Wait for a slot; of those that wait, the one with the least C(order) is called first.

        False where C(until) comes before it; without C(until), where all slots are taken.
        """
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[name] = (order, called)
        self.arrive(name)
        try:
            await first_of(self._complete, timeout=max(0.0, self._begin - time.monotonic()))
            self._call()
            if until:
                await first_of(until, called)
            return called.done()
        finally:
            self._waiting.pop(name, None)

    def leave(self, name: str) -> None:
        """Note that a VM copies no more."""
        self.taken.discard(name)
        self.arrive(name)
        self._call()

    def _call(self) -> None:
        if not self._complete.is_set() and time.monotonic() < self._begin:
            return
        for name, (_order, called) in sorted(self._waiting.items(), key=lambda entry: entry[1][0]):
            if len(self.taken) >= self.limit:
                return
            self.taken.add(name)
            del self._waiting[name]
            called.set_result(None)


class BandwidthLimiter:
    """Shares out C(total) bytes/s among all running jobs, none of which gets more than C(ceiling); 0 for no limit.

    Shares get smaller before another job starts: whoever wants to start one waits until the others have come down, but
    not longer than PATIENCE seconds for one that does not answer.
    """

    PATIENCE = 5.0

    def __init__(self, total: int, ceiling: int) -> None:
        self.total = total
        self.ceiling = ceiling
        self._jobs: dict[str, int] = {}
        self._granted: dict[str, int] = {}
        self._changed = asyncio.Event()

    @property
    def share(self) -> int:
        """Bytes/s for each job."""
        if not self.total:
            return self.ceiling
        share = max(1, self.total // max(1, sum(self._jobs.values())))
        return min(share, self.ceiling) if self.ceiling else share

    def count(self, name: str, jobs: int) -> int:
        """Note that so many jobs of a VM run now; return what each of them is to get."""
        if self._jobs.get(name, 0) != jobs:
            self._jobs[name] = jobs
            self._change()
        return self.share

    def confirm(self, name: str, share: int) -> None:
        """Note that each job of a VM gets that much now."""
        if self._granted.get(name) != share:
            self._granted[name] = share
            self._change()

    async def reserve_share(self, name: str, jobs: int) -> int:
        """Return what each of the jobs gets that are about to start, once the others have come down that far."""
        self.confirm(name, 0)
        self.count(name, jobs)
        deadline = time.monotonic() + self.PATIENCE
        while self.total and time.monotonic() < deadline and self._too_fast():
            await self.pause(deadline - time.monotonic())
        self.confirm(name, self.share)
        return self.share

    def _too_fast(self) -> bool:
        # Of one that was never asked nobody knows how fast it is.
        return any(self._granted.get(name, self.share + 1) > self.share for name, jobs in self._jobs.items() if jobs)

    async def pause(self, seconds: float) -> None:
        """Wait, but only until a share may be another one."""
        await first_of(self._changed, timeout=seconds)

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class TimeSlice:
    """The time after which a call comes back, though not everything is done; 0 for no end.

    It is over when the time has passed and nobody is in the middle of something. Once over, it stays so.
    """

    def __init__(self, seconds: float) -> None:
        self.over = asyncio.Event()
        self._end = time.monotonic() + seconds if seconds else None
        self._busy = 0
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self._look)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Do something that is not to be interrupted."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            # Whoever goes on with the next thing at once is still in the middle of something.
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        if self._end is not None and not self._busy and time.monotonic() >= self._end:
            self.over.set()


async def first_of(*ends: asyncio.Event | asyncio.Future[None], timeout: float | None = None) -> None:
    """Wait for one of these, or until the time is over."""
    waits = {asyncio.ensure_future(end.wait() if isinstance(end, asyncio.Event) else end) for end in ends}
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in waits.difference(ends):
            end.cancel()


class OpenImages:
    """Images that grow, each opened before its job began: the kernel tells only such an fd of every failed write."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._writebacks: dict[str, preallocate.Writeback] = {}

    def keep(self, path: str, fd: int, direct: bool) -> int:
        """Keep an image open, and return its inode. C(direct) says that it does not grow in the page cache."""
        self._fds[path] = fd
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
    board: Board = field(default_factory=Board)

    @classmethod
    def of(cls, repository: AsyncRepository, plan: Plan, settings: Settings, board: Board | None = None) -> BackupRun:
        """Begin a run. The event loop has to be running."""
        context = RunContext(
            plan.id,
            plan.run,
            repository.tag,
            Hypervisor(*this_machine()),
            plan.policy,
            # A set is removed only to make way for one that is begun.
            takeover=settings.takeover and settings.begin,
            supersede=settings.supersede and settings.begin,
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
            board=board or Board(),
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
