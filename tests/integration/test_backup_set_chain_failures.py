# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and chains: an increment that fails or is cancelled loses nothing."""

from __future__ import annotations

import json
import shutil
import typing as t
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import faulty, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms

pytestmark = pytest.mark.usefixtures("clean")


def test_case_26_a_cancelled_increment_loses_nothing(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    plan = sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xA8, 3 * MIB, 65536)
    vm.qmp.execute("block-job-cancel", device=vm.job["device"])
    assert "cancelled from outside" in fail("backup_set", {"plan": plan})["msg"]
    assert history.bitmaps() == history.recorded("s1")
    # Once more, cancelled in order, and under another id.
    sets.start(vm, id="s3", speed=SLOW)
    vm.write("drive0", 0xA3, 4 * MIB, 65536)
    cancel = {"repository": str(sets.path), "names": ["web01"], "state": "cancelled"}
    assert succeed("backup_set", cancel)["vms"][0]["state"] == "cancelled"
    assert history.bitmaps() == history.recorded("s1")
    assert history.back_up("s2") == "incremental"
    assert history.reason("s2") == "changes since set s1"
    sets.back_up(vm, id="s3")
    assert history.bitmaps() == history.recorded("s3")


def test_case_21_one_disk_fails_and_neither_advances(vms: Vms, sets: Sets, directory: Path) -> None:
    one, other = vms.disk(0, size=SIZE), vms.disk(1, size=SIZE)
    history = History(vms.start(one, other, name="web01"), sets, directory)
    history.back_up("s1")
    before = history.bitmaps()
    for disk in ("drive0", "drive1"):
        overwrite(history.vm, 0xA1, disk)
    history.vm.quit()
    assert other.path
    # What is in the first changed cluster of drive1 cannot be read.
    place = json.loads(qemu_img("map", "--output=json", other.path))[0]["offset"]
    vm = history.reopen(vms, one, replace(other, file=faulty(other.path, "read_aio", sector=place // 512)))
    failed = sets.fail(vm, id="s2", speed="1M")
    assert "disk drive1: Input/output error" in failed["msg"]
    assert "block-job-cancel" in [command["execute"] for command in failed["qmp"]]
    assert sorted(path.name for path in sets.directory("web01").iterdir()) == [".lock", ".s2.failed.json", "s1"]
    assert vm.block_jobs == []
    assert history.bitmaps() == before
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    vm = history.reopen(vms, one, other)
    vm.write("drive1", 0xA3, 3 * MIB, 65536)
    history.back_up("s2")
    assert history.note("s2") == {"drive0": "incremental", "drive1": "incremental"}
    history.check()


def test_case_21_a_disk_that_was_through_loses_nothing_either(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name="web01"), sets, directory)
    vm = history.vm
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    overwrite(vm, 0xA1, "drive1")
    plan = sets.start(vm, id="s2", speed=SLOW)

    def running() -> list[str]:
        return [job["device"] for job in vm.block_jobs if job["status"] != "concluded"]

    [last] = wait_until(lambda: running() if len(running()) == 1 else [], "the end of the shorter copy")
    vm.qmp.execute("block-job-cancel", device=last)
    assert "cancelled from outside" in fail("backup_set", {"plan": plan})["msg"]
    history.back_up("s2")
    assert history.note("s2") == {"drive0": "incremental", "drive1": "incremental"}
    history.check()


def test_an_image_that_is_replaced_while_it_is_copied(history: History, sets: Sets) -> None:
    history.back_up("s1")
    overwrite(history.vm, 0xA1)
    plan = sets.start(history.vm, id="s2", speed=SLOW)
    image = sets.path / "web01" / ".s2.staging" / "drive0.qcow2"
    shutil.copyfile(image, image.with_name("copy"))
    image.with_name("copy").rename(image)
    release(history.vm)
    assert "is not the file that the backup was started with" in fail("backup_set", {"plan": plan})["msg"]
    assert history.back_up("s2") == "incremental"
    history.check()


def test_case_18_a_full_repository_fails_the_increment_only(
    vms: Vms, sets: Sets, directory: Path, storage: Storage
) -> None:
    small = storage.mount("tmpfs", 10 * MIB)
    sets = Sets(small.path / "repository")
    history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
    history.back_up("s1")
    for at in range(4):
        history.vm.write("drive0", 0xA1, at * 2 * MIB, MIB + 65536)
    small.fill(leave=2 * MIB)
    assert "not enough space" in sets.fail(history.vm, id="s2")["msg"]
    assert history.bitmaps() == history.recorded("s1")
    small.clear()
    history.vm.write("drive0", 0xA2, MIB + 65536, 65536)
    assert run_module("backup_plan", sets.arguments(history.vm, id="s2"))["plan"]["vms"][0]["action"] == "fail"
    small.grow(64 * MIB)
    assert history.back_up("s2") == "incremental"
    history.check()
