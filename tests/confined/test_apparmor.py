# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU in a profile of AppArmor that has no rule for the repository, as libvirt runs it (`make confined`)."""

from __future__ import annotations

import os
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import preflight
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import ADMITTED
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import admission
from ansible_collections.vmfleet.backup.tests.harness.backup import assert_good, backup, fail_backup
from ansible_collections.vmfleet.backup.tests.harness.confined import (
    denials,
    label,
    run_modules_as,
    with_label,
)
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History
from ansible_collections.vmfleet.backup.tests.harness.images import create
from ansible_collections.vmfleet.backup.tests.harness.modules import fail
from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu, QmpError
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean", "_profiles")

PROFILE = "libvirt-4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10"
CONFINED = with_label(f"exec {PROFILE}")
RULES = f"""
# Programs, and what is the VM's own; nothing below /srv.
profile {PROFILE} {{
  capability,
  network,
  unix,
  signal,
  ptrace,
  / r,
  /{{bin,dev,etc,lib,lib64,proc,root,sys,tmp,usr}}/** mrwix,
  /run/{{,**}} mrwkl,
}}

# Everything is allowed in it.
profile backupper {{
  capability,
  network,
  unix,
  signal,
  ptrace,
  mount,
  file,
  change_profile,
}}
"""


@pytest.fixture(scope="module")
def _profiles() -> None:
    parser = Path(os.environ["VMFLEET_CONFINED_TOOLS"]) / "usr/sbin/apparmor_parser"
    command = [parser, "--replace", "--skip-cache", "--quiet"]
    done = subprocess.run(command, input=RULES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def vm(vms: Vms) -> Qemu:
    """A confined VM."""
    vm = vms.start(vms.disk(size=SIZE), name="web01", under=CONFINED)
    assert label(vm.pid) == f"{PROFILE} (enforce)"
    assert label() == "unconfined"
    return vm


def test_sets_are_published_without_a_rule_for_them(vm: Qemu, sets: Sets, place: Path, directory: Path) -> None:
    history = History(vm, sets, directory)
    assert history.back_up("s1") == "full"
    vm.write("drive0", 0xA1, 1 << 20, 65536)
    assert history.back_up("s2") == "incremental"
    assert history.back_up("s3", level="full", compression="zstd") == "full"
    history.check()
    assert not denials(str(place))


def test_qemu_itself_may_not_open_what_it_is_handed(vm: Qemu, target: Path) -> None:
    """So that the other tests tell something."""
    create(target, SIZE)
    with pytest.raises(QmpError, match="Permission denied"):
        vm.qmp.execute(
            "drive-backup", device="drive0", target=str(target), mode="existing", format="qcow2", sync="full"
        )
    assert denials(str(target))


def test_copy_of_a_disk(vm: Qemu, target: Path) -> None:
    backup(vm, target)
    disk = vm.disks[0].path
    assert disk
    assert_good(target, disk)
    assert not denials(str(target))


class TestConfinedProcess:
    REASON = (
        f"this process is confined by AppArmor profile backupper; QEMU, which is confined by {PROFILE}, could not use"
        " the files that it opens; run the backup unconfined"
    )

    def test_plan_says_it(self, vm: Qemu, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
        unconfined = sets.plan(vm)["plan"]
        run_modules_as(monkeypatch, "changeprofile backupper")
        [planned] = sets.plan(vm)["plan"]["vms"]
        assert (planned["action"], planned["reason"]) == ("fail", self.REASON)
        # One that was drawn up elsewhere is of no use either.
        failed = fail("backup_set", {"plan": unconfined})
        assert result_of(failed, "web01")["error"] == self.REASON
        sets.assert_absent("web01")

    def test_drive_backup_refuses_it(self, vm: Qemu, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_modules_as(monkeypatch, "changeprofile backupper")
        assert fail_backup(vm, target)["msg"] == f"target: {self.REASON}"
        assert not list(target.parent.iterdir())

    def test_it_would_be_in_vain(self, vm: Qemu, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel drops the file, and the message says why."""
        monkeypatch.setattr(admission, "admit", lambda *_arguments: ADMITTED)
        run_modules_as(monkeypatch, "changeprofile backupper")
        error = result_of(sets.fail(vm), "web01")["error"]
        assert error.startswith("QEMU did not receive the open file ")
        assert error.endswith(self.REASON)
        assert any('operation="file_receive"' in line for line in denials(str(sets.path)))
        sets.assert_absent("web01")

    def test_same_profile_as_qemu(self, vms: Vms, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a container, where one profile holds both."""
        vm = vms.start(vms.disk(size=SIZE), name="web01", under=with_label("exec backupper"))
        run_modules_as(monkeypatch, "changeprofile backupper")
        assert result_of(sets.back_up(vm), "web01")["state"] == "published"


class TestFormats:
    @pytest.mark.parametrize("image_format", ["vhdx", "parallels"])
    def test_those_that_change_their_length_are_refused(self, image_format: str, vm: Qemu, target: Path) -> None:
        said = fail_backup(vm, target, format=image_format)["msg"]
        assert said.startswith(f"format: {target}: QEMU changes the length of a {image_format} image")
        assert not list(target.parent.iterdir())

    def test_it_would_be_in_vain(self, vm: Qemu, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "keeps_length", lambda *_arguments: "")
        assert "Permission denied" in fail_backup(vm, target, format="vhdx")["msg"]
        assert any('operation="truncate"' in line for line in denials(str(target)))
