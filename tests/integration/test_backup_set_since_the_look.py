# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set: what happens between its look at a VM and the start of the jobs."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import SLOW, start_foreign
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")


def test_job_that_began_after_the_look(
    vms: Vms,
    sets: Sets,
    directory: Path,
    start_module: t.Callable[..., ModuleProcess],
    slow_look: tuple[Path, Path],
) -> None:
    """The look at where a disk has data may take half a minute."""
    vm = vms.start(name="web01")
    plan = sets.plan(vm)["plan"]
    begun, end = slow_look
    call = start_module("backup_set", {"plan": plan})
    wait_until(begun.exists, "the look")
    create(directory / "foreign.qcow2", 64 * MIB)
    start_foreign(vm, directory / "foreign.qcow2", "nightly", speed=SLOW)
    end.touch()
    result = call.result()
    assert "busy: job nightly" in result_of(result, "web01")["error"]
    assert [job["device"] for job in vm.block_jobs] == ["nightly"]
    vm.qmp.execute("block-job-cancel", device="nightly", force=True)
    wait_until(lambda: not vm.block_jobs, "the end of that job")
    sets.back_up(vm, id="s2")
