# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What somebody has open without a lock is never replaced: QEMU's image locks are not the only sign of use."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import arguments, snapshot
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, unlocked
from ansible_collections.vmfleet.backup.tests.harness.modules import fail
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.library import Chain
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def without_locks(vms: Vms, path: Path, fmt: str, driver: str = "file") -> Qemu:
    """A VM that has this disk, and takes no locks on it."""
    file = {"driver": driver, "filename": str(path), "locking": "off"}
    vm = vms.start(Disk(path, id="drive0", node="n0", format=fmt, file=file), name="other")
    assert unlocked(path, fmt)
    return vm


def user(vm: Qemu) -> str:
    """What a message calls a QEMU: the kernel has room for 15 characters."""
    return f"qemu-system-x86 (process {vm.pid})"


def refused(before: object, directory: Path, said: str, path: Path, by: str) -> None:
    """The message names who uses it, and nothing has changed."""
    assert said == f"target: {path} is in use by {by}; end that first"
    assert snapshot(directory) == before


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_restore(chain: Chain, vms: Vms, where: Path, fmt: str) -> None:
    target = create(where / "disk", 8 * MIB, fmt)
    vm = without_locks(vms, target, fmt)
    before = snapshot(where)
    given = {"disks": one_disk(target, format=fmt), "overwrite": True}
    said = chain.library.fail_restore(**given)
    refused(before, where, said, target, user(vm))
    # Before a word of it can mislead, the check mode says so too.
    assert chain.library.fail_restore(check=True, **given) == said
    vm.quit()
    assert chain.library.restore(**given)["changed"]


def test_restore_to_a_block_device(chain: Chain, vms: Vms, storage: Storage) -> None:
    device = storage.loop(8 * MIB)
    vm = without_locks(vms, device, "raw", "host_device")
    said = chain.library.fail_restore(disks=one_disk(device), overwrite=True)
    assert said == f"target: {device} is in use by {user(vm)}; end that first"


def test_restore_to_what_a_loop_device_stands_on(chain: Chain, storage: Storage, directory: Path) -> None:
    device = storage.loop(8 * MIB, "stick.img")
    path = directory / "stick.img"
    before = snapshot(directory)
    said = chain.library.fail_restore(disks=one_disk(path), overwrite=True)
    refused(before, directory, said, path, f"loop device {device.name}")


def test_overlays_are_not_removed(chain: Chain, vms: Vms, where: Path) -> None:
    given = {"disks": one_disk(where / "disk"), "method": "overlay"}
    chain.library.restore(**given)
    vm = without_locks(vms, where / "disk", "qcow2")
    before = snapshot(where)
    said = chain.library.fail_restore(**given, state="absent")
    refused(before, where, said, where / "disk", user(vm))


@pytest.mark.parametrize("options", [{"overwrite": True}, {"mode": "existing", "overwrite": True}])
def test_drive_backup(vms: Vms, vm: Qemu, where: Path, options: dict[str, t.Any]) -> None:
    target = create(where / "disk")
    other = without_locks(vms, target, "qcow2")
    before = snapshot(where)
    said = fail("drive_backup", arguments(vm, target, **options))["msg"]
    refused(before, where, said, target, user(other))
