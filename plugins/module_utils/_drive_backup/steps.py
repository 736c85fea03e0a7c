# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the copies of a call, and decide what it does next: an ordered table of rules.

A copy is one disk on its way to one target. The rules look at what is asked for and what is found.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import JobFailed
from .._common.formats import Word
from .._qemu.model import CANCELLED, Disk
from .receipt import record_path
from .request import BitmapMode, RequestedState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from .._qemu.model import Job, Vm
    from .receipt import Record
    from .request import Drive, DriveBackupRequest


class CopyState(Word):
    """What has become of a backup to a target."""

    ABSENT = "absent"
    """Nothing of worth stands at the target."""
    OCCUPIED = "occupied"
    """Something stands at the target that is not this backup."""
    DONE = "done"
    """The target stands there with its receipt."""
    COPIED = "copied"
    """The image is whole and on stable storage; its renames are missing."""
    RUNNING = "running"
    ENDED = "ended"
    """The job has ended, well or not, and waits to be collected."""
    DEAD = "dead"
    """An attempt that comes to nothing has left traces."""


class JobState(Word):
    """What the module's return value says of a copy."""

    PLANNED = "planned"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABSENT = "absent"


JOB_PREFIX = "vmfleet.db."
FDSET_PREFIX = "vmfleet:db:"


@dataclass(frozen=True)
class Copy:
    """One drive with what is known about it now. C(reason) explains C(found)."""

    drive: Drive
    disk: Disk
    job_id: str
    found: CopyState
    record: Record | None = None
    job: Job | None = None
    reason: str = ""
    open_node: str = ""
    """The node that its target is in QEMU, where it is one of its own."""

    @property
    def opaque(self) -> str:
        """The tag of this copy's fdsets."""
        return FDSET_PREFIX + digest(self.drive, self.disk)

    @property
    def who(self) -> str:
        """What messages call it."""
        return f"disk {self.disk.name or self.disk.node} to {self.drive.target}"

    @property
    def record_path(self) -> str:
        """Where its record lies while its image grows; empty where it is not remembered."""
        return record_path(self.drive.receipt_path) if self.drive.receipt_path else ""

    @property
    def failure(self) -> str:
        """Why an ended job is no success; empty for every other copy."""
        return self.job.failure if self.job and self.found == CopyState.ENDED else ""

    @property
    def stuck(self) -> bool:
        """Whether an error has paused its job (on-target-error or on-source-error is stop or enospc)."""
        job = self.job
        return job is not None and job.paused and job.io_status != "ok" and not job.ended

    @property
    def state(self) -> JobState:
        """What the module's return value calls it."""
        if self.found == CopyState.RUNNING:
            return JobState.PAUSED if self.stuck else JobState.RUNNING
        if self.missing:
            return JobState.ABSENT
        if self.failure == CANCELLED:
            return JobState.CANCELLED
        return JobState.FAILED if self.bad else JobState.COMPLETED

    @property
    def running(self) -> bool:
        """Whether its job runs."""
        return self.found == CopyState.RUNNING

    @property
    def missing(self) -> bool:
        """Whether it was never begun, or nothing is left of it."""
        return self.found in (CopyState.ABSENT, CopyState.OCCUPIED)

    @property
    def bad(self) -> bool:
        """Whether it has come to a bad end."""
        return bool(self.failure) or self.found == CopyState.DEAD

    @property
    def unfinished(self) -> bool:
        """Whether its job has ended, and its image is not at its place yet."""
        return self.found in (CopyState.ENDED, CopyState.COPIED)

    @property
    def irreplaceable(self) -> bool:
        """Whether nothing else knows the changes that its image holds."""
        return self.record is not None and self.record.consumes_bitmap

    @property
    def clears_always(self) -> bool:
        """Whether QEMU clears its bitmap of what was copied also where the copy fails."""
        return self.record is not None and self.record.bitmap_mode == BitmapMode.ALWAYS

    @property
    def guest_before(self) -> str:
        """The VM's status when it began; empty where that is not remembered."""
        return self.record.guest if self.record else ""

    @property
    def at_fault(self) -> bool:
        """Whether its target can be why the guest's writes fail: QEMU need not tell, and reserved space may be missing.

        To resume a guest that has stopped for another reason does no harm: it tries its write again, and stops again.
        """
        return self.running or self.job is not None

    @property
    def begun(self) -> bool:
        """Whether its job runs, or has ended and its image is not at its place yet."""
        return self.running or self.unfinished

    @property
    def needs_speed(self) -> bool:
        """Whether its job runs at another speed than is asked for."""
        return self.running and self.job is not None and self.drive.speed not in (0, self.job.speed)

    def belongs_to(self, attempt: str) -> bool:
        """Return whether its job is of this attempt. One without a record has the job that we know."""
        return self.begun and (self.record is None or self.record.attempt == attempt)

    def result(self, state: JobState | None = None, error: str = "") -> dict[str, Any]:
        """Return this copy as an entry of the module's return value C(jobs)."""
        state = state or self.state
        job = self.job
        duration = 0.0
        if self.record:
            duration = self.record.duration if self.record.finished else self.record.elapsed
        return {
            "id": self.job_id,
            "device": self.drive.device,
            "node": self.disk.node,
            "target": self.drive.target,
            "state": state,
            "offset": job.offset if job else 0,
            "len": job.len if job else 0,
            "percent": 100.0 if state == JobState.COMPLETED else job.percent if job else 0.0,
            "speed": job.speed if job else self.drive.speed,
            "duration": 0.0 if state == JobState.PLANNED else round(duration, 3),
            "error": error or self.failure,
        }


def results(copies: Iterable[Copy]) -> list[dict[str, Any]]:
    """Return what is known of each copy."""
    return [copy.result() for copy in copies]


def cancelled_results(copies: Iterable[Copy], done: Iterable[Copy], error: str = "") -> list[dict[str, Any]]:
    """Return what has become of copies that were cancelled, except for those that were done after all."""
    by_node = {copy.disk.node: copy for copy in done}
    return [
        by_node[copy.disk.node].result() if copy.disk.node in by_node else copy.result(JobState.CANCELLED, error)
        for copy in copies
    ]


def lost_result(drive: Drive, record: Record, error: str) -> dict[str, Any]:
    """Return the entry of a copy whose VM cannot be asked any more."""
    disk = Disk(name=record.device, node="", driver="")
    copy = Copy(drive, disk, record.job, CopyState.DEAD, record)
    return copy.result(error=error)


def attempt_of(copies: Iterable[Copy]) -> str:
    """Return the attempt of the running copies, or the job's id where a bare block device has no record."""
    running = [copy for copy in copies if copy.running]
    attempts = [copy.record.attempt for copy in running if copy.record]
    return attempts[0] if attempts else running[0].job_id


def cause_of(copies: Sequence[Copy]) -> str:
    """Return why copies have come to a bad end."""
    bad = [copy for copy in copies if copy.bad]
    # A failed copy takes the others of its group along; their cancellation is not the reason.
    causes = [copy for copy in bad if copy.failure != CANCELLED] or bad
    return "; ".join(f"{copy.who}: {_reason(copy)}" for copy in causes)


def _reason(copy: Copy) -> str:
    return copy.job.failure_in_words if copy.job and copy.failure else copy.reason


def failed(vm: Vm, copies: Iterable[Copy], reason: str) -> JobFailed:
    """Return the error of a call whose copies have come to a bad end."""
    return JobFailed(
        f"VM {vm.name}: the backup failed: {reason}. Its remains are removed. Remove the cause, then repeat the call",
        jobs=[copy.result(JobState.CANCELLED if copy.running else None) for copy in copies],
    )


def paused(vm: Vm, copies: Sequence[Copy]) -> JobFailed:
    """Return the error of a call one of whose jobs waits for a person, and is left alone."""
    advice = []
    for copy in copies:
        if copy.job and copy.stuck:
            full = copy.job.io_status == "nospace"
            remedy = "No space left on device: free some" if full else "after an I/O error: remove its cause"
            advice.append(f"{copy.who}: job {copy.job_id} is paused, {remedy}")
    return JobFailed(
        f"VM {vm.name}: {'; '.join(advice)}; then resume the job (block_job with state running), and repeat this call."
        " State cancelled cancels the backup",
        jobs=results(copies),
    )


def digest(drive: Drive, disk: Disk) -> str:
    """Return 12 hex digits that tell this copy from others: the same in every call that asks for it."""
    text = f"{drive.target}\0{disk.node}\0{drive.sync}\0{drive.bitmap}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


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
        "one image of a group failed: the others are useless without it",
        lambda now: now.any_bad and now.request.grouped,
        DriveStep.CLEAN_UP,
    ),
    DriveRule(
        "an image failed, and the jobs of the others have ended",
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
        "the jobs that the call waited for are gone",
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
