# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What may happen to a record of changes between two sets: an increment that is right, or a full image."""

from __future__ import annotations

import shutil
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.history import History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

SIZE = 8 * MIB


@pytest.fixture
def history(vms: Vms, directory: Path) -> History:
    """A VM of one disk of 8 MiB, `drive0`, node `n0`, with a set `s0` and a write since."""
    found = History(vms.start(vms.disk(size=SIZE), name="web01"), Sets(directory / "repository"), directory)
    found.back_up("s0")
    found.vm.write("drive0", 0xA1, MIB, 65536)
    return found


def image(history: History) -> Path:
    path = history.vm.disks[0].path
    assert path
    return path


def test_another_bitmap_is_merged_into_it(history: History) -> None:
    vm = history.vm
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="other")
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    [name] = history.bitmaps()["n0"]
    vm.qmp.execute("block-dirty-bitmap-merge", node="n0", target=name, bitmaps=["other"])
    assert history.back_up("s1") == "incremental"
    history.check()


def test_a_storage_snapshot_of_a_running_vm_is_rolled_back(history: History, directory: Path) -> None:
    vm = history.vm
    vm.quit()
    vm.restart()
    # From its start on QEMU keeps the bitmap in memory, and says so in the image.
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    vm.io("drive0", "flush")
    shutil.copyfile(image(history), directory / "snapshot")
    vm.write("drive0", 0xA3, 3 * MIB, 65536)
    vm.quit()
    shutil.copyfile(directory / "snapshot", image(history))
    vm.restart()
    assert history.back_up("s1") == "full"
    assert "is inconsistent" in history.reason("s1")
    history.check()


@pytest.mark.parametrize("bitmaps", [True, False], ids=["with bitmaps", "without"])
def test_the_image_is_converted_to_another_file(history: History, directory: Path, bitmaps: bool) -> None:
    vm = history.vm
    vm.quit()
    more = ["--bitmaps"] if bitmaps else []
    qemu_img("convert", "-q", "-f", "qcow2", "-O", "qcow2", *more, image(history), directory / "new.qcow2")
    shutil.move(directory / "new.qcow2", image(history))
    vm.restart()
    vm.write("drive0", 0xA2, 2 * MIB, 65536)
    assert history.back_up("s1") == ("incremental" if bitmaps else "full")
    history.check()


def test_migrated_to_another_qemu(history: History, vms: Vms) -> None:
    source = history.vm
    other = vms.start(*source.disks, name="web01", extra=["-incoming", "defer"])
    place = f"unix:{other.directory / 'migration'}"
    other.qmp.execute("migrate-incoming", uri=place)
    source.qmp.execute("migrate", uri=place)
    wait_until(lambda: source.qmp.execute("query-migrate").get("status") == "completed", "the migration")
    wait_until(lambda: other.status == "running", "the VM on the other side")
    history.vm = other
    other.write("drive0", 0xA2, 2 * MIB, 65536)
    assert history.back_up("s1") == "incremental"
    history.check()
