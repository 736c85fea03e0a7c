# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold the pages for developers to the code: rooms, floors, and the files that they name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ROOT / "plugins" / "module_utils"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")

PLACES = "plugins|roles|playbooks|docs|tools|findings|meta|changelogs|_[a-z_]+"


def floors() -> dict[str, int]:
    """Return the floor of each room, as the table has it."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", ARCHITECTURE, re.MULTILINE)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(_\w+)`", rooms)}


def imported(file: Path) -> set[tuple[str, ...]]:
    """Return what a file imports from other rooms: the names of room and file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            room, _dot, rest = (node.module or "").partition(".")
            found |= {(room, rest or alias.name) for alias in node.names}
    return found


def test_every_room_is_in_the_tree_and_on_a_floor() -> None:
    rooms = {path.parent.name for path in ROOMS.glob("*/*.py")}
    assert set(re.findall(r"^  (_\w+)/ ", ARCHITECTURE, re.MULTILINE)) == rooms
    assert set(floors()) == rooms
    assert [path.name for path in ROOMS.glob("*.py")] == []


@pytest.mark.parametrize("room", sorted(floors()))
def test_a_room_imports_from_floors_below_only(room: str) -> None:
    known = {name for file in (ROOMS / room).glob("*.py") for name in imported(file)}
    assert {other for other, _file in known if floors()[other] >= floors()[room]} == set()
    if room == "_backup":
        assert {other for other, _file in known if floors()[other] == floors()["_plan"]} == {"_plan"}
    if room == "_report":
        assert {file for other, file in known if other == "_backup"} <= {"outcome"}


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
