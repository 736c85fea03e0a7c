# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and a real guest that writes: what a failing repository does to it, and what is done about that."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.guest import Guest
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess


@pytest.mark.slow
def test_case_22_a_guest_stopped_by_a_full_repository_goes_on(
    directory: Path, storage: Storage, start_module: t.Callable[..., ModuleProcess]
) -> None:
    # ext2 cannot reserve: the guest's write fails with the copy of what was there before, and QEMU stops the guest.
    repository = storage.mount("ext2", 256 * MIB)
    sets = Sets(repository.path / "repository")
    (directory / "vm").mkdir()
    with Guest(directory / "vm") as guest:
        plan = sets.plan(guest, speed="64K")["plan"]
        process = start_module("backup_set", {"plan": plan})
        wait_until(lambda: len(guest.block_jobs) == 2, "the start of the jobs")
        repository.fill()
        result = process.result()
        assert result["vms"][0]["state"] == "failed", result
        assert guest.status == "running"
        assert guest.block_jobs == []
        sets.assert_absent(guest.monitor.stem)
        rounds = guest.rounds
        wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")
        repository.clear()
        sets.back_up(guest)
