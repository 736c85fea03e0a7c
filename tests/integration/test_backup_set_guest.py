# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and a real guest that writes: what a failing repository does to it, and what is done about that."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.guest import Guest, file_system
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
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


@pytest.mark.slow
@pytest.mark.parametrize(("backends", "compression"), [(True, "none"), (False, "zstd")])
def test_disks_with_threads_of_their_own(directory: Path, backends: bool, compression: str) -> None:
    sets = Sets(directory / "repository")
    (directory / "vm").mkdir()
    with Guest(directory / "vm", backends=backends, iothreads=True) as guest:
        threads = guest.qmp.execute("query-iothreads")
        assert len(threads) == 2
        for number, level in enumerate(("full", "incremental", "incremental"), start=1):
            rounds = guest.rounds
            wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")  # noqa: B023
            result = sets.back_up(guest, id=f"s{number}", quiesce="require", compression=compression)
            assert result["vms"][0]["consistency"] == "filesystem"
            assert {disk["level"] for disk in sets.manifest("guest", f"s{number}")["disks"]} == {level}
            assert guest.status == "running"
        # Nobody writes any more: this one has to be what the disks are.
        guest.qmp.execute("stop")
        sets.back_up(guest, id="s4", compression=compression)
        images = sets.images("guest", "s4")
        guest.quit()
        for disk in guest.disks:
            assert disk.path
            assert identical(disk.path, images[disk.path.stem])
    for set_id in ("s1", "s2", "s3", "s4"):
        for image in sets.images("guest", set_id).values():
            file_system(image, directory / "copy.raw").unlink()
