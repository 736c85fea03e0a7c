# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which disks of a VM are backed up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import choose_disks
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import GOLDEN, REQUEST, VDA, VDB, vm


def test_disks_of_one_name_cannot_be_told_apart() -> None:
    twins = (VDA, replace(VDA, node="other"), VDB)
    assert "(nodes n-vda, other)" in choose_disks(vm(*twins), REQUEST).error
    choice = choose_disks(vm(*twins), replace(REQUEST, exclude_disks=("other",)))
    assert [disk.node for disk in choice.disks] == ["n-vda", "n-vdb"]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), (), ["vda", "vdb"]),
        (("vdb",), (), ["vdb"]),
        (("n-vdb",), (), ["vdb"]),
        ((), ("vdb",), ["vda"]),
        (("vda", "vdb"), ("vda",), ["vdb"]),
        (("golden",), (), ["golden"]),
        ((), ("cd",), ["vda", "vdb"]),
    ],
)
def test_choose_disks(include: tuple[str, ...], exclude: tuple[str, ...], chosen: list[str]) -> None:
    choice = choose_disks(vm(VDA, VDB, GOLDEN), replace(REQUEST, include_disks=include, exclude_disks=exclude))
    assert [disk.name for disk in choice.disks] == chosen
    left_out = {drive.name for drive in choice.left_out}
    assert left_out == {"vda", "vdb", "golden", "cd"} - set(chosen)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"include_disks": ("vdx",)}, "include_disks: "),
        ({"exclude_disks": ("vdx",)}, "exclude_disks: "),
        ({"include_disks": ("cd",)}, "no medium"),
    ],
)
def test_names_that_no_disk_has(lists: dict[str, Any], said: str) -> None:
    assert said in choose_disks(vm(), replace(REQUEST, **lists)).error
