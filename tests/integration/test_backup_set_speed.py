# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a limit of speed does to disks with holes."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import create, write
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")


def test_the_plan_says_how_long_the_holes_of_a_thin_disk_take(vms: Vms, directory: Path, sets: Sets) -> None:
    path = create(directory / "thin.qcow2", 8 << 30)
    write(path, "write -P 7 4G 4M")
    vm = vms.start(Disk(path, id="drive0", node="n0", format="qcow2"), name="web01")
    [said] = sets.plan(vm, speed="1M")["plan"]["warnings"]
    assert said.startswith("VM web01: disk drive0 of 8.0 GiB takes 2.3 h to copy at 1.0 MiB per second (speed), though")
    # Without a limit, holes take no time.
    assert sets.plan(vm)["plan"]["warnings"] == []
    sets.back_up(vm)
    vm.write("drive0", 9, 0, 65536)
    assert sets.plan(vm, id="s2", speed="1M")["plan"]["warnings"] == []
