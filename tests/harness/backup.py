# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Calls of drive_backup, and what they leave behind."""

from __future__ import annotations

import hashlib
import stat
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import identical, qemu_img, sound, unlocked
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import QmpError, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

# Slow enough to look at the job of a 64 MiB disk, and to do something to it, before it ends.
SLOW = 1 << 20


def arguments(vm: Qemu, target: Path | None = None, **options: t.Any) -> dict[str, t.Any]:
    """Arguments of drive_backup, for `drive0` if `options` do not say otherwise."""
    given: dict[str, t.Any] = {"monitor": f"unix:{vm.monitor}"}
    if target:
        given.update(device="drive0", target=str(target))
    return {**given, **options}


def backup(vm: Qemu, target: Path | None = None, **options: t.Any) -> dict[str, t.Any]:
    """Run drive_backup, which has to succeed."""
    return succeed("drive_backup", arguments(vm, target, **options))


def fail_backup(vm: Qemu, target: Path | None = None, **options: t.Any) -> dict[str, t.Any]:
    """Run drive_backup, which has to fail."""
    return fail("drive_backup", arguments(vm, target, **options))


def start_slowly(vm: Qemu, target: Path, **options: t.Any) -> dict[str, t.Any]:
    """Start a backup that runs until the test takes its brake off or ends it."""
    result = backup(vm, target, state="started", speed=str(SLOW), **options)
    assert result["changed"]
    assert vm.job["status"] != "concluded"
    return result


def start_foreign(vm: Qemu, target: Path, job_id: str, **options: t.Any) -> None:
    """Start a job that copies the first disk into an image, behind the collection's back."""
    vm.qmp.execute(
        "drive-backup",
        device="n0",
        target=str(target),
        mode="existing",
        format="qcow2",
        sync="full",
        job_id=job_id,
        **options,
    )


def release(vm: Qemu) -> None:
    """Take the brake off."""
    for job in vm.block_jobs:
        try:
            vm.qmp.execute("block-job-set-speed", device=job["device"], speed=0)
        except QmpError:
            # One that has copied everything meanwhile has no brake any more.
            if any(now["device"] == job["device"] and now["status"] in ("running", "paused") for now in vm.block_jobs):
                raise


def wait_concluded(vm: Qemu) -> dict[str, t.Any]:
    """Wait for the one job there is to end; returns it."""
    wait_until(lambda: vm.job["status"] == "concluded", "the end of the job")
    return vm.job


def sent(result: dict[str, t.Any], command: str) -> list[dict[str, t.Any]]:
    """The arguments of every such command in the audit trail of a result, those inside transactions too."""
    found = []
    # A call that is refused by its options alone has no audit trail.
    for entry in result.get("qmp", []):
        if entry["execute"] == "transaction":
            found += [action["data"] for action in entry["arguments"]["actions"] if action["type"] == command]
        if entry["execute"] == command:
            found.append(entry["arguments"])
    return found


def partial(target: Path) -> Path:
    """The name under which an image grows."""
    return target.with_name(target.name + ".partial")


def receipt(target: Path) -> Path:
    """The receipt beside a target."""
    return target.with_name(target.name + ".receipt.json")


def rebase(image: Path, base: Path) -> Path:
    """Tell an increment what it builds on."""
    qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", image)
    return image


def dirty_bytes(vm: Qemu) -> int:
    """Return how much the bitmap `b0` of the first disk has recorded."""
    return int(vm.bitmaps("n0")["b0"]["count"])


def snapshot(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything about the files below a directory that a call which changes nothing leaves alone."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[str(path)] = (status.st_mode, status.st_ino, status.st_uid, status.st_mtime_ns, content)
    return found


def assert_good(target: Path, copy: Path, fmt: str = "qcow2") -> None:
    """The image stands under its own name only, whole, closed, and with the content of the frozen copy."""
    assert not partial(target).exists()
    assert identical(copy, target, other_format=fmt)
    assert unlocked(target, fmt)
    if fmt == "qcow2":
        assert sound(target)


def assert_absent(target: Path) -> None:
    """No image, no part of one, no receipt and no record."""
    found = [path.name for path in target.parent.iterdir() if path.name.startswith(target.name)]
    assert not found
