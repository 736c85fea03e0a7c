# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Times and sizes."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import (
    age_of,
    amount,
    boottime,
    human,
    parse_time,
    seconds,
    utc_now,
)

PACKAGE = "ansible_collections.vmfleet.backup.plugins.module_utils"


@pytest.mark.parametrize(("size", "said"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 40, "5.0 TiB")])
def test_human(size: int, said: str) -> None:
    assert human(size) == said


@pytest.mark.parametrize(("size", "said"), [(0, "0 Bytes"), (1, "1 B"), (3 << 20, "3.0 MiB")])
def test_amount(size: int, said: str) -> None:
    assert amount(size) == said


@pytest.mark.parametrize("text", ["2026-11-05T01:00:00Z", "2026-11-05T02:00:00+01:00", "2026-11-05 01:00:00"])
def test_times(text: str) -> None:
    assert parse_time(text) == datetime(2026, 11, 5, 1, tzinfo=UTC)
    assert parse_time(text).utcoffset() is not None


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "", "01:00"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match=r"\A"):
        parse_time(text)


def test_what_is_written_is_read() -> None:
    assert utc_now().endswith("Z")
    assert parse_time(utc_now()).utcoffset() == timedelta()
    assert len(utc_now("milliseconds")) == len(utc_now()) + len(".000")
    assert boottime() <= boottime()


@pytest.mark.parametrize("name", ["_verify.verify", "_restore.restore", "_prune.prune", "_repository.catalog"])
def test_what_reads_sets_does_not_load_what_makes_them(name: str) -> None:
    script = f"import sys, {PACKAGE}.{name}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert f"{PACKAGE}.{name}" in loaded
    makers = (f"{PACKAGE}._backup.", f"{PACKAGE}._plan.")
    assert not [module for module in loaded if module.startswith(makers)]


@pytest.mark.parametrize(
    ("text", "found"), [("0", 0), ("90", 90), ("0.5", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200)]
)
def test_seconds(text: str, found: float) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["", "-1", "m", "10 min", "1e3", "nan", "10w", "5m5s"])
def test_no_seconds(text: str) -> None:
    with pytest.raises(ValueError, match="such as '10m'"):
        seconds(text)


@pytest.mark.parametrize(("begun", "age"), [(-60, 60), (0, 0), (3600, 0), (86400, 0), (86401, 86401), (9**8, 9**8)])
def test_what_is_far_ahead_is_not_new(begun: int, age: int) -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    assert age_of(now + timedelta(seconds=begun), now) == age
