# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The harness itself: a test that rests on a full file system or a frozen copy is worth what those are worth."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, unlocked
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, faulty

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "ext2"])
def test_full_is_full_until_cleared(storage: Storage, kind: str) -> None:
    mount = storage.mount(kind, 32 * MIB)
    mount.fill()
    with pytest.raises(OSError, match="No space left"):
        (mount.path / "more").write_bytes(b"x" * 65536)
    mount.clear()
    (mount.path / "more").write_bytes(b"x" * 65536)
    mount.fill(leave=4 * MIB)
    assert 3 * MIB < mount.free <= 4 * MIB


def test_tmpfs_grows(storage: Storage) -> None:
    mount = storage.mount("tmpfs", MIB)
    mount.fill()
    mount.grow(2 * MIB)
    assert mount.free == MIB


def test_read_only_mount_refuses_files(storage: Storage) -> None:
    mount = storage.mount("tmpfs", MIB)
    mount.make_read_only()
    with pytest.raises(OSError, match="Read-only"):
        (mount.path / "file").touch()


def test_frozen_copy_holds_the_writes_made_before_and_only_those(vm: Qemu, directory: Path) -> None:
    vm.write("drive0", 0x33, 0, MIB)
    first = vm.freeze(vm.disks[0], directory / "first.qcow2")
    vm.write("drive0", 0x44, 0, 65536)
    second = vm.freeze(vm.disks[0], directory / "second.qcow2")
    assert not identical(first, second)
    vm.quit()
    assert vm.disks[0].path
    assert identical(second, vm.disks[0].path)


def test_failed_guest_write_is_seen(vms: Vms, directory: Path) -> None:
    image = create(directory / "bad.qcow2")
    vm = vms.start(Disk(image, file=faulty(image, "write_aio")))
    with pytest.raises(AssertionError, match="Input/output error"):
        vm.write("drive0", 0x11, 0, 65536)


def test_leftovers_are_found(vm: Qemu, directory: Path, target: Path) -> None:
    size = info(create(target))["virtual-size"]
    assert size == 64 * MIB
    assert not leftovers(vm, directory)
    vm.qmp.execute(
        "drive-backup",
        device="n0",
        target=str(target),
        mode="existing",
        format="qcow2",
        sync="full",
        job_id="j",
        speed=MIB,
        auto_dismiss=False,
    )
    target.with_suffix(".partial").touch()
    assert {entry.split()[0] for entry in leftovers(vm, directory)} == {"job", "node", "file"}
    assert not unlocked(target)


def test_unprivileged_qemu_has_no_rights(vms: Vms, target: Path) -> None:
    vm = vms.start(unprivileged=True)
    lines = Path(f"/proc/{vm.pid}/status").read_text(encoding="ascii").splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert status["Uid"].split()[0] != str(os.geteuid())
    assert int(status["CapEff"], 16) == 0
    with pytest.raises(Exception, match="Permission denied"):
        vm.qmp.execute("drive-backup", device="n0", target=str(target), sync="full", job_id="j")


def test_restart_keeps_disks(vm: Qemu) -> None:
    vm.write("drive0", 0x55, 0, 65536)
    vm.quit()
    vm.restart()
    assert "verification failed" not in vm.io("drive0", "read -P 0x55 0 64k")
    vm.kill()
    vm.restart()
    assert vm.status == "running"
