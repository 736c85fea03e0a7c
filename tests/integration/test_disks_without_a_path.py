# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks that QEMU names by a json: file name without a path in it, as those on Ceph are: only it can open them."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import backup
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

NAME = "web01"


@pytest.fixture
def parts(directory: Path) -> list[Path]:
    """Three images that hold the same."""
    return [patterned(directory / f"part{number}.raw", "raw", 8 * MIB, seed=7) for number in range(3)]


@pytest.fixture
def vm(vms: Vms, parts: list[Path]) -> Qemu:
    """A VM whose second disk `drive1` is a quorum of the three images, which nobody else can open by their names."""
    children = [
        f"children.{number}.driver=raw,children.{number}.file.driver=file,children.{number}.file.filename={path}"
        for number, path in enumerate(parts)
    ]
    quorum = ",".join(["if=none,id=drive1,driver=quorum,vote-threshold=2", *children])
    vm = vms.start(vms.disk(0, size=8 * MIB), name=NAME, extra=["-drive", quorum])
    for path in parts:
        path.rename(path.with_suffix(".moved"))
    return vm


def test_a_set(vm: Qemu, parts: list[Path], directory: Path) -> None:
    sets = Sets(directory / "repository")
    result = sets.back_up(vm)
    assert result["warnings"] == []
    vm.quit()
    assert identical(parts[0].with_suffix(".moved"), sets.images(NAME, ID)["drive1"], "raw")


def test_one_disk(vm: Qemu, parts: list[Path], target: Path) -> None:
    backup(vm, target, device="drive1")
    vm.quit()
    assert identical(parts[0].with_suffix(".moved"), target, "raw")
