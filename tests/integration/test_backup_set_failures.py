# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set when things go wrong: full and failing targets, lost VMs, jobs that end otherwise than they should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish as finishing
from ansible_collections.vmfleet.backup.plugins.module_utils._backup import prepare
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import decide as plan_decide
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import model
from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.backup import release, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, patterned
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, SLOW, Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def copy_of(vm: Qemu, directory: Path) -> dict[str, Path]:
    return {"drive0": vm.freeze(vm.disks[0], directory / f"frozen-{vm.pid}.qcow2")}


def test_case_18_not_enough_space_is_found_before_the_start(vms: Vms, storage: Storage) -> None:
    small = storage.mount("tmpfs", 48 * MIB)
    sets = Sets(small.path / "repository")
    one, other = vms.start(name="one"), vms.start(vms.disk(1, size=8 * MIB), name="other")
    third = vms.start(vms.disk(2), name="third")
    result = sets.fail(one, other, third)
    assert [vm["state"] for vm in result["vms"]] == ["published", "published", "failed"]
    assert "not enough space" in result_of(result, "third")["error"]
    sets.assert_absent("third")
    assert third.io("drive2", "write 0 64k").startswith("wrote")


def test_case_18_the_reserve_stays_free(vms: Vms, storage: Storage) -> None:
    sets = Sets(storage.mount("tmpfs", 64 * MIB).path / "repository")
    vm = vms.start(name="one")
    assert "not enough space" in sets.fail(vm, reserve="50%")["msg"]
    assert "not enough space" in sets.fail(vm, reserve="32M")["msg"]
    sets.back_up(vm, reserve="10%")


def test_reserved_space_survives_a_full_file_system(vms: Vms, directory: Path, storage: Storage) -> None:
    full = storage.mount("ext4", 128 * MIB)
    sets = Sets(full.path / "repository")
    vm = vms.start(name="web01")
    copies = copy_of(vm, directory)
    plan = sets.start(vm)
    full.fill()
    vm.write("drive0", 5, 56 * MIB, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    sets.assert_good("web01", copies)


def test_what_is_written_between_plan_and_start_has_its_space_too(vms: Vms, directory: Path, storage: Storage) -> None:
    full = storage.mount("ext4", 256 * MIB)
    sets = Sets(full.path / "repository")
    vm = vms.start(name="web01")
    plan = sets.plan(vm, speed=SLOW)["plan"]
    # Into the holes of the disk.
    for piece in range(1, 16, 2):
        vm.write("drive0", 7, piece * 4 * MIB, 3 * MIB)
    copies = copy_of(vm, directory)
    succeed("backup_set", {"plan": plan, "state": "started"})
    full.fill()
    release(vm)
    succeed("backup_set", {"plan": plan})
    sets.assert_good("web01", copies)


def test_cases_18_to_20_a_target_that_fills_up(vms: Vms, directory: Path, storage: Storage) -> None:
    full = storage.mount("ext2", 96 * MIB)
    sets = Sets(full.path / "repository")
    vm = vms.start(name="web01")
    planned = sets.plan(vm, speed="4M")
    assert planned["plan"]["space"]["reservable"] is False
    assert any("cannot reserve" in line for line in planned["text"])
    refused = fail("backup_set", {"plan": planned["plan"], "state": "started"})
    assert "unattended" in refused["msg"]
    plan = sets.plan(vm, speed="4M")["plan"]
    succeed("backup_set", {"plan": plan, "state": "started", "unattended": True})
    full.fill()
    release(vm)
    # The job has failed before anybody looks.
    assert wait_concluded(vm)["device"]
    result = fail("backup_set", {"plan": plan})
    assert "No space left on device" in result["msg"]
    assert vm.block_jobs == []
    sets.assert_absent("web01")
    assert vm.io("drive0", "write -P 3 1M 64k").startswith("wrote")
    full.clear()
    # The run that has failed does not try again; the next one does.
    assert "No space left on device" in fail("backup_set", {"plan": plan})["msg"]
    copies = copy_of(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)


def test_an_unreserved_copy_is_given_up_when_space_runs_short(
    vms: Vms, storage: Storage, start_module: t.Callable[..., ModuleProcess]
) -> None:
    short = storage.mount("ext2", 128 * MIB)
    sets = Sets(short.path / "repository")
    vm = vms.start(name="web01")
    process = start_module("backup_set", {"plan": sets.plan(vm, speed=SLOW, reserve="16M")["plan"]})
    wait_until(lambda: vm.block_jobs, "the start of the job")
    short.fill(leave=8 * MIB)
    result = process.result()
    assert "could not be reserved" in result["msg"]
    assert vm.io("drive0", "write -P 3 60M 64k").startswith("wrote")
    sets.assert_absent("web01")


def test_case_23_qemu_killed_while_it_copies(
    vms: Vms, directory: Path, sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1, id="drive0"), name="other")
    process = start_module("backup_set", {"plan": sets.plan(vm, other, speed="16M")["plan"]})
    intents = [sets.directory(name) / f".{ID}.staging" / "intent.json" for name in ("web01", "other")]
    wait_until(lambda: all(path.exists() and '"copying"' in path.read_text() for path in intents), "the copies")
    vm.kill()
    began = time.monotonic()
    result = process.result()
    # The other VM's copy, which takes four seconds of it, is waited for.
    assert time.monotonic() - began < 20
    assert result_of(result, "web01")["state"] == "failed"
    assert "QEMU ended" in result_of(result, "web01")["error"]
    assert result_of(result, "other")["state"] == "published"
    sets.assert_absent("web01")
    vm.restart()
    copies = copy_of(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)


def test_qemu_killed_before_anything_of_a_set_exists(vms: Vms, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB), name="web01")
    sets.back_up(vm, id="s0")
    describe_vm = prepare.describe_vm

    async def kill_and_describe(*args: t.Any) -> t.Any:
        os.kill(vm.pid, signal.SIGKILL)
        return await describe_vm(*args)

    monkeypatch.setattr(prepare, "describe_vm", kill_and_describe)
    [found] = sets.fail(vm)["vms"]
    # It is said as of any VM that is off, and written down.
    assert "nobody listens there: the VM is off" in found["error"]
    assert found["error"] in (sets.path / "web01" / f".{ID}.failed.json").read_text()
    vm.kill()


def test_qemu_killed_and_restarted_between_two_runs(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01")
    plan = sets.start(vm)
    vm.kill()
    vm.restart()
    assert "restarted" in fail("backup_set", {"plan": plan})["msg"]
    copies = copy_of(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)


def test_case_25_timeout(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    plan = sets.plan(vm, speed=SLOW)["plan"]
    result = fail("backup_set", {"plan": plan, "timeout": 0.5})
    assert "timeout of 0.5 s" in result["msg"]
    assert vm.block_jobs == []
    sets.assert_absent("web01")
    sets.back_up(vm)


def test_case_25_the_timeout_outlives_the_module(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    plan = sets.plan(vm, speed=SLOW)["plan"]
    succeed("backup_set", {"plan": plan, "state": "started", "timeout": 1})
    assert "timeout of 1 s" in fail("backup_set", {"plan": plan})["msg"]
    sets.assert_absent("web01")


def test_a_copy_that_stands_still(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    # After its first piece, QEMU waits until the time for that is over.
    result = fail("backup_set", {"plan": sets.plan(vm, speed="1")["plan"], "stall_timeout": 1})
    assert "no progress for 1 s" in result["msg"]
    assert vm.block_jobs == []
    sets.assert_absent("web01")


def test_case_26_cancelled_from_outside(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    plan = sets.start(vm)
    first = vm.block_jobs[0]["device"]
    vm.qmp.execute("block-job-cancel", device=first)
    result = fail("backup_set", {"plan": plan})
    assert "cancelled from outside" in result["msg"]
    # A set is all of its disks: the sibling goes too.
    assert vm.block_jobs == []
    sets.assert_absent("web01")
    failure = json.loads((sets.path / "web01" / f".{ID}.failed.json").read_text())
    assert failure["run"] == plan["run"]
    sets.back_up(vm)
    sets.assert_tidy("web01")


def test_case_26_a_job_that_was_dismissed_is_no_success(vm: Qemu, sets: Sets) -> None:
    plan = sets.start(vm)
    release(vm)
    vm.qmp.execute("job-dismiss", id=wait_concluded(vm)["device"])
    assert "dismissed" in fail("backup_set", {"plan": plan})["msg"]
    sets.assert_absent("vm")


def test_case_34_a_source_that_cannot_be_read(vms: Vms, directory: Path, sets: Sets) -> None:
    path = patterned(directory / "bad.qcow2")
    broken = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(path)},
        "inject-error": [{"event": "read_aio", "errno": 5, "once": "off", "sector": 16384}],
    }
    flat = {**broken, "inject-error.0.event": "read_aio", "inject-error.0.errno": 5, "inject-error.0.once": "off"}
    del flat["inject-error"]
    vm = vms.start(Disk(path, file=flat), vms.disk(1), name="web01")
    result = sets.fail(vm)
    assert "Input/output error" in result["msg"]
    assert vm.status == "running"
    sets.assert_absent("web01")


def test_case_33_a_monitor_in_other_hands(vms: Vms, sets: Sets, start_module: t.Callable[..., ModuleProcess]) -> None:
    from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp

    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="other")
    holder = Qmp(vm.monitor)
    try:
        result = sets.fail(vm, other)
    finally:
        holder.close()
    assert [found["state"] for found in result["vms"]] == ["failed", "published"]
    assert "another client holds this monitor" in result["msg"]
    # A client that comes and goes while the copy runs costs time only.
    process = start_module("backup_set", {"plan": sets.plan(vm, speed="16M")["plan"]})
    wait_until(lambda: vm.block_jobs, "the start of the job")
    holder = Qmp(vm.monitor)
    time.sleep(2)
    holder.close()
    assert process.result()["vms"][0]["state"] == "published"


def test_case_35_one_of_ten_fails(vms: Vms, directory: Path, sets: Sets) -> None:
    machines = [vms.start(vms.disk(number, size=8 * MIB), name=f"vm{number}") for number in range(9)]
    result = sets.fail(*machines, f"{directory}/gone.qmp")
    assert result["summary"]["published"] == 9
    assert result["summary"]["failed"] == 1
    again = sets.fail(*machines, f"{directory}/gone.qmp")
    assert again["changed"] is False


def test_the_repository_goes_away(vm: Qemu, sets: Sets) -> None:
    plan = sets.plan(vm)["plan"]
    sets.back_up(vm, id="s0")
    away = sets.path.with_name("away")
    sets.path.rename(away)
    plan["create_repository"] = False
    assert "mounted" in fail("backup_set", {"plan": plan})["msg"]
    assert not sets.path.exists()
    away.rename(sets.path)
    succeed("backup_set", {"plan": plan})


def test_qemu_ends_while_finished_images_are_brought_to_the_disk(
    vms: Vms, directory: Path, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = vms.start(name="web01")
    copies = copy_of(vm, directory)
    finish = finishing.finish_image

    def finish_last(*args: t.Any) -> t.Any:
        os.kill(vm.pid, signal.SIGKILL)
        return finish(*args)

    monkeypatch.setattr(finishing, "finish_image", finish_last)
    assert sets.back_up(vm)["vms"][0]["state"] == "published"
    vm.kill()
    sets.assert_good("web01", copies)


@pytest.mark.parametrize(
    ("moment", "killed"),
    [("publish: rename", False), ("dismiss jobs: job-dismiss", False), ("dismiss jobs: job-dismiss", True)],
)
def test_qemu_ends_when_the_set_has_its_name(moment: str, killed: bool, vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB), name="web01")
    copies = copy_of(vm, directory)
    plan = sets.plan(vm)["plan"]
    if killed:
        # An earlier call has published it, and could do no more.
        ModuleProcess("backup_set", {"plan": plan}, crash_at=crash.Point("publish > sync directory: fsync")).wait()
        assert vm.block_jobs
    result = ModuleProcess("backup_set", {"plan": plan}, crash_at=crash.Point(moment), victims=(vm.pid,)).result()
    [found] = result["vms"]
    assert (result["rc"], found["state"], found["error"]) == (0, "published", "")
    [warning] = found["warnings"]
    assert warning.startswith(f"what the making of set {ID} has left in QEMU could not be removed: ")
    vm.kill()
    sets.assert_good("web01", copies)


@pytest.mark.parametrize("other", [False, True], ids=["missing", "another"])
def test_the_repository_goes_away_while_it_is_written_to(
    vms: Vms, directory: Path, sets: Sets, start_module: t.Callable[..., ModuleProcess], other: bool
) -> None:
    vm = vms.start(name="web01")
    sets.back_up(vm, id="s0")
    tracked = set(vm.bitmaps("n0"))
    vm.write("drive0", 7, 0, 4 * MIB)
    process = start_module("backup_set", {"plan": sets.plan(vm, speed=SLOW)["plan"]})
    wait_until(lambda: vm.block_jobs, "the start of the job")
    away = sets.path.with_name("away")
    sets.path.rename(away)
    if other:
        sets.back_up(vms.start(vms.disk(1), name="db01"))
    result = process.result()
    assert result_of(result, "web01")["state"] == "failed"
    assert "its jobs were cancelled" in result["msg"]
    # Nobody else could have freed the guest of it, and what the next increment rests on is still there.
    assert wait_concluded(vm)["device"]
    assert tracked <= set(vm.bitmaps("n0"))
    if other:
        sets.path.rename(sets.path.with_name("other"))
    away.rename(sets.path)
    copies = copy_of(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies, levels={"drive0": "incremental"})


def test_a_defect_that_shows_with_one_vm_does_not_take_the_others_along(
    vms: Vms, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = plan_decide.decide

    def stumble(request: model.Request, *args: t.Any) -> t.Any:
        return {}[request.name] if request.name == "web01" else decide(request, *args)

    machines = [vms.start(vms.disk(number, size=8 * MIB), name=name) for number, name in enumerate(("web01", "db01"))]
    plan = sets.plan(*machines)["plan"]
    monkeypatch.setattr(plan_decide, "decide", stumble)
    result = fail("backup_set", {"plan": plan})
    assert [vm["state"] for vm in result["vms"]] == ["failed", "published"]
    assert "internal error: KeyError('web01')" in result["msg"]
    assert any("Traceback" in warning for warning in result["warnings"])


def test_a_read_only_repository(vms: Vms, storage: Storage) -> None:
    mount = storage.mount("ext4", 96 * MIB)
    sets = Sets(mount.path / "repository")
    vm = vms.start(name="web01")
    sets.back_up(vm)
    mount.make_read_only()
    assert "read-only" in fail("backup_plan", sets.arguments(vm, id="s2"))["msg"]


def test_staging_removed_by_hand(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01")
    copies = copy_of(vm, directory)
    sets.start(vm)
    shutil.rmtree(sets.path / "web01" / f".{ID}.staging")
    sets.back_up(vm)
    sets.assert_good("web01", copies)


def test_one_vm_under_two_names(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    plan = sets.start(vm)
    other = [{"name": "db01", "monitor": str(vm.monitor)}]
    assert "under the name web01" in sets.fail(vms=other)["msg"]
    assert vm.job["status"] == "running"
    release(vm)
    succeed("backup_set", {"plan": plan})
