# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup, disturbed: killed at a moment of the test's choice, or with jobs that somebody else cancels."""

from __future__ import annotations

import itertools
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.backup import partial, receipt
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu


def drives_of(vm: Qemu, directory: Path, **options: t.Any) -> list[dict[str, t.Any]]:
    """Ask for all disks of a VM."""
    return [{"device": disk.id, "target": str(directory / f"{disk.id}.qcow2"), **options} for disk in vm.disks]


def kill_when(
    start_module: t.Callable[..., ModuleProcess],
    args: dict[str, t.Any],
    reached: t.Callable[[], object],
    tidy: t.Callable[[], None] = lambda: None,
    first: int = 1,
) -> None:
    """Kill a call right before its first step at which `reached` is true; `tidy` follows each kill before that.

    `first` only saves time: no call has got so far by then.
    """
    for step in itertools.count(first):
        process = start_module("drive_backup", args, crash_at=step)
        process.wait()
        assert process.killed, "this call was never there"
        if reached():
            print("killed at step", step)
            return
        tidy()


def kill_when_copied(start_module: t.Callable[..., ModuleProcess], args: dict[str, t.Any], record: Path) -> None:
    """Kill a call when its image is whole and on stable storage, and has not got its name yet."""
    kill_when(start_module, args, lambda: '"phase": "copied"' in record.read_text(), first=6)


def record_of(target: Path) -> Path:
    """Return the place of the record of a backup that is not finished."""
    return partial(receipt(target))


def cancel_from_outside(vm: Qemu, job_id: str) -> None:
    """Cancel a job as somebody else would, and wait for its end."""
    vm.qmp.execute("block-job-cancel", device=job_id, force=True)
    wait_until(lambda: all(job["status"] == "concluded" for job in vm.block_jobs if job["device"] == job_id), "its end")
