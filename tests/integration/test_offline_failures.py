# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs that are off: whatever is killed, started or in the way, the next set is right, and the VM can be started."""

from __future__ import annotations

import os
import shutil
import signal
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import storage_daemon
from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.offline import NAME, OffHistory
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


def finish(off: OffHistory, plan: dict[str, t.Any]) -> None:
    """Bring a set to its end that was started."""
    [vm] = succeed("backup_set", {"plan": plan})["vms"]
    assert vm["state"] == "published", vm
    off.note(str(plan["id"]))


def test_a_vm_cannot_be_started_while_it_is_copied_and_can_be_after(off: OffHistory) -> None:
    off.make("s1")
    off.write(0xA1, MIB, 65536)
    plan = off.start("s2", level="full")
    off.assert_held()
    off.assert_held()
    off.daemon.release()
    finish(off, plan)
    off.assert_released("s2")
    off.vm.start()
    off.write(0xA2, 2 * MIB, 65536)
    assert off.make("s3")["level"] == "incremental"
    off.check()


def test_a_module_that_is_killed_does_not_end_the_copy(
    off: OffHistory, start_module: t.Callable[..., ModuleProcess]
) -> None:
    off.freeze("s1")
    plan = off.plan("s1", speed="64K")
    process = start_module("backup_set", {"plan": plan})
    wait_until(lambda: off.copying, "the copy")
    process.kill()
    pid = off.daemon.pid
    off.daemon.release()
    off.daemon.wait_copied()
    assert off.daemon.pid == pid
    # Nobody has looked after it since, and the next run picks it up.
    assert off.plan("s1")["vms"][0]["action"] == "attach"
    finish(off, off.plan("s1"))
    off.assert_released("s1")
    off.check()


def test_the_vm_is_free_before_the_images_are_read(
    off: OffHistory, start_module: t.Callable[..., ModuleProcess]
) -> None:
    off.freeze("s1")
    process = start_module("backup_set", {"plan": off.plan("s1")}, crash_at=crash.Point("flush: fsync"))
    process.wait()
    assert process.killed
    off.daemon.assert_gone()
    off.vm.start()
    off.write(0xA1, MIB, 65536)
    # The set holds what was there before that, and the bitmaps what has come after.
    finish(off, off.plan("s1"))
    assert off.make("s2")["level"] == "incremental"
    off.check()


def test_a_storage_daemon_that_is_killed_costs_the_set_and_no_bitmap(off: OffHistory) -> None:
    off.make("s1")
    overwrite_off(off)
    plan = off.start("s2")
    off.daemon.kill()
    failed = fail("backup_set", {"plan": plan})
    assert "QEMU ended, or was restarted, while the set was made" in failed["vms"][0]["error"]
    off.assert_released("s1")
    assert not (off.sets.path / NAME / "s2").exists()
    assert off.make("s2")["level"] == "incremental"
    off.check()


def overwrite_off(off: OffHistory) -> None:
    """Change half of a disk."""
    for at in range(4):
        off.write(0x60 + at, 2 * at * MIB, MIB)


def test_the_vm_is_on_when_the_storage_daemon_has_died(off: OffHistory) -> None:
    off.make("s1")
    overwrite_off(off)
    off.start("s2")
    off.daemon.kill()
    off.vm.start()
    off.write(0xA1, MIB, 65536)
    made = off.make("s2")
    assert made["level"] == "incremental"
    off.daemon.assert_gone()
    off.check()


def test_the_machine_was_booted_again(off: OffHistory) -> None:
    off.make("s1")
    overwrite_off(off)
    plan = off.start("s2")
    # Nothing of /run is there any more, and its processes are gone.
    off.daemon.kill()
    shutil.rmtree(off.daemon.place)
    intent = off.sets.path / NAME / ".s2.staging" / "intent.json"
    text = intent.read_text()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    intent.write_text(text.replace(boot, "00000000-0000-4000-8000-000000000000"))
    fail("backup_set", {"plan": plan})
    off.assert_released("s1")
    assert off.make("s2")["level"] == "incremental"
    off.check()


def test_a_deadline_ends_it(off: OffHistory) -> None:
    off.make("s1")
    overwrite_off(off)
    off.freeze("s2")
    result = fail("backup_set", {"plan": off.plan("s2", speed="64K"), "offline_timeout": "2"})
    assert "not done within the timeout of 2 s" in result["vms"][0]["error"]
    off.assert_released("s1")
    assert off.make("s2")["level"] == "incremental"
    off.check()


def test_it_ends_by_itself_where_nobody_looks_after_it(off: OffHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "GRACE", 0.0)
    off.make("s1")
    overwrite_off(off)
    plan = off.plan("s2", speed="64K")
    succeed("backup_set", {"plan": plan, "state": "started", "offline_timeout": "3"})
    wait_until(lambda: not off.daemon.alive, "the end of the storage daemon")
    off.vm.start()
    off.write(0xA1, MIB, 65536)
    assert off.make("s2")["level"] == "incremental"
    off.daemon.assert_gone()
    off.check()


def test_in_use_by_a_vm_with_its_monitor_elsewhere(off: OffHistory) -> None:
    off.vm.start()
    off.entry["monitor"] += ".gone"
    [vm] = off.plan("s1")["vms"]
    assert vm["action"] == "fail"
    assert f"is in use by qemu-system-x86 (process {off.vm.pid})" in vm["reason"]


def test_in_use_by_a_program_without_locks(off: OffHistory) -> None:
    plan = off.plan("s1")
    with (off.vm.disks[1].path or Path()).open("rb"):
        result = fail("backup_set", {"plan": plan})
    assert f"(process {os.getpid()}); end that first" in result["vms"][0]["error"]
    off.assert_released()
    assert off.make("s2")["level"] == "full"


def test_the_vm_is_started_after_the_plan(off: OffHistory) -> None:
    off.make("s1")
    off.write(0xA1, MIB, 65536)
    plan = off.plan("s2")
    off.vm.start()
    off.write(0xA2, 3 * MIB, 65536)
    off.freeze("s2")
    finish(off, plan)
    assert off.sets.levels(NAME, "s2")["drive0"] == "incremental"
    off.check()


def test_the_vm_is_ended_after_the_plan(off: OffHistory) -> None:
    off.vm.start()
    plan = off.plan("s1")
    off.vm.quit()
    off.freeze("s1")
    finish(off, plan)
    off.assert_released("s1")
    off.check()


def test_a_storage_daemon_that_nobody_needs_is_ended(off: OffHistory) -> None:
    """That of a set whose intent is gone."""
    off.start("s1")
    shutil.rmtree(off.sets.path / NAME / ".s1.staging")
    assert off.make("s2")["level"] == "full"
    off.assert_released("s2")
    off.check()


@pytest.mark.thorough
def test_two_repositories(off: OffHistory, directory: Path) -> None:
    """One after the other: whoever comes second while the first copies is told so."""
    plan = off.start("s1")
    other = OffHistory(off.vm, Sets(directory / "other"), directory)
    [vm] = other.plan("s1")["vms"]
    assert "is in use by qemu-storage-da (process" in vm["reason"]
    off.daemon.release()
    finish(off, plan)
    other.freeze("s1")
    finish(other, other.plan("s1"))
    other.daemon.assert_gone()
    off.check()
    other.check()
    # Each goes on with bitmaps of its own.
    off.write(0xA1, MIB, 65536)
    assert (off.make("s2")["level"], other.make("s2")["level"]) == ("incremental", "incremental")
    assert len(off.stored()) == 2
    off.check()
    other.check()


@pytest.mark.thorough
def test_it_stops_when_told_to_by_signal(off: OffHistory) -> None:
    """As when the machine is shut down."""
    off.make("s1")
    overwrite_off(off)
    plan = off.start("s2")
    os.kill(off.daemon.pid, signal.SIGTERM)
    wait_until(lambda: not off.daemon.alive, "its end")
    fail("backup_set", {"plan": plan})
    off.assert_released("s1")
    assert off.make("s2")["level"] == "incremental"
    off.check()
