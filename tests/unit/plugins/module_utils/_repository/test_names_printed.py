# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One long name does not make the lines of the others long."""

from __future__ import annotations

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome, describe

LONG = "x" * 200


def test_a_long_name_has_a_long_line_alone() -> None:
    outcomes = [Outcome(name, "s1", "skipped", reason="why", warnings=("odd",)) for name in ("web01", LONG)]
    short, warning, long, _other = describe(outcomes)
    assert short == f"skipped    {'web01':32}  why"
    assert warning == " " * 45 + "odd"
    assert long == f"skipped    {LONG}  why"


def test_names_of_like_length_stand_in_a_column() -> None:
    found = describe([Outcome(name, "s1", "skipped", reason="why") for name in ("a", "web01")])
    assert found == ["skipped    a      why", "skipped    web01  why"]
