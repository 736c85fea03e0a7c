# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of a hypervisor while its sets are made."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome
from ansible_collections.vmfleet.backup.plugins.plugin_utils._progress import Progress, duration

MIB = 1 << 20


def vm(name: str, state: str, offset: int = 0, length: int = 0, **more: Any) -> Outcome:
    """A VM with its numbers in MiB."""
    return Outcome(name, "s1", state, offset=offset * MIB, len=length * MIB, changed=True, **more)


def progress(*expected: int) -> Progress:
    return Progress("hv1:", [each * MIB for each in expected])


def test_all_there_is_to_tell() -> None:
    told = progress(100, 60, 100, 100)
    told.note(
        0.0,
        [
            vm("web01", "running", 20, 100),
            vm("database", "running", 30, 60),
            vm("mail01", "queued"),
            vm("old", "failed", error="busy"),
        ],
    )
    told.note(
        10.0,
        [
            vm("web01", "running", 40, 100),
            vm("database", "running", 60, 60),
            vm("mail01", "queued"),
            vm("old", "failed", error="busy"),
        ],
    )
    assert told.lines(bars=True) == [
        "hv1: old failed: busy",
        (
            "hv1: 0 of 4 VMs done, 2 running, 1 queued, 1 failed;"
            " 100.0 MiB of about 260.0 MiB (38 %); 5.0 MiB/s; 32 s left"
        ),
        "hv1:   web01     [########............]  40 %  40.0 MiB of 100.0 MiB",
        "hv1:   database  [####################] 100 %  60.0 MiB of 60.0 MiB",
    ]


def test_without_bars_there_is_one_line() -> None:
    told = progress(100)
    told.note(0.0, [vm("web01", "running", 20, 100)])
    assert told.lines(bars=False) == ["hv1: 0 of 1 VMs done, 1 running; 20.0 MiB of 100.0 MiB (20 %)"]


def test_a_failure_is_told_once() -> None:
    told = progress(10, 10)
    outcomes = [vm("web01", "failed", error="target full"), vm("web02", "cancelled", error="cancelled on request")]
    told.note(0.0, outcomes)
    assert told.lines(bars=False)[:2] == [
        "hv1: web01 failed: target full",
        "hv1: web02 cancelled: cancelled on request",
    ]
    told.note(1.0, outcomes)
    assert told.lines(bars=False) == ["hv1: 0 of 2 VMs done, 1 failed, 1 cancelled"]


@pytest.mark.parametrize(
    ("seconds", "ending"),
    [
        (0.0, "20.0 MiB of 100.0 MiB (20 %)"),
        (4.0, "40.0 MiB of 100.0 MiB (40 %); 5.0 MiB/s"),
        (5.0, "40.0 MiB of 100.0 MiB (40 %); 4.0 MiB/s; 15 s left"),
    ],
)
def test_nothing_is_said_of_the_time_left_before_it_can_be_known(seconds: float, ending: str) -> None:
    told = progress(100)
    told.note(100.0, [vm("web01", "running", 20, 100)])
    if seconds:
        told.note(100.0 + seconds, [vm("web01", "running", 40, 100)])
    assert told.lines(bars=False)[0].partition("; ")[2] == ending


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    told = progress(1000)
    for second, offset in ((0, 0), (100, 100), (200, 200), (220, 400), (231, 510)):
        told.note(float(second), [vm("web01", "running", offset, 1000)])
    assert "10.0 MiB/s; 49 s left" in told.lines(bars=False)[0]


def test_one_that_stands_still_has_no_time_left() -> None:
    told = progress(100)
    for second in range(0, 100, 10):
        told.note(float(second), [vm("web01", "running", 20, 100)])
    assert told.lines(bars=False)[0].endswith("(20 %); 0 B/s")


def test_one_that_is_begun_anew_goes_backwards() -> None:
    told = progress(100)
    told.note(0.0, [vm("web01", "running", 90, 100)])
    told.note(10.0, [vm("web01", "running", 10, 100)])
    assert told.lines(bars=False)[0].endswith("10.0 MiB of 100.0 MiB (10 %); 0 B/s")


def test_what_waits_is_guessed_by_those_that_run() -> None:
    # The plan has the size of the images, and jobs go through the empty parts of a disk as well.
    told = progress(50, 50)
    told.note(0.0, [vm("web01", "running", 0, 100), vm("web02", "queued")])
    assert "of about 200.0 MiB" in told.lines(bars=False)[0]


def test_one_that_comes_to_its_end_between_two_looks_has_been_copied() -> None:
    told = progress(80, 80)
    told.note(0.0, [vm("web01", "running", 50, 100), vm("web02", "queued")])
    told.note(10.0, [vm("web01", "published"), vm("web02", "published")])
    assert told.lines(bars=True) == ["hv1: 2 of 2 VMs done; 180.0 MiB of 180.0 MiB (100 %)"]


def test_one_that_fails_has_nothing_left_to_copy() -> None:
    told = progress(100, 100)
    told.note(0.0, [vm("web01", "running", 50, 100), vm("web02", "running", 50, 100)])
    told.note(10.0, [vm("web01", "failed", error="gone"), vm("web02", "running", 100, 100)])
    assert "150.0 MiB of 150.0 MiB" in told.lines(bars=False)[1]


def test_what_was_there_before_does_not_count() -> None:
    told = progress(7, 10)
    told.note(0.0, [Outcome("web01", "s1", "published", bytes=MIB), vm("web02", "running", 5, 10)])
    assert told.lines(bars=False) == ["hv1: 1 of 2 VMs done, 1 running; 5.0 MiB of 10.0 MiB (50 %)"]


def test_jobs_that_have_ended_are_told_in_words() -> None:
    told = progress(100, 100)
    told.note(0.0, [vm("web01", "running", 50, 100), vm("web02", "running", reason="its jobs are about to start")])
    told.note(
        5.0,
        [
            vm("web01", "running", reason="its jobs have ended"),
            vm("web02", "running", reason="its jobs are about to start"),
        ],
    )
    assert told.lines(bars=True)[1:] == [
        "hv1:   web01  [####################] 100 %  its jobs have ended",
        "hv1:   web02  [....................]   0 %  its jobs are about to start",
    ]


def test_all_of_it_is_not_said_too_early() -> None:
    told = progress(1000)
    told.note(0.0, [vm("web01", "running", 999, 1000)])
    assert "(99 %)" in told.lines(bars=False)[0]
    assert "[###################.]  99 %" in told.lines(bars=True)[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5700, "95 min"),
        (5999, "1 h 40 min"),
        (3 * 3600 + 299, "3 h 05 min"),
        (50 * 3600, "2 d 2 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
