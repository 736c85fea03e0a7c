# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a process that makes several sets has open of one that others have ended."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


def test_a_set_that_is_cancelled_gives_its_space_back_at_once(
    vms: Vms, sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    both = [vms.start(vms.disk(number, size=64 * MIB), name=f"vm{number}") for number in range(2)]
    process = start_module("backup_set", {"plan": sets.plan(*both, speed=SLOW)["plan"]})

    def held() -> list[str]:
        return [
            str(path)
            for path in process.open_files
            if str(path).startswith(f"{sets.path}/vm0/") and "qcow2" in str(path)
        ]

    wait_until(lambda: all(vm.block_jobs for vm in both) and held(), "the copies")
    succeed("backup_set", {"repository": str(sets.path), "names": ["vm0"], "state": "cancelled"})
    wait_until(lambda: not held(), "the end of the image")
    assert process.running
    succeed("backup_set", {"repository": str(sets.path), "state": "cancelled"})
    process.wait()
