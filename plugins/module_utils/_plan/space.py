# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure the space that sets will take, and share out what is there."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible.module_utils.common.text.formatters import human_to_bytes

from .._common.errors import Refused
from .._common.formats import human
from .._host import preallocate
from .._host.files import scratch
from .._qemu import estimate, qemu_img
from .._repository.documents import Level
from .._repository.names import REPOSITORY_FILE
from .._repository.staging import outstanding
from .model import Action, Space

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .._qemu.model import Disk, Vm
    from .._repository.documents import Intent
    from .._repository.repository import Repository
    from .disks import ChainLink
    from .model import DiskPlan, Policy, VmPlan


def fit_into(space: Space, plans: Iterable[VmPlan]) -> tuple[Space, tuple[VmPlan, ...]]:
    """Let each VM in turn take its part of the space; one for which there is not enough fails, and the others go on."""
    left = space.usable
    needed = 0
    result = []
    for plan in plans:
        if plan.bytes > max(left, 0):
            result.append(replace(plan, action=Action.FAIL, reason=no_room(plan.bytes, space, left)))
            continue
        left -= plan.bytes
        needed += plan.bytes
        result.append(plan)
    return replace(space, needed=needed), tuple(result)


def reserve_bytes(reserve: str, total: int) -> int:
    """Return C(5%) of a file system of C(total) bytes, or an amount such as C(20G)."""
    try:
        if reserve.endswith("%"):
            percent = float(reserve[:-1])
            if not 0 <= percent < 100:
                raise ValueError
            return int(total * percent / 100)
        return int(human_to_bytes(reserve, default_unit="B"))
    except ValueError:
        raise Refused(
            "reserve", f"{reserve!r} is neither an amount, such as 20G, nor a percentage, such as 5%"
        ) from None


def no_room(needed: int, space: Space, left: int) -> str:
    """Return what is said of a set for which only C(left) bytes are there."""
    reserve = human(space.reserve)
    if not space.reservable:
        reserve += " (counted twice, because this file system cannot reserve space for a copy)"
    return (
        f"not enough space: the set may take {human(needed)}, and there is room for {human(max(left, 0))}:"
        f" {human(space.free)} are free, {reserve} are kept in reserve, and the rest is for other sets;"
        " make room, or lower the reserve"
    )


LEAST_FREE = 1 << 20
"""A file system with fewer bytes free than this is full, whatever the reserve: a copy takes pieces of this size."""


async def measure(
    disks: Sequence[Disk], links: Sequence[ChainLink], planned: Iterable[DiskPlan] = (), vm: Vm | None = None
) -> dict[str, int]:
    """Return the most that each disk's image is expected to take, in bytes.

    A full image that was C(planned) takes what was measured then, or what the disk has come to hold since. C(vm) is
    where the disks' layers are told.
    """
    before = {disk.name: disk.bytes for disk in planned if disk.level == Level.FULL}

    async def expected(disk: Disk, link: ChainLink) -> int:
        if link.bitmap:
            return estimate.increment_bytes(disk, link.records)
        chain = vm.chain(disk) if vm and disk.layers else ()
        # What a layer of which QEMU tells nothing may hold, the others do not tell.
        known = chain if len(chain) == 1 + len(disk.layers) else ()
        return await estimate.expected_bytes(disk, "qcow2", before=before.get(disk.name, 0), chain=known)

    sizes = await asyncio.gather(*(expected(disk, link) for disk, link in zip(disks, links)))
    return {disk.name: size for disk, size in zip(disks, sizes)}


class SpaceTracker:
    """The space in a repository, or where one is to be made.

    Which sets grow there, made by whomever, is looked up again after RESCAN seconds: there may be thousands of VMs.
    """

    RESCAN = 5.0

    def __init__(self, repository: Repository, policy: Policy) -> None:
        self._repository = repository
        self._policy = policy
        self._path = repository.path
        while not os.path.isdir(self._path):
            self._path = os.path.dirname(self._path)
        self._reservable = _reservable(self._path)
        self._growing: dict[str, Intent] = {}
        self._seen = -self.RESCAN

    def space(self, besides: str = "") -> Space:
        """Return the space for the set of the VM C(besides)."""
        status = os.statvfs(self._path)
        return Space(
            free=status.f_bavail * status.f_frsize,
            reserve=reserve_bytes(self._policy.reserve, status.f_blocks * status.f_frsize),
            promised=self._promised(besides) if self._repository.uuid else 0,
            reservable=self._reservable,
        )

    def note(self, intent: Intent) -> None:
        """Count a set that has begun to grow since."""
        self._growing[intent.attempt] = intent

    def _promised(self, besides: str) -> int:
        if time.monotonic() - self._seen >= self.RESCAN:
            self._growing = {intent.attempt: intent for intent in self._repository.intents()}
            self._seen = time.monotonic()
        others = (intent for intent in self._growing.values() if intent.vm.name != besides)
        return sum(outstanding(self._repository, intent) for intent in others)


def space_in(repository: Repository, policy: Policy) -> Space:
    """Return the space for new sets, of whatever VM."""
    return SpaceTracker(repository, policy).space()


def short_of_space(repository: Repository, policy: Policy) -> str:
    """Return what is wrong with the free space for copies whose space could not be reserved; empty where nothing is."""
    status = os.statvfs(repository.path)
    free = status.f_bavail * status.f_frsize
    reserve = max(LEAST_FREE, reserve_bytes(policy.reserve, status.f_blocks * status.f_frsize))
    if free >= reserve:
        return ""
    return f"only {human(free)} are left in {repository.path}, less than the reserve of {human(reserve)}"


def _reservable(directory: str) -> bool:
    """Tell whether space can be reserved here, tried on a file of which nothing is left, whatever happens."""
    try:
        with scratch(directory, f".{REPOSITORY_FILE}.") as probe:
            return preallocate.allocate(probe, qemu_img.CLUSTER)
    except OSError:
        return False
