# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backup jobs under watch: what counts as standing still, and as the reason why a guest does."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import (
    StallClock,
    has_stopped,
    is_backup_fault,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import job


class TestStallClock:
    def test_jobs_stall_when_nothing_was_copied_for_so_long(self) -> None:
        clock = StallClock(100)
        clock.observe(0, 101)
        clock.observe(0, 110)
        assert clock.stalled(10, 110) == ""
        assert clock.stalled(10, 111) == "no progress for 10 s"

    def test_progress_begins_it_anew(self) -> None:
        clock = StallClock(100)
        for copied, now in ((5, 101), (6, 110), (6, 111)):
            clock.observe(copied, now)
        assert clock.stalled(10, 119) == ""
        assert clock.stalled(10, 120)

    def test_time_in_which_nothing_can_be_seen_does_not_count(self) -> None:
        clock = StallClock(100)
        clock.observe(5, 101)
        clock.restart(200)
        assert clock.stalled(10, 200) == ""
        # The first look after that is one at progress, whatever it shows.
        clock.observe(5, 205)
        assert clock.stalled(10, 214) == ""
        assert clock.stalled(10, 215)

    def test_no_limit(self) -> None:
        assert StallClock(0).stalled(0, 1e9) == ""


@pytest.mark.parametrize(
    ("status", "before", "stopped"),
    [
        ("io-error", "running", True),
        ("io-error", "", True),
        ("io-error", "io-error", False),
        ("running", "running", False),
        ("paused", "running", False),
    ],
)
def test_guest_that_has_stopped(status: str, before: str, stopped: bool) -> None:
    assert has_stopped(status, before) is stopped


@pytest.mark.parametrize(
    ("jobs", "reserved", "fault"),
    [
        ((job(),), True, False),
        ((job(), job("j1", error="Input/output error")), True, True),
        ((job(io_status="nospace"),), True, True),
        ((job(),), False, True),
        ((), True, False),
    ],
)
def test_fault_of_a_backup(jobs: Any, reserved: bool, fault: bool) -> None:
    assert is_backup_fault(jobs, reserved) is fault
