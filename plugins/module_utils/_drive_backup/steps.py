# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Decide what a call does next: an ordered table of rules over what is asked for and what is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.formats import Word
from .request import RequestedState

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._qemu.model import Vm
    from .request import DriveBackupRequest
    from .status import Copy


class DriveStep(Word):
    """What a call does next. All but the refusals change something, and need the VM's lock."""

    CANCEL = "cancel"
    """Stop what runs, and remove what came to nothing. What has ended well is finished instead."""
    CLEAN_UP = "clean up"
    """Remove what came to a bad end. The call that has waited for it fails; another one looks again."""
    REFUSE_BUSY = "refuse busy"
    """Refuse: jobs run that leave out some of what is asked for."""
    JOIN = "join"
    """Take up the jobs that run."""
    FAIL = "fail"
    """Fail: what this call has waited for is gone, and no image was finished."""
    START = "start"
    """Start the jobs of what is not there."""
    REFUSE_MIXED = "refuse mixed"
    """Refuse: the images are there, but do not belong to one point in time."""
    FINISH = "finish"
    """Finish what has ended well: all is there then."""


@dataclass(frozen=True)
class Situation:
    """What is asked for, and what is found of it. C(followed) is the attempt that this call has waited for, or empty.

    The end of that attempt, good or bad, is the end of the call.
    """

    request: DriveBackupRequest
    vm: Vm
    copies: tuple[Copy, ...]
    followed: str = ""

    @property
    def any_running(self) -> bool:
        return any(copy.running for copy in self.copies)

    @property
    def any_missing(self) -> bool:
        return any(copy.missing for copy in self.copies)

    @property
    def any_bad(self) -> bool:
        return any(copy.bad for copy in self.copies)

    @property
    def is_mixed(self) -> bool:
        """Whether images that belong together are of several attempts."""
        attempts = {copy.record.attempt for copy in self.copies if copy.record}
        return self.request.grouped and len(attempts) > 1


@dataclass(frozen=True)
class DriveRule:
    """One row of the table: when its C(condition) holds, and no row above applies, C(step) is next."""

    name: str
    condition: Callable[[Situation], bool]
    step: DriveStep


RULES = (
    DriveRule(
        "it is to be cancelled",
        lambda now: now.request.state == RequestedState.CANCELLED,
        DriveStep.CANCEL,
    ),
    DriveRule(
        "one image of a group came to a bad end: the others are of no use without it",
        lambda now: now.any_bad and now.request.grouped,
        DriveStep.CLEAN_UP,
    ),
    DriveRule(
        "an image came to a bad end, and the others have ended as well",
        lambda now: now.any_bad and not now.any_running,
        DriveStep.CLEAN_UP,
    ),
    DriveRule(
        "jobs run for some, and nothing is there of the others",
        lambda now: now.any_running and now.any_missing,
        DriveStep.REFUSE_BUSY,
    ),
    DriveRule("jobs run", lambda now: now.any_running, DriveStep.JOIN),
    DriveRule(
        "what was waited for is gone",
        lambda now: now.any_missing and bool(now.followed),
        DriveStep.FAIL,
    ),
    DriveRule("an image is not there", lambda now: now.any_missing, DriveStep.START),
    DriveRule("the images are of several moments", lambda now: now.is_mixed, DriveStep.REFUSE_MIXED),
    DriveRule("all images are there, or whole", lambda _now: True, DriveStep.FINISH),
)
"""The first row that applies is taken."""


def next_step(now: Situation) -> DriveStep:
    """Return what is to be done next."""
    return next(rule.step for rule in RULES if rule.condition(now))
