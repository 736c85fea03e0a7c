# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real Linux stopped by a target of drive_backup, whose space was reserved, and was not there: it goes on."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

# How the kernel deals with a volume that lacks space for a moment is another thing each time.
pytestmark = [pytest.mark.slow, pytest.mark.thorough]


def test_drive_on_a_thin_volume(directory: Path, storage: Storage) -> None:
    pool = storage.mount("tmpfs", 128 * MIB)
    with FileSystem(pool.path / "thin", "ext4", 256 * MIB) as volume:
        (directory / "vm").mkdir()
        with Guest(directory / "vm", errors="werror=stop,rerror=report") as guest:
            disk = succeed("vm_info", {"monitors": [str(guest.monitor)]})["vms"][0]["disks"][0]["node"]
            call = {"monitor": str(guest.monitor), "device": disk, "target": str(volume.path / "disk.qcow2")}
            started = succeed("drive_backup", {**call, "speed": "64K", "state": "started"})
            assert not any("reserve" in warning for warning in started.get("warnings", []))
            pool.fill()
            wait_until(lambda: guest.status == "io-error", "the guest's stop")
            pool.clear()
            assert not any(job.get("error") or job["io-status"] != "ok" for job in guest.block_jobs)
            # It is cancelled: the guest comes first.
            print(run_module("drive_backup", call).get("msg"))
            assert guest.status == "running"
            rounds = guest.rounds
            wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")
