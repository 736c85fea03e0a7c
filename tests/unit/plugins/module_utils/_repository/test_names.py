# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names that come from outside, and the files that are called after them."""

from __future__ import annotations

import re

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import (
    check_set_id,
    image_files,
    vm_directory,
)


@pytest.mark.parametrize("good", ["2026-11-22", "a", "A1.b_c-d", "x" * 64])
def test_ids(good: str) -> None:
    assert check_set_id(good) == good


@pytest.mark.parametrize("bad", ["", ".", "..", "a..b", "-a", ".a", "a/b", "a b", "a\n", "x" * 65, "ä"])
def test_bad_ids(bad: str) -> None:
    with pytest.raises(Refused, match="id"):
        check_set_id(bad)


@pytest.mark.parametrize("name", ["web01", "web01.example.org", "a" * 64])
def test_vm_directories_are_called_as_the_vms(name: str) -> None:
    assert vm_directory(name) == name


@pytest.mark.parametrize(
    "name", ["../etc", "", ".", "a/b", "a b", "vmfleet.json", "VMfleet.json", "é" * 99, "a..b", ".x"]
)
def test_other_vm_names_are_made_fit(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,55}-[0-9a-f]{8}", vm_directory(name))


def test_no_two_names_meet() -> None:
    names = ["a/b", "a_b", "a b", "A/b", "drive0", "Drive0", "..", ".", "", "x" * 100, "x" * 101]
    files = image_files(names, ".qcow2")
    assert len({file.casefold() for file in files.values()}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*\.qcow2", file) for file in files.values())


def test_a_disk_keeps_its_file_name() -> None:
    assert image_files(["vda", "vdb"], ".qcow2") == {"vda": "vda.qcow2", "vdb": "vdb.qcow2"}
