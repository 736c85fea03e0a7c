# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One attempt at one VM's set: drafted, prepared, launched, finished. Whether to try at all is the engine's business.

Before each step that QEMU sees, the intent says what is going to happen, so that whoever comes after a crash can undo
it: the names of the jobs and bitmaps, the images, the freeze.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import AgentError, BackupError, after
from .._common.formats import boottime, utc_now
from .._common.words import Word
from .._host import preallocate
from .._host.checksum import sha256
from .._host.namespaces import spaces
from .._plan.levels import written_elsewhere
from .._plan.model import Quiesce
from .._plan.space import SpaceTracker, measure, no_room
from .._qemu import block_jobs, guest_freeze, target_image
from .._qemu.bitmaps import bitmap_add, bitmap_merge
from .._qemu.guest_agent import find_agent
from .._qemu.query import query_jobs
from .._qemu.vm_config import describe_vm
from .._repository.documents import DiskImage, Intent, Manifest, Phase, StagedDisk, VmName

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .._host.machine import Hypervisor
    from .._plan.levels import ChainLink
    from .._plan.model import Decision, DiskPlan, Plan, Policy, Request
    from .._qemu.model import Disk, Vm
    from .._qemu.monitor import Monitor
    from .._repository.async_repository import AsyncRepository


class Consistency(Word):
    """What a set holds of the guest: what a power failure leaves, or file systems at rest."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"


NOT_ASKED = "freezing the guest was not asked for when the set was made"


@dataclass(frozen=True)
class AttemptDraft:
    """An attempt before anything of it exists. C(description) is what vm.json will say."""

    intent: Intent
    disks: tuple[Disk, ...]
    links: tuple[ChainLink, ...]
    description: dict[str, Any]


@dataclass
class Maker:
    """Makes attempts for one run. C(timeout) is seconds, 0 for none; C(watched) says that somebody will look on."""

    repository: AsyncRepository
    plan: Plan
    hypervisor: Hypervisor
    timeout: float
    watched: bool
    held: dict[str, int] = field(default_factory=dict)
    """Images that grow, opened before their jobs began: the kernel tells only such an fd of every failed write."""

    def __post_init__(self) -> None:
        self._calls = self.repository.calls
        self._room: SpaceTracker | None = None
        self._writebacks: dict[str, preallocate.Writeback] = {}
        self._made: dict[Any, Any] = {}
        self._gate = asyncio.Lock()

    # Draft

    async def draft(self, monitor: Monitor, request: Request, vm: Vm, decision: Decision) -> AttemptDraft:
        """Decide on every name. Raises BackupError where the guest must be frozen and cannot be."""
        agent, reason = await self._agent(monitor, request, vm)
        attempt = secrets.token_hex(6)
        begun = boottime()
        policy = self.plan.policy
        disks = tuple(
            StagedDisk(
                image=self._image(vm, disk, planned, link),
                job=f"vmfleet.{self.repository.tag}.{attempt}.{number}",
                expected=0,
            )
            for number, (disk, planned, link) in enumerate(
                zip(decision.choice.disks, decision.plan.disks, decision.links)
            )
        )
        intent = Intent(
            run=self.plan.run,
            attempt=attempt,
            id=self.plan.id,
            vm=VmName(request.name, vm.identity, vm.uuid),
            hypervisor=self.hypervisor,
            monitor=request.monitor,
            process=(vm.process.pid, vm.process.start) if vm.process else (),
            level=decision.plan.level,
            consistency=Consistency.CRASH,
            # Until it is known better.
            consistency_reason=reason or "the process was killed before it had seen its jobs start in a frozen guest",
            qemu=vm.version,
            guest=vm.status,
            started=utc_now(),
            begun=begun,
            deadline=begun + self.timeout if self.timeout else None,
            checksum=policy.checksum,
            disks=disks,
            agent=agent,
            spaces=spaces(),
        )
        return AttemptDraft(intent, decision.choice.disks, decision.links, await describe_vm(monitor, vm))

    async def _agent(self, monitor: Monitor, request: Request, vm: Vm) -> tuple[str, str]:
        """The socket of an agent that can freeze, or why the set will be crash-consistent only."""
        if request.quiesce == Quiesce.NONE:
            return "", NOT_ASKED
        try:
            return await self._find_agent(monitor, request, vm), ""
        except AgentError as error:
            if request.quiesce == Quiesce.REQUIRE:
                raise BackupError(f"VM {request.name}: quiesce: {error}") from error
            return "", str(error)

    async def _find_agent(self, monitor: Monitor, request: Request, vm: Vm) -> str:
        if vm.status != "running":
            raise AgentError(f"the VM does not run ({vm.status}), and so its guest agent does not either")
        socket = request.agent
        if not socket:
            found = await find_agent(monitor)
            if not found or not found["socket"]:
                raise AgentError("the VM has no channel for a guest agent (org.qemu.guest_agent.0); add one")
            if not found["connected"]:
                raise AgentError("no agent has opened its channel; install and start qemu-guest-agent in the guest")
            socket = found["socket"]
        await guest_freeze.check(socket)
        return socket

    def _image(self, vm: Vm, disk: Disk, planned: DiskPlan, link: ChainLink) -> DiskImage:
        policy = self.plan.policy
        tracked = policy.tracking and disk.stable_name and not disk.read_only
        # A record with gaps would look whole as soon as the other disk has gone.
        tracked = tracked and not written_elsewhere(disk, vm.disks)
        return DiskImage(
            name=disk.name,
            node=disk.node,
            qdev=disk.qdev,
            source=disk.filename,
            source_format=disk.driver,
            virtual_size=disk.virtual_size,
            level=link.level,
            reason=link.reason,
            parent=link.parent,
            image=planned.target,
            format="qcow2",
            compression=policy.compression,
            bitmap=f"{bitmap_prefix(self.repository)}{secrets.token_hex(8)}" if tracked else None,
            layers=tuple(layer.filename for layer in vm.chain(disk)[1:]),
            source_encrypted=disk.encrypted,
        )

    # Prepare

    async def prepare(self, draft: AttemptDraft, planned: Iterable[DiskPlan], lock: int) -> Intent:
        """Claim the id, make the images, and take the space that they may need."""
        # One VM after the other: each must see what those before it have taken.
        async with self._gate:
            intent = draft.intent
            expected = await measure(draft.disks, draft.links, planned)
            if self._room is None:
                self._room = await self.repository.run(SpaceTracker, self.plan.policy)
            space = await self._calls.run(self._room.space, intent.vm.name)
            if sum(expected.values()) > max(space.usable, 0):
                raise BackupError(no_room(sum(expected.values()), space, space.usable))
            disks = tuple(replace(disk, expected=expected[disk.image.name]) for disk in intent.disks)
            intent = replace(intent, disks=disks)
            try:
                await self.repository.begin(intent)
            except FileExistsError:
                raise BackupError(f"VM {intent.vm.name}: somebody else has begun set {intent.id}") from None
            self._room.note(intent)
            await self.repository.write_description(intent, draft.description)
            intent = await self._make_images(intent, draft.links, lock)
            await self.repository.update(intent)
        return intent

    async def _make_images(self, intent: Intent, links: Sequence[ChainLink], lock: int) -> Intent:
        grown = []
        reserved = True
        for disk, link in zip(intent.disks, links):
            target = self._target(intent, disk)
            await target_image.create(target, link.backing, (lock,), self._made, self._calls)
            inode, is_reserved = await self._calls.run(self._hold, target)
            reserved = is_reserved and reserved
            grown.append(replace(disk, inode=inode))
        if not reserved and not self.watched:
            raise BackupError(
                f"{self.repository.path} cannot reserve space: when it fills up while nobody looks, the guest's writes"
                " fail; use state: completed, or unattended: true"
            )
        return replace(intent, disks=tuple(grown), reserved=reserved)

    def _hold(self, target: target_image.Target) -> tuple[int, bool]:
        """Open an image and take its space; returns its inode, and whether its space could be reserved."""
        self.held[target.path] = held = os.open(target.path, os.O_RDWR | os.O_CLOEXEC)
        if not target.direct:
            self._writebacks[target.path] = preallocate.Writeback(held)
        return os.fstat(held).st_ino, target_image.reserve(target)

    def _target(self, intent: Intent, disk: StagedDisk) -> target_image.Target:
        return target_image.Target(
            path=self.repository.image_path(intent, disk.image.image),
            format=disk.image.format,
            size=disk.image.virtual_size,
            expected=disk.expected,
            compress=disk.image.compression != "none",
            compression_type=disk.image.compression,
        )

    # Launch

    async def launch(self, monitor: Monitor, draft: AttemptDraft, intent: Intent, quiesce: str, speed: int) -> Intent:
        """Start all jobs at one point in time, with the guest's file systems frozen where its agent can do that.

        C(speed) is bytes/s for each job, 0 for no limit.
        """
        starts = [
            block_jobs.BackupStart(
                job_id=disk.job,
                node=disk.image.node,
                target=self._target(intent, disk),
                opaque=f"vmfleet:{self.repository.tag}:{intent.attempt}:{number}",
                arguments=_arguments(self.plan.policy, link, _record(disk.image, link), speed),
                calls=self._calls,
            )
            for number, (disk, link) in enumerate(zip(intent.disks, draft.links))
        ]
        bitmaps = [
            action
            for disk, growing, link in zip(draft.disks, intent.disks, draft.links)
            for action in _bitmap_actions(disk, growing.image, link)
        ]
        if intent.agent:
            intent = await self._start_frozen(monitor, intent, starts, bitmaps, quiesce)
        else:
            await block_jobs.start_backups(monitor, starts, "individual", bitmaps)
        intent = replace(intent, phase=Phase.COPYING)
        await self.repository.update(intent)
        return await self._top_up(monitor, draft, intent)

    async def _start_frozen(
        self,
        monitor: Monitor,
        intent: Intent,
        starts: Sequence[block_jobs.BackupStart],
        bitmaps: Sequence[dict[str, Any]],
        quiesce: str,
    ) -> Intent:
        # What QEMU would refuse, it is to refuse before the guest is touched.
        way = await block_jobs.rehearse_backups(monitor, starts, bitmaps)
        await self.repository.update(replace(intent, frozen=True))
        freezer = guest_freeze.Freezer(intent.agent)
        reason = ""
        try:
            try:
                if way is None:
                    raise AgentError("the VM has stopped, and its guest agent with it")
                await block_jobs.start_backups(monitor, starts, "individual", bitmaps, freezer, way)
                if not freezer.held:
                    reason = freezer.thaw_error or "the guest was thawed by others before all jobs had started"
            except AgentError as error:
                reason = str(error)
                if quiesce == Quiesce.TRY:
                    await block_jobs.start_backups(monitor, starts, "individual", bitmaps)
            if reason and quiesce == Quiesce.REQUIRE:
                raise BackupError(f"VM {intent.vm.name}: quiesce: {reason}")
        except (BackupError, OSError) as error:
            # Whoever undoes this is not to thaw what was seen thawed, or what others have frozen.
            with after(error):
                await self.repository.update(replace(intent, frozen=bool(freezer.thaw_error)))
            raise
        return replace(
            intent,
            frozen=bool(freezer.thaw_error),
            frozen_ms=freezer.frozen_ms,
            consistency=Consistency.CRASH if reason else Consistency.FILESYSTEM,
            consistency_reason=reason,
        )

    async def _top_up(self, monitor: Monitor, draft: AttemptDraft, intent: Intent) -> Intent:
        """Reserve what an increment takes beyond its estimate: the guest has written since that was made."""
        if not intent.reserved or not any(link.bitmap for link in draft.links):
            return intent
        lengths = {job.id: job.len for job in await query_jobs(monitor)}
        for link, growing in zip(draft.links, intent.disks):
            more = lengths.get(growing.job, 0) - sum(bitmap.count for bitmap in link.records)
            if link.bitmap and more > 0:
                path = self.repository.image_path(intent, growing.image.image)
                try:
                    await self._calls.run(preallocate.top_up, path, growing.expected + more + more // 8)
                except BackupError:
                    # Without it, this set has to be watched like one on a file system that cannot reserve.
                    intent = replace(intent, reserved=False)
                    await self.repository.update(intent)
        return intent

    # Finish

    def nudge(self, intent: Intent) -> None:
        """Have images written out while they grow, where they grow in the page cache."""
        for disk in intent.disks:
            writeback = self._writebacks.get(self.repository.image_path(intent, disk.image.image))
            if writeback:
                writeback.nudge()

    async def finish(self, intent: Intent) -> tuple[DiskImage, ...]:
        """Bring the images onto stable storage, and describe them. Takes long; BackupError, OSError where it fails."""
        paths = [self.repository.image_path(intent, disk.image.image) for disk in intent.disks]
        finishing = (
            self._calls.run_long(finish_image, path, disk, intent.checksum, self.held.get(path))
            for path, disk in zip(paths, intent.disks)
        )
        return tuple(await asyncio.gather(*finishing))

    def release(self, intent: Intent) -> None:
        """Close the images of an attempt: those that are unlinked keep their space until then."""
        for disk in intent.disks:
            path = self.repository.image_path(intent, disk.image.image)
            self._writebacks.pop(path, None)
            held = self.held.pop(path, None)
            if held is not None:
                self._calls.close(held)

    def manifest(self, intent: Intent, images: tuple[DiskImage, ...]) -> Manifest:
        """What is said of the set. Its sequence number is given where it is written."""
        return Manifest(
            repository=self.repository.uuid,
            vm=intent.vm,
            id=intent.id,
            sequence=0,
            level=intent.level,
            run=intent.run,
            attempt=intent.attempt,
            started=intent.started,
            finished=utc_now(),
            duration=round(boottime() - intent.begun, 3),
            consistency=intent.consistency,
            consistency_reason=intent.consistency_reason,
            frozen_ms=intent.frozen_ms,
            qemu=intent.qemu,
            disks=images,
            hypervisor=intent.hypervisor,
            monitor=intent.monitor,
        )


def finish_image(path: str, disk: StagedDisk, checksum: bool, held: int | None = None) -> DiskImage:
    """Bring one image onto stable storage. C(held) is an fd of it from before its job, where there is one."""
    if os.stat(path).st_ino != disk.inode:
        raise BackupError(f"disk {disk.image.name}: {path} is not the file that the backup was started with")
    status = preallocate.flush(path, held)
    # Without such an fd, only the disk itself can tell that everything has arrived.
    digest = sha256(path) if checksum or held is None else None
    return replace(disk.image, bytes=status.st_size, sha256=digest if checksum else None)


def bitmap_prefix(repository: AsyncRepository) -> str:
    """What the names of all bitmaps of a repository begin with."""
    return f"vmfleet-{repository.tag}-"


def _record(image: DiskImage, link: ChainLink) -> str:
    """Return the name of the bitmap that an increment is made from; empty where it is none."""
    return image.merged if link.below else link.bitmap


def _bitmap_actions(disk: Disk, image: DiskImage, link: ChainLink) -> list[dict[str, Any]]:
    """Return what a set's transaction does to the bitmaps of a disk before the copy begins."""
    actions = [bitmap_add(disk.node, image.bitmap, disk.keeps_bitmaps)] if image.bitmap else []
    if link.below:
        merged = _record(image, link)
        actions += [
            bitmap_add(disk.node, merged, persistent=False),
            bitmap_merge(disk.node, merged, link.bitmap, link.below),
        ]
    return actions


def _arguments(policy: Policy, link: ChainLink, bitmap: str, speed: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"sync": "full"}
    if link.bitmap:
        # Never cleared: what goes wrong later can take no change away.
        arguments = {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "never"}
    if speed:
        arguments["speed"] = speed
    if policy.compression != "none":
        arguments["compress"] = True
    return arguments
