# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real Linux that is stopped by its backup's target, whose space was reserved, and was not there: it goes on."""

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

# How the kernel deals with a volume that lacks space for a moment is another thing each time.
pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.mark.parametrize("while_copying", [True, False])
def test_set_on_a_thin_volume(directory: Path, storage: Storage, while_copying: bool) -> None:
    pool = storage.mount("tmpfs", 128 * MIB)
    with FileSystem(pool.path / "thin", "ext4", 256 * MIB) as volume:
        (directory / "vm").mkdir()
        with Guest(directory / "vm", errors="werror=stop,rerror=report") as guest:
            sets = Sets(volume.path / "repository")
            plan = sets.plan(guest, speed="64K")["plan"]
            succeed("backup_set", {"plan": plan, "state": "started"})
            pool.fill()
            wait_until(lambda: guest.status == "io-error", "the guest's stop")
            pool.clear()
            assert not any(job.get("error") or job["io-status"] != "ok" for job in guest.block_jobs)
            if os.statvfs(volume.path).f_flag & os.ST_RDONLY:
                pytest.skip("its file system was made read-only by the kernel, which is another case")
            if while_copying:
                result = succeed("backup_set", {"plan": plan, "slice": 1})
                [warning] = result["vms"][0]["warnings"]
                assert warning.startswith(f"an I/O error stopped the guest while set {plan['id']} was made, and it was")
                assert guest.block_jobs
            else:
                release(guest)
                # The volume may tell of it at the end.
                run_module("backup_set", {"plan": plan})
            if os.statvfs(volume.path).f_flag & os.ST_RDONLY:
                pytest.skip("its file system was made read-only by the kernel, which is another case")
            assert guest.status == "running"
            rounds = guest.rounds
            wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")
