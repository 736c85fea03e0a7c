# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What file systems refuse: it is told with the file and the VM, the first fault first, and what can go on does."""

from __future__ import annotations

import subprocess
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Library
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms


def test_a_whole_life_without_permissions(vms: Vms, storage: Storage, directory: Path) -> None:
    mount = storage.without_permissions()
    library = Library(mount / "repository")
    disks = [vms.disk(number, size=8 * MIB) for number in range(2)]
    vm = vms.start(*disks, name=NAME)
    warnings = set()
    for number in range(1, 4):
        vm.write("drive0", number, number * MIB, 65536)
        warnings.update(library.back_up(vm, id=f"s{number}")["warnings"])
    copies = {f"drive{number}": vm.freeze(disk, directory / f"copy{number}") for number, disk in enumerate(disks)}
    assert set(library.levels(NAME, "s3").values()) == {"incremental"}
    repository = str(library.path)
    (mount / "disks").mkdir()
    done = [
        succeed("backup_verify", {"repository": repository, "depth": "image"}),
        library.restore(directory=str(mount / "disks")),
        library.restore(directory=str(mount / "disks"), id="s1", overwrite=True),
        library.restore(directory=str(mount / "disks"), overwrite=True),
        library.prune(keep_last=1, consolidate=True),
        succeed("backup_metrics", {"repository": repository, "id": "s3", "results": [], "directory": str(mount)}),
    ]
    for disk, copy in copies.items():
        assert identical(copy, mount / "disks" / f"{disk}.qcow2")
        assert identical(copy, library.images(NAME, "s3")[disk])
    assert library.listed() == ["s3"]
    # Ansible shows a text once: there is one for all of the run.
    for result in done:
        warnings.update(result["warnings"])
    # In a container, nobody can say that no process outside of it has a disk open that is overwritten.
    blind = {warning for warning in warnings if "cannot see here whether a process" in warning}
    assert {warning.split(": ")[0] for warning in blind} <= {str(mount / "disks" / f"{disk}.qcow2") for disk in copies}
    [warning] = warnings - blind
    assert warning.startswith(f"{mount}: its file system does not keep permissions (Operation not permitted)")
    target = mount / "copy.qcow2"
    for overwrite in (False, True):
        arguments = {"monitor": str(vm.monitor), "device": "drive0", "target": str(target), "overwrite": overwrite}
        succeed("drive_backup", arguments)
    assert identical(copies["drive0"], target)


def test_the_first_error_is_told_before_the_failure_to_note_it(vms: Vms, directory: Path) -> None:
    library = Library(directory / "repository")
    vm = vms.start(vms.disk(0, size=16 * MIB), name=NAME)
    plan = library.start(vm)
    vms_directory = library.path / NAME
    subprocess.run(["chattr", "+i", vms_directory], check=True)
    try:
        vm.qmp.execute("block-job-cancel", device=vm.job["device"], force=True)
        wait_until(lambda: not any(job["status"] == "running" for job in vm.block_jobs), "the end of the job")
        said = fail("backup_set", {"plan": plan})["msg"]
    finally:
        subprocess.run(["chattr", "-i", vms_directory], check=True)
    first, second = said.split("; and then: ")
    assert NAME in first
    assert "cancel" in first.lower()
    assert str(vms_directory / ".s1.failed.json") in second
    assert "Operation not permitted while it was written" in second
    # What it could not do, the next run does.
    library.back_up(vm)
    library.assert_tidy(NAME)


def test_a_full_file_system_for_metrics(vms: Vms, storage: Storage, directory: Path) -> None:
    library = Library(directory / "repository")
    library.back_up(vms.start(vms.disk(0, size=8 * MIB), name=NAME))
    mount = storage.mount("tmpfs", MIB)
    mount.path.chmod(0o755)
    mount.fill()
    arguments = {"repository": str(library.path), "id": "s1", "results": [], "directory": str(mount.path)}
    said = fail("backup_metrics", arguments)["msg"]
    assert str(mount.path) in said
    assert "No space left on device while it was written" in said


def test_a_full_file_system_for_a_repository(vms: Vms, storage: Storage) -> None:
    mount = storage.mount("tmpfs", 32 * MIB)
    library = Library(mount.path / "repository")
    vm = vms.start(vms.disk(0, size=8 * MIB), name=NAME)
    library.back_up(vm)
    plan = library.plan(vm, id="s2")["plan"]
    mount.fill()
    said = fail("backup_set", {"plan": plan})["msg"]
    assert NAME in said
    assert f"{library.path}" in said
    assert "No space left on device" in said
