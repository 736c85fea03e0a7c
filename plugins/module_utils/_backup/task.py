# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what a run knows of a VM beyond disk and QEMU."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from .._qemu.jobs import StallClock

if TYPE_CHECKING:
    from .._host.process import Process
    from .._plan.model import Request, VmPlan
    from .._qemu.model import Vm
    from .._repository.documents import DiskImage, Intent


FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
PAUSE_GROWTH = 1.5


@dataclass(frozen=True)
class Settings:
    """How a run goes. Times are seconds; 0 waits without end. The last three are those of RunContext.

    C(bandwidth) is bytes/s for all jobs together, 0 for no limit; C(slice) is when to come back, done or not. Without
    C(begin), what is being made is gone on with, and nothing else.
    """

    state: str = "completed"
    max_vms: int = 4
    bandwidth: int = 0
    slice: float = 0
    timeout: float = 0
    stall_timeout: float = 600
    unattended: bool = False
    begin: bool = True
    check_mode: bool = False
    takeover: bool = False
    supersede: bool = False
    adopt: bool = False


class WaitFor(Enum):
    """What the next step of a VM waits for."""

    NOTHING = "nothing"
    SLOT = "slot"
    """One of the others that copy has to come to its end."""
    JOBS = "jobs"
    MONITOR = "monitor"
    """QEMU has to answer again."""


@dataclass(frozen=True)
class Pending:
    """A VM that is not at its end yet. C(reason) is why, where people are told."""

    wait_for: WaitFor
    reason: str = ""


AGAIN = Pending(WaitFor.NOTHING)
"""The VM is to be observed again at once: something has changed."""


@dataclass
class VmTask:
    """What this process knows of one VM beyond disk and QEMU. Losing it costs time only."""

    planned: VmPlan
    changed: bool = False
    flushed: dict[str, tuple[DiskImage, ...]] = field(default_factory=dict)
    """Finished images on stable storage, by attempt."""
    flush_errors: dict[str, str] = field(default_factory=dict)
    """Why finished images could not be brought there, by attempt."""
    order: tuple[str, int] = ("", 0)
    """Its place among those that wait for a slot: when its newest set was begun, and its place in the plan."""
    watched: str = ""
    """The attempt whose jobs are watched."""
    clock: StallClock = field(default_factory=lambda: StallClock(0.0))
    """How much they have copied, and since when."""
    moved: bool = False
    """Whether this process has seen it advance."""
    first_step: bool = True
    """Whether nothing was done for it yet, and all that is known of it is the plan."""
    start_on: Process | None = None
    """The QEMU of a VM that was told to wait for a slot to start a set."""
    last_seen: tuple[Vm, Intent] | None = None
    """The VM as it was when its jobs were last seen to run, and whose jobs they are."""
    last_attempt: Intent | None = None
    """The last attempt whose jobs may run on this hypervisor."""
    reconnected: bool = False
    """Whether the connection has broken off once while a set was started."""
    silent_since: float = 0.0
    """When its monitor was first found not to answer."""
    pause: float = FIRST_PAUSE
    warnings: list[str] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.planned.request

    @property
    def name(self) -> str:
        return self.planned.name

    def next_pause(self) -> float:
        """Return the seconds until the next look: few at first, as most sets are small."""
        pause, self.pause = self.pause, min(self.pause * PAUSE_GROWTH, LONGEST_PAUSE)
        return pause

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
