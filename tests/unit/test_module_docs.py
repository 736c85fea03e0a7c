# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The documentation of the modules, as ansible-doc has it: groups of module_defaults are what they are said to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml

from ansible_collections.vmfleet.backup.tests.harness.modules import NAMES, ROOT

HERE = Path(__file__).parents[2]
GROUPS: dict[str, list[str]] = yaml.safe_load((HERE / "meta" / "runtime.yml").read_text(encoding="utf-8"))[
    "action_groups"
]
ALL = "backup"


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, t.Any]:
    """What ansible-doc knows of every module, by its short name."""
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-doc"), "--json", *(f"vmfleet.backup.{name}" for name in NAMES)],
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
            "ANSIBLE_HOME": str(tmp_path_factory.mktemp("ansible")),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.rpartition(".")[2]: told for name, told in json.loads(done.stdout).items()}


def test_a_group_is_all_modules_with_the_option_of_its_name(documented: dict[str, t.Any]) -> None:
    named = {group: members for group, members in GROUPS.items() if group != ALL}
    with_option = {
        group: [name for name in NAMES if group in (documented[name]["doc"].get("options") or {})] for group in named
    }
    assert set(named) == {"repository", "monitor"}
    assert {group: sorted(members) for group, members in named.items()} == with_option


def test_modules_say_which_groups_they_are_in(documented: dict[str, t.Any]) -> None:
    for name in NAMES:
        told = documented[name]["doc"].get("attributes", {}).get("action_group", {}).get("membership", [])
        assert sorted(told) == sorted(f"vmfleet.backup.{group}" for group, names in GROUPS.items() if name in names)
