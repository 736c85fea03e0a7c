# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say what has become of a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._plan.model import Action, Case, Quiesce
from .._qemu.model import IN_THE_CLEAR
from .._repository.documents import Level
from .outcome import DiskOutcome, Outcome, VmState
from .prepare import NOT_ASKED, WAS_OFF
from .session import jobs_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .._repository.documents import DiskImage, Manifest
    from .run import BackupRun
    from .session import VmSession, VmTask


def disk_outcomes(images: Iterable[DiskImage]) -> tuple[DiskOutcome, ...]:
    """Return what has become of each disk of a set."""
    return tuple(
        DiskOutcome(image.name, image.level, image.reason, image.parent.id if image.parent else None, image.bytes)
        for image in images
    )


def outcome(run: BackupRun, task: VmTask, state: VmState, **more: Any) -> Outcome:
    return Outcome(
        name=task.name,
        id=run.plan.id,
        state=state,
        warnings=tuple(task.warnings),
        changed=task.changed,
        **more,
    )


def skipped(session: VmSession, reason: str) -> Outcome:
    return outcome(session.run, session.task, VmState.SKIPPED, reason=reason)


def failed(session: VmSession, error: str) -> Outcome:
    """Say that a VM has failed, or that its set was cancelled in this run."""
    failure = session.records.failure(session.run.plan.id)
    cancelled = session.decision.case == Case.FAILED and failure and failure.state == VmState.CANCELLED
    return outcome(session.run, session.task, VmState.CANCELLED if cancelled else VmState.FAILED, error=error)


def predicted(session: VmSession) -> Outcome:
    """Say what would become of a VM with which something is to be done, for check mode."""
    run, task, plan = session.run, session.task, session.decision.plan
    task.changed = plan.action != Action.SKIP
    if session.decision.manifest:
        return published(run, task, session.decision.manifest)
    state = VmState.PUBLISHED if run.settings.state == "completed" else VmState.RUNNING
    return outcome(run, task, state, level=plan.level, reason=plan.reason, path=_path(run, task))


def published(run: BackupRun, task: VmTask, manifest: Manifest) -> Outcome:
    was_running = manifest.consistency_reason not in ("", WAS_OFF)
    if was_running and task.request.quiesce != Quiesce.NONE:
        advice = "; for a set of a frozen guest use another id" if manifest.consistency_reason == NOT_ASKED else ""
        task.warn(f"the guest's file systems were not frozen: {manifest.consistency_reason}{advice}")
    for disk in manifest.disks:
        if disk.source_encrypted:
            task.warn(f"disk {disk.name} {IN_THE_CLEAR}")
    wanted = task.request.wanted
    if wanted in (Level.FULL, Level.DIFFERENTIAL) and manifest.level not in (Level.FULL, wanted):
        task.warn(f"the set is {manifest.level} and stays so; for the level {wanted} use another id")
    return outcome(
        run,
        task,
        VmState.PUBLISHED,
        level=manifest.level,
        bytes=manifest.bytes,
        duration=manifest.duration,
        consistency=manifest.consistency,
        consistency_reason=manifest.consistency_reason,
        frozen_ms=manifest.frozen_ms,
        path=_path(run, task),
        disks=disk_outcomes(manifest.disks),
    )


def running(run: BackupRun, task: VmTask) -> Outcome:
    if not task.last_seen:
        reason = "its jobs have ended, and it is about to be finished"
        return outcome(run, task, VmState.RUNNING, reason=reason)
    vm, intent = task.last_seen
    jobs = jobs_of(intent, vm)
    advance = {"offset": sum(job.offset for job in jobs), "len": sum(job.len for job in jobs)}
    if intent.id != run.plan.id:
        reason = f"the jobs of set {intent.id} are copying; that set is completed first"
        return outcome(run, task, VmState.RUNNING, reason=reason, **advance)
    return outcome(
        run,
        task,
        VmState.RUNNING,
        reason="its jobs are copying",
        **advance,
        level=intent.level,
        consistency=intent.consistency,
        consistency_reason=intent.consistency_reason,
        frozen_ms=intent.frozen_ms,
        disks=disk_outcomes(disk.image for disk in intent.disks),
    )


def _path(run: BackupRun, task: VmTask) -> str:
    return run.repository.set_path(task.name, run.plan.id)
