# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which of many like cases and tests `make test` takes: `make thorough` takes the others."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

CASES = 3
"""How many of the cases of one test are taken, from the first to the last of them."""

FILES = frozenset(
    {
        *("test_deprecated", "test_hostile_monitors", "test_hostile_variables", "test_keeps", "test_name_spaces"),
        *("test_role_schedule", "test_role_silence", "test_role_tags", "test_role_uses", "test_target_flags"),
    }
)
"""Files of which nothing is taken."""


def leave_out(items: list[pytest.Item]) -> None:
    """Mark what is left out of these tests."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        cases.setdefault((str(item.path), item.nodeid.partition("[")[0]), []).append(item)
    for (path, _name), among in cases.items():
        last = len(among) - 1
        taken = {round(last * number / (CASES - 1)) for number in range(CASES)} if last >= CASES else range(last + 1)
        for place, item in enumerate(among):
            if place not in taken or Path(path).stem in FILES:
                item.add_marker(pytest.mark.thorough)


def first(count: int, cases: t.Iterable[t.Any]) -> list[t.Any]:
    """The cases as parameters, those behind the first ones with the mark of those that are left out."""
    return [
        case if number < count else pytest.param(*_values(case), marks=pytest.mark.thorough)
        for number, case in enumerate(cases)
    ]


def _values(case: t.Any) -> tuple[t.Any, ...]:
    return case if isinstance(case, tuple) else (case,)
