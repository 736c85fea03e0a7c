# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU in svirt_t of SELinux, under the policy beside this file (`make confined`)."""

from __future__ import annotations

import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import preflight
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import ADMITTED, file_label
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import admission
from ansible_collections.vmfleet.backup.tests.harness.backup import (
    arguments,
    assert_good,
    backup,
    fail_backup,
    release,
    start_slowly,
)
from ansible_collections.vmfleet.backup.tests.harness.confined import (
    denials,
    label,
    label_file,
    mount_with_label,
    run_modules_as,
    with_label,
)
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History
from ansible_collections.vmfleet.backup.tests.harness.images import create
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")

QEMU = "system_u:system_r:svirt_t:s0:c1,c2"
OURS = "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c3"
VAR = "system_u:object_r:var_t:s0"
NFS = "system_u:object_r:nfs_t:s0"
IMAGE = "system_u:object_r:svirt_image_t:s0"
OWN_IMAGE = f"{IMAGE}:c1,c2"
OTHERS_IMAGE = f"{IMAGE}:c3"
ENFORCE = Path("/sys/fs/selinux/enforce")


@pytest.fixture(autouse=True)
def _place(place: Path) -> None:
    label_file(place, VAR)


@pytest.fixture
def vm(vms: Vms) -> Qemu:
    """A confined VM, whose disk has its label."""
    disk = vms.disk(size=SIZE)
    assert disk.path
    label_file(disk.path, OWN_IMAGE)
    vm = vms.start(disk, name="web01", under=with_label(QEMU))
    assert (label(vm.pid), label(), ENFORCE.read_text()) == (QEMU, OURS, "1")
    return vm


def labels(directory: Path) -> set[str]:
    """The labels of a directory and of all that it holds."""
    return {file_label(str(path)) for path in (directory, *directory.rglob("*"))}


def lines(place: Path) -> str:
    return f"`semanage fcontext -a -t svirt_image_t '{place}(/.*)?'`, then `restorecon -R {place}`"


def refused(sets: Sets, vm: Qemu, **options: t.Any) -> str:
    """Return why a plan refuses the VM; nothing is begun then."""
    [planned] = sets.plan(vm, **options)["plan"]["vms"]
    assert planned["action"] == "fail"
    error = result_of(sets.fail(vm, **options), "web01")["error"]
    assert error == planned["reason"]
    sets.assert_absent("web01")
    return str(error)


class TestLabels:
    def test_sets_are_published_and_have_the_labels_of_their_directory(
        self, vm: Qemu, sets: Sets, directory: Path
    ) -> None:
        history = History(vm, sets, directory)
        assert history.back_up("s1") == "full"
        vm.write("drive0", 0xA1, 1 << 20, 65536)
        assert history.back_up("s2") == "incremental"
        assert history.back_up("s3", level="full", compression="zstd") == "full"
        history.check()
        assert labels(sets.path) == {VAR}
        assert not denials("svirt_t")

    @pytest.mark.parametrize("killed", [False, True])
    def test_another_process_gives_them_back(
        self, killed: bool, vm: Qemu, sets: Sets, directory: Path, start_module: t.Callable[..., t.Any]
    ) -> None:
        history = History(vm, sets, directory)
        history.freeze("s1")
        if killed:
            plan = sets.plan(vm, speed="1M")["plan"]
            process = start_module("backup_set", {"plan": plan})
            wait_until(lambda: bool(vm.block_jobs), "a job")
            process.kill()
        else:
            plan = sets.start(vm)
        [growing] = (sets.path / "web01").glob(".*/*.qcow2")
        assert file_label(str(growing)) == OWN_IMAGE
        release(vm)
        assert result_of(succeed("backup_set", {"plan": plan}), "web01")["state"] == "published"
        history.note("s1")
        history.check()
        assert labels(sets.path) == {VAR}

    def test_label_of_another_vm(self, vm: Qemu, sets: Sets, place: Path) -> None:
        """Nobody but this VM's QEMU is to write to its images, and it to no other's."""
        label_file(place, OTHERS_IMAGE)
        sets.back_up(vm)
        assert labels(sets.path) == {OTHERS_IMAGE}

    @pytest.mark.parametrize("context", [IMAGE, NFS])
    def test_nothing_is_labelled_where_qemu_may_write(
        self, context: str, vm: Qemu, sets: Sets, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        label_file(place, context)
        # It could not be.
        run_modules_as(monkeypatch, OURS.replace("unconfined_t", "unlabelling_t"))
        sets.back_up(vm)
        assert labels(sets.path) == {context}

    def test_nothing_is_labelled_where_nothing_is_enforced(self, vm: Qemu, sets: Sets) -> None:
        ENFORCE.write_text("0")
        try:
            plan = sets.start(vm)
            [growing] = (sets.path / "web01").glob(".*/*.qcow2")
            assert file_label(str(growing)) == VAR
            release(vm)
            succeed("backup_set", {"plan": plan})
        finally:
            ENFORCE.write_text("1")

    def test_failed_set(self, vm: Qemu, sets: Sets) -> None:
        sets.start(vm)
        succeed("backup_set", {"repository": str(sets.path), "state": "cancelled"})
        sets.assert_absent("web01")
        assert labels(sets.path) == {VAR}


class TestRefusals:
    def test_labels_are_not_to_be_changed(self, vm: Qemu, sets: Sets) -> None:
        said = refused(sets, vm, selinux_label=False)
        assert QEMU in said
        assert VAR in said
        assert said.endswith(lines(sets.path))

    def test_labels_cannot_be_changed(self, vm: Qemu, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
        run_modules_as(monkeypatch, OURS.replace("unconfined_t", "unlabelling_t"))
        assert refused(sets, vm).endswith(lines(sets.path))

    def test_files_of_this_process_must_not_be_used(
        self, vm: Qemu, sets: Sets, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_modules_as(monkeypatch, OURS.replace("unconfined_t", "stranger_t"))
        said = refused(sets, vm)
        assert "(allow svirt_t stranger_t (fd (use)))" in said

    @pytest.mark.parametrize(("context", "taken"), [(VAR, False), (NFS, True), (IMAGE, True)])
    def test_file_system_that_is_mounted_with_a_label(
        self, context: str, taken: bool, vm: Qemu, sets: Sets, place: Path
    ) -> None:
        mount_with_label(place, context)
        try:
            if taken:
                sets.back_up(vm)
                assert labels(sets.path) == {context}
            else:
                assert refused(sets, vm).endswith(f'mount it with `context="{IMAGE}"`')
        finally:
            subprocess.run(["umount", place], check=True)

    def test_they_are_not_in_vain(self, vm: Qemu, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel drops the file, and the message says why."""
        monkeypatch.setattr(admission, "admit", lambda *_arguments: ADMITTED)
        error = result_of(sets.fail(vm), "web01")["error"]
        assert error.startswith(f"QEMU did not receive the open file {sets.path}/web01/")
        assert QEMU in error
        assert VAR in error
        assert error.endswith(lines(sets.path))
        sets.assert_absent("web01")


class TestDriveBackup:
    def test_new_image(self, vm: Qemu, target: Path) -> None:
        start_slowly(vm, target)
        assert file_label(f"{target}.partial") == OWN_IMAGE
        release(vm)
        backup(vm, target)
        self.good(vm, target)

    def good(self, vm: Qemu, target: Path) -> None:
        disk = vm.disks[0].path
        assert disk
        assert_good(target, disk)
        assert labels(target.parent) == {VAR}

    def test_image_that_is_there(self, vm: Qemu, target: Path) -> None:
        create(target, SIZE)
        start_slowly(vm, target, mode="existing")
        assert file_label(str(target)) == OWN_IMAGE
        release(vm)
        backup(vm, target, mode="existing")
        self.good(vm, target)

    def test_image_that_is_there_and_comes_to_nothing(self, vm: Qemu, target: Path) -> None:
        create(target, SIZE)
        start_slowly(vm, target, mode="existing")
        succeed("drive_backup", arguments(vm, target, mode="existing", state="cancelled"))
        assert labels(target.parent) == {VAR}

    @pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
    def test_labels_are_not_to_be_changed(self, mode: str, vm: Qemu, target: Path) -> None:
        if mode == "existing":
            create(target, SIZE)
        before = labels(target.parent)
        said = fail_backup(vm, target, mode=mode, selinux_label=False)["msg"]
        assert said.startswith("target: SELinux does not let QEMU")
        assert said.endswith(lines(target.parent))
        assert labels(target.parent) == before

    @pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
    def test_labels_cannot_be_changed(self, mode: str, vm: Qemu, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if mode == "existing":
            create(target, SIZE)
        run_modules_as(monkeypatch, OURS.replace("unconfined_t", "unlabelling_t"))
        assert fail_backup(vm, target, mode=mode)["msg"].endswith(lines(target.parent))

    def test_device(self, vm: Qemu, storage: Storage) -> None:
        device = storage.loop(SIZE)
        label_file(device, "system_u:object_r:fixed_disk_device_t:s0")
        said = fail_backup(vm, device, mode="existing", format="raw", overwrite=True)["msg"]
        assert said.endswith(f"`chcon -t svirt_image_t {device}` before")

    def test_they_are_not_in_vain(self, vm: Qemu, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "admit", lambda *_arguments: ADMITTED)
        said = fail_backup(vm, target)["msg"]
        assert said.startswith(f"QEMU did not receive the open file {target}.partial")
        assert said.endswith(lines(target.parent))
        assert not list(target.parent.iterdir())


def test_label_that_is_taken_back_too_early_ends_the_job(vm: Qemu, target: Path) -> None:
    """Why it is given back after the job has ended, and never before."""
    start_slowly(vm, target)
    label_file(Path(f"{target}.partial"), VAR)
    release(vm)
    assert "Permission denied" in fail_backup(vm, target)["msg"]
