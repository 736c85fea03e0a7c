# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold the pages for developers to the code: rooms, floors, and the files that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.unit.plugins.module_utils.test_floors import FLOORS

ROOT = Path(__file__).parents[2]
ROOMS = ROOT / "plugins" / "module_utils"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")

PLACES = "plugins|tests/unit|roles|playbooks|docs|tools|findings|meta|changelogs|_[a-z_]+"


def floors() -> dict[str, set[str]]:
    """Return what each room may import, as the table of floors has it."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \| ([^|]*) ?\|$", ARCHITECTURE, re.MULTILINE)
    on_floor = {int(floor): re.findall(r"`(_\w+)`", rooms) for floor, rooms, _allowed in rows}
    found = {}
    for floor, _rooms, allowed in rows:
        below = re.search(r"floors? 1(?: to (\d))?", allowed)
        known = range(1, int(below.group(1) or 1) + 1) if below else ()
        for room in on_floor[int(floor)]:
            found[room] = {*re.findall(r"`(_\w+)`", allowed), *(other for one in known for other in on_floor[one])}
    return found


def test_every_room_is_in_the_tree() -> None:
    assert set(re.findall(r"^  (_\w+)/ ", ARCHITECTURE, re.MULTILINE)) == set(FLOORS)


def test_the_floors_are_those_that_are_held() -> None:
    assert floors() == FLOORS


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_a_file_that_is_named_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{PLACES})/[\w./-]*)`", text))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).exists() and not (ROOMS / name).exists()} == set()


def test_ten_changes_lead_to_a_file() -> None:
    """The map of CONTRIBUTING names it as well, or the folder of modules that it is in."""
    rows = ARCHITECTURE.partition("| first file |\n| --- | --- |\n")[2].splitlines()
    leads = [re.findall(r"`(plugins/[\w/]+[.]py)`", row)[0] for row in rows]
    assert len(leads) == 10
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    short = [re.sub(r"^plugins/module_utils/|(?<=plugins/modules/).*", "", lead) for lead in leads]
    assert [lead for lead in short if f"`{lead}" not in text] == []
