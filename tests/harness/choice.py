# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which of many like cases `make test` takes: `make thorough` takes the others."""

from __future__ import annotations

import typing as t

import pytest


def first(count: int, cases: t.Iterable[t.Any]) -> list[t.Any]:
    """The cases as parameters, those behind the first ones with the mark of those that are left out."""
    return [
        case if number < count else pytest.param(*_values(case), marks=pytest.mark.thorough)
        for number, case in enumerate(cases)
    ]


def _values(case: t.Any) -> tuple[t.Any, ...]:
    return case if isinstance(case, tuple) else (case,)
