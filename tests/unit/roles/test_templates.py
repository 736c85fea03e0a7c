# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the templates of a role may not do, because some ansible-core would not take it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.tests.unit.roles.test_argument_specs import ROLES, options

if TYPE_CHECKING:
    from pathlib import Path

# The whole value of an option: Ansible makes it what the option is.
OPTION = r'[a-z_]+: "\{\{ %s \}\}"'
LITERAL = r"%s: (true|false)\b"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_truth_of_the_command_line_is_a_string(role: Path) -> None:
    """`-e name=false` gives the string "false", which is true; and ansible-core 2.19 refuses it as a condition."""
    truths = [name for name, option in options(role).items() if option.get("type") == "bool"]
    lines = [line.strip() for kind in ("tasks", "vars") for file in role.glob(f"{kind}/*.yml") for line in read(file)]
    taken = [line for line in lines if any(re.search(rf"\b{name}\b(?! \| bool)", line) for name in truths)]
    assert not [
        line
        for line in taken
        if not any(re.fullmatch(OPTION % name, line) or re.search(LITERAL % name, line) for name in truths)
    ]
    assert taken or not truths


def test_who_was_lost_is_asked_for_no_plan() -> None:
    """ansible-core 2.18 works out each variable that a template names, also where it is not used."""
    report = next(role for role in ROLES if role.name == "vm_backup") / "tasks" / "report.yml"
    assert "__vm_backup_lost" in report.read_text(encoding="utf-8")
    assert not re.search(r"\b__vm_backup_plan\b", report.read_text(encoding="utf-8"))


def read(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
