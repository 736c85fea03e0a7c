# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The harness itself: a test that rests on a full file system or a frozen copy is worth what those are worth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import start_foreign
from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, unlocked
from ansible_collections.vmfleet.backup.tests.harness.modules import (
    NAMES,
    PACKAGE,
    ROOT,
    ModuleProcess,
    module_input,
    run_module,
)
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, faulty, wait_until

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
    start_foreign(vm, target, "j", speed=MIB, auto_dismiss=False)
    target.with_suffix(".partial").touch()
    assert {entry.split()[0] for entry in leftovers(vm, directory)} == {"job", "node", "file"}
    assert not unlocked(target)


def test_unprivileged_qemu_has_no_rights(vms: Vms, target: Path) -> None:
    vm = vms.start(unprivileged=True)
    status = _status(vm.pid)
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


@pytest.mark.parametrize("name", NAMES)
def test_module_in_an_interpreter_of_its_own_does_the_same(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"{PACKAGE}.{name}"],
        input=module_input({}),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        check=False,
    )
    result = run_module(name, {})
    assert done.stderr == ""
    assert {**json.loads(done.stdout), "rc": done.returncode, "warnings": []} == result
    assert "required" in result["msg"]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def test_module_is_a_process_of_its_own(vm: Qemu, directory: Path) -> None:
    with (directory / "ours").open("w") as ours:
        vm.hang()
        process = ModuleProcess("vm_info", {"monitors": [str(vm.monitor)]})
        try:
            wait_until(lambda: int(_status(process.pid)["SigBlk"], 16) == 0, "the module's beginning")
            status = _status(process.pid)
            assert status["PPid"] == str(os.getpid())
            ignored = {number for number in signal.Signals if int(status["SigIgn"], 16) >> (number - 1) & 1}
            assert ignored == {signal.SIGPIPE, signal.SIGXFSZ}
            assert Path(ours.name) not in process.open_files
            assert process.running
        finally:
            process.kill()
            vm.wake()
    assert process.killed
    assert not process.running


def test_module_may_say_more_than_a_pipe_holds(vm: Qemu) -> None:
    monitors = [str(vm.monitor), *(f"/nonexistent/{number:0100}" for number in range(5000))]
    result = run_module("vm_info", {"monitors": monitors})
    assert len(result["vms"]) == len(monitors)
    assert len(json.dumps(result)) > 1 << 20
