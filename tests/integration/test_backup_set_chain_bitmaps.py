# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and chains: which bitmaps a chain goes on with, whatever has become of them."""

from __future__ import annotations

import shutil
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, write
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")


def test_case_38_a_clean_restart_goes_on_with_the_chain(vms: Vms, sets: Sets, directory: Path) -> None:
    raw = vms.disk(1, size=SIZE, format="raw")
    history = History(vms.start(vms.disk(size=SIZE), raw, name="web01"), sets, directory)
    vm = history.vm
    history.back_up("s1")
    for disk in ("drive0", "drive1"):
        vm.write(disk, 0xA1, MIB, 65536)
    # A raw image keeps no bitmap, but while its QEMU lives there is one.
    assert history.back_up("s2") == "incremental"
    assert history.note("s2") == {"drive0": "incremental", "drive1": "incremental"}
    vm.write("drive0", 0xB1, 2 * MIB, 65536)
    vm.write("drive1", 0xB1, 2 * MIB, 65536)
    vm.quit()
    # Written to while the VM is off, by something that knows of bitmaps.
    assert vm.disks[0].path
    write(vm.disks[0].path, "write -P 0xC1 3M 64k")
    vm.restart()
    vm.write("drive0", 0xD1, 4 * MIB, 65536)
    history.back_up("s3")
    assert history.note("s3") == {"drive0": "incremental", "drive1": "full"}
    assert "a disk like this one (raw) keeps none when QEMU ends" in history.reason("s3", "drive1")
    vm.write("drive1", 0xD1, 5 * MIB, 65536)
    assert history.back_up("s4") == "incremental"
    assert history.note("s4")["drive1"] == "incremental"
    history.check()


@pytest.mark.parametrize("stored", [False, True])
def test_case_39_qemu_killed_between_sets(history: History, stored: bool) -> None:
    vm = history.vm
    history.back_up("s1")
    if stored:
        vm.quit()
        vm.restart()
    vm.write("drive0", 0xA1, MIB, 65536)
    vm.io("drive0", "flush")
    vm.kill()
    vm.restart()
    assert history.back_up("s2") == "full"
    assert ("is inconsistent" if stored else "is gone") in history.reason("s2")
    assert history.bitmaps() == history.recorded("s2")
    vm.write("drive0", 0xB1, MIB, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()


def test_case_40_bitmaps_removed_and_disabled_by_hand(history: History) -> None:
    vm = history.vm
    history.back_up("s1")
    vm.qmp.execute("block-dirty-bitmap-remove", node="n0", name=history.bitmaps()["n0"][0])
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "full"
    assert "is gone" in history.reason("s2")
    vm.qmp.execute("block-dirty-bitmap-disable", node="n0", name=history.bitmaps()["n0"][0])
    vm.write("drive0", 0xB1, 2 * MIB, 65536)
    assert history.back_up("s3") == "full"
    assert "is disabled" in history.reason("s3")
    assert history.bitmaps() == history.recorded("s3")
    assert history.back_up("s4") == "incremental"
    history.check()


def test_case_41_bitmaps_of_others_are_left_alone(history: History) -> None:
    vm = history.vm
    others = {"backup-of-somebody": 0, "vmfleet-00000000-0123456789abcdef": 0}
    for name in others:
        vm.qmp.execute("block-dirty-bitmap-add", node="n0", name=name, persistent=True)
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "incremental"
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()
    counts = {name: bitmap["count"] for name, bitmap in vm.bitmaps("n0").items() if name in others}
    assert counts == dict.fromkeys(others, 2 * 65536)
    assert len(vm.bitmaps("n0")) == 3


def test_case_41_two_repositories_for_one_vm(vms: Vms, sets: Sets, directory: Path) -> None:
    vm = vms.start(vms.disk(size=SIZE), name="web01")
    near, far = History(vm, sets, directory), History(vm, Sets(directory / "far"), directory)
    near.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    far.back_up("s1")
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    assert near.back_up("s2") == "incremental"
    vm.write("drive0", 0xA3, 3 * MIB, 65536)
    assert far.back_up("s2") == "incremental"
    # At the same time: the second one is told to wait, and nothing happens to the first.
    overwrite(vm, 0xA4)
    near.freeze("s3")
    plan = sets.start(vm, id="s3", speed=SLOW)
    bitmaps = set(vm.bitmaps("n0"))
    assert "busy: job vmfleet." in far.sets.fail(vm, id="s3")["msg"]
    assert set(vm.bitmaps("n0")) == bitmaps
    vm.write("drive0", 0xA9, 4 * MIB, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert near.note("s3") == {"drive0": "incremental"}
    assert far.back_up("s3") == "incremental"
    assert near.back_up("s4") == "incremental"
    near.check()
    far.check()
    assert near.bitmaps() == near.recorded("s4")
    assert far.bitmaps() == far.recorded("s3")
    # Both records, and not a third.
    assert len(vm.bitmaps("n0")) == 2
    # One repository's end is not the other's.
    untracked = {"repository": str(sets.path), "names": ["web01"], "state": "untracked"}
    assert succeed("backup_set", untracked)["changed"] is True
    assert (near.bitmaps(), far.bitmaps()) == ({}, far.recorded("s3"))


def test_case_45_what_a_dead_run_left_is_removed_by_hand(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xA8, 3 * MIB, 65536)
    shutil.rmtree(sets.path / "web01" / ".s2.staging")
    vm.write("drive0", 0xA3, 4 * MIB, 65536)
    # The dead run's job has the record in its hands when this one looks: any doubt means a full image.
    assert history.back_up("s3") == "full"
    assert "is in use by another operation" in history.reason("s3")
    assert history.bitmaps() == history.recorded("s3")
    vm.write("drive0", 0xA4, 5 * MIB, 65536)
    assert history.back_up("s4") == "incremental"
    history.check()
