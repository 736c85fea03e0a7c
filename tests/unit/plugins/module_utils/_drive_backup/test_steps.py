# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a call does next: one row for each rule of the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    CompletionMode,
    Drive,
    DriveBackupRequest,
    RequestedState,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import (
    RULES,
    Copy,
    CopyState,
    DriveStep,
    Situation,
    next_step,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import disk, job, record, vm

ADDRESS = Address(path="/run/web01.qmp")
ABSENT, OCCUPIED, DONE, COPIED, RUNNING, ENDED, DEAD = CopyState
BROKEN = "ended badly"


def copy(found: str, attempt: str = "a") -> Copy:
    """Return a copy of which this was found; C(BROKEN) is one whose job has ended with an error."""
    listed = job("j0", "concluded" if found in (ENDED, BROKEN) else "running", error="EIO" if found == BROKEN else "")
    has_job = found in (RUNNING, ENDED, BROKEN)
    return Copy(
        Drive("drive0", "/b/x.qcow2"),
        disk(),
        "j0",
        ENDED if found == BROKEN else CopyState(found),
        None if found == ABSENT else record(attempt=attempt),
        listed if has_job else None,
    )


def situation(*copies: Copy, followed: str = "", **values: Any) -> Situation:
    return Situation(DriveBackupRequest(ADDRESS, (), **values), vm(), copies, followed)


INDIVIDUAL = {"completion_mode": CompletionMode.INDIVIDUAL}
ROWS: dict[str, tuple[Situation, DriveStep]] = {
    "it is to be cancelled": (
        situation(copy(RUNNING), copy(DEAD), state=RequestedState.CANCELLED),
        DriveStep.CANCEL,
    ),
    "one image of a group failed: the others are useless without it": (
        situation(copy(RUNNING), copy(BROKEN)),
        DriveStep.CLEAN_UP,
    ),
    "an image failed, and the jobs of the others have ended": (
        situation(copy(ENDED), copy(DEAD), **INDIVIDUAL),
        DriveStep.CLEAN_UP,
    ),
    "jobs run for some, and nothing is there of the others": (
        situation(copy(RUNNING), copy(ABSENT), followed="a"),
        DriveStep.REFUSE_BUSY,
    ),
    "jobs run": (situation(copy(RUNNING), copy(BROKEN), copy(DONE, "b"), **INDIVIDUAL), DriveStep.JOIN),
    "the jobs that the call waited for are gone": (
        situation(copy(ENDED), copy(OCCUPIED), followed="a"),
        DriveStep.FAIL,
    ),
    "an image is not there": (situation(copy(DONE, "b"), copy(OCCUPIED)), DriveStep.START),
    "the images are of several moments": (situation(copy(DONE), copy(DONE, "b")), DriveStep.REFUSE_MIXED),
    "all images are there, or whole": (
        situation(copy(DONE), copy(COPIED, "b"), copy(ENDED), **INDIVIDUAL),
        DriveStep.FINISH,
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_rule(rule: Any) -> None:
    now, step = ROWS[rule.name]
    assert next(other.name for other in RULES if other.condition(now)) == rule.name
    assert next_step(now) == rule.step == step


FOUND = (*CopyState, BROKEN)


def test_nothing_is_started_beside_a_job_and_nothing_is_finished_that_is_not_whole() -> None:
    for found in itertools.product(FOUND, FOUND):
        for state, mode, followed in itertools.product(RequestedState, CompletionMode, ("", "a")):
            now = situation(*map(copy, found), followed=followed, state=state, completion_mode=mode)
            step = next_step(now)
            if RUNNING in found:
                assert step not in (DriveStep.START, DriveStep.FINISH, DriveStep.FAIL)
            if step == DriveStep.FINISH:
                assert set(found) <= {DONE, COPIED, ENDED}
            if step == DriveStep.START:
                assert not followed
                assert set(found) <= {ABSENT, OCCUPIED, DONE, COPIED, ENDED}
            if step == DriveStep.CLEAN_UP:
                assert set(found) & {DEAD, BROKEN}
            assert (step == DriveStep.CANCEL) == (state == RequestedState.CANCELLED)
