# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Workers, and others who come while one is there: they follow it, want something else, or want it to end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import Who
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import PROCESSES, Process, spaces
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets
from ansible_collections.vmfleet.backup.tests.harness.workers import end_worker
from ansible_collections.vmfleet.backup.tests.integration.test_backup_set_worker import (
    follow,
    leave,
    place,
    release_all,
    release_next,
    sets,
    states,
    three,
    who,
)

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

__all__ = ["sets", "three"]

pytestmark = pytest.mark.usefixtures("clean")


def by_name(result: dict[str, t.Any]) -> dict[str, str]:
    return {vm["name"]: vm["state"] for vm in result["vms"]}


def started(plan: dict[str, t.Any], detach: str = "required", **options: t.Any) -> dict[str, t.Any]:
    """Leave the sets to a worker, whatever that comes to."""
    return run_module("backup_set", {"plan": plan, "state": "started", "max_vms": 1, "detach": detach, **options})


def cancel(sets: Sets, **options: t.Any) -> dict[str, t.Any]:
    return run_module("backup_set", {"repository": str(sets.path), "state": "cancelled", **options})


@contextlib.contextmanager
def one_that_begins(sets: Sets) -> t.Iterator[None]:
    """A worker that has the lock, and has not yet said who it is."""
    child = os.fork()
    if child == 0:
        place(sets).take()
        time.sleep(60)
        os._exit(0)
    try:
        wait_until(place(sets).is_held, "the lock")
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


# To follow one


def test_who_wants_other_disks_is_not_told_of_these(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB), vms.disk(1, size=8 * MIB), name="vm0")
    monitor = {"monitor": str(vm.monitor)}
    some = [{**monitor, "exclude_disks": [str(vm.disks[1].name)]}]
    leave_some = started(sets.plan(id="s1", speed=SLOW, vms=some)["plan"])
    assert states(leave_some) == ["running"]
    plan = sets.plan(id="s1", speed=SLOW, vms=[monitor])["plan"]
    assert started(plan)["msg"].startswith("detach: process ")
    release(vm)
    wait_until(lambda: not who(sets), "the end of the worker")
    result = started(plan, slice=60)
    assert (states(result), result["rc"]) == (["failed"], 1)
    assert "exists without disk" in result["vms"][0]["error"]


@pytest.mark.parametrize("option", [{"bandwidth": "1M"}, {"timeout": "1h"}, {"stall_timeout": "1h"}, {"max_vms": 2}])
def test_who_gives_other_options_is_not_told_of_these(three: list[Qemu], sets: Sets, option: dict[str, t.Any]) -> None:
    leave(sets, three)
    plan = sets.plan(*three, speed=SLOW, id="s1")["plan"]
    assert started(plan)["rc"] == 0
    assert started(plan, **option)["msg"].startswith("detach: process ")
    assert cancel(sets)["rc"] == 0


def test_only_what_is_begun_is_left_to_nobody(three: list[Qemu], sets: Sets) -> None:
    plan = sets.plan(*three, speed=SLOW, id="s1")["plan"]
    found = started(plan, begin=False)
    assert (states(found), "worker" in found) == (["skipped"] * 3, False)
    assert not who(sets)


def test_what_has_failed_is_tried_again(three: list[Qemu], sets: Sets) -> None:
    wanted = [{"monitor": str(three[0].monitor)}, {"monitor": str(three[1].monitor), "include_disks": ["nix"]}]
    assert states(started(sets.plan(id="s1", speed=SLOW, vms=wanted)["plan"])) == ["failed", "running"]
    wanted[1].pop("include_disks")
    again = started(sets.plan(id="s1", speed=SLOW, vms=wanted)["plan"], "preferred")
    assert by_name(again)["vm1"] != "failed"
    assert cancel(sets)["rc"] == 0


def test_what_was_skipped_and_can_be_made_now_is_made(three: list[Qemu], sets: Sets) -> None:
    def plan() -> dict[str, t.Any]:
        found: dict[str, t.Any] = sets.plan(*three[:2], id="s1", speed=SLOW, offline="skip")["plan"]
        return found

    three[1].quit()
    skipped = {"vm0": "running", "vm1": "skipped"}
    first = started(plan(), max_vms=2)
    assert by_name(first) == skipped
    # Who would skip it as well follows the worker.
    again = started(plan(), max_vms=2)
    assert (by_name(again), again["worker"]) == (skipped, first["worker"])
    three[1].restart()
    assert started(plan(), max_vms=2)["msg"].startswith("detach: process ")
    beside = started(plan(), "preferred", max_vms=2)
    assert (by_name(beside), "worker" in beside) == ({"vm0": "running", "vm1": "running"}, False)
    assert cancel(sets)["rc"] == 0


def test_some_of_its_vms(sets: Sets, directory: Path, vms: Vms) -> None:
    two = [vms.start(vms.disk(number, size=16 * MIB), name=f"vm{number}") for number in range(2)]
    hypervisor = Hypervisor(directory)
    variables = {"id": "s1", "max_vms": 1, "vms": [{"monitor": str(vm.monitor)} for vm in two], "speed": SLOW}
    play = hypervisor.run("-e", "vm_backup_detach=true", **variables)
    assert play.rc == 0, play.output
    release_next(two)
    wait_until(lambda: "published" in states(follow(sets)), "the first set")
    done = [vm["name"] for vm in follow(sets)["vms"] if vm["state"] == "published"]
    play = hypervisor.run(**variables, names=done)
    assert play.rc == 0, play.output
    assert "1 of 1 VMs have their set, 0 failed" in play.output
    wait_until(lambda: not release_all(two) and not who(sets), "the end of the worker", 3 * PATIENCE)
    # What it has made besides is not told to who asks for less.
    play = hypervisor.run(**variables, names=done)
    assert (play.rc, play.recap()["changed"]) == (0, 0), play.output
    assert "1 of 1 VMs have their set, 0 failed, 0 skipped, nothing written" in play.output


def test_where_nothing_is_left_to_be_done_nobody_is_told_of_a_worker(three: list[Qemu], sets: Sets) -> None:
    sets.back_up(*three, id="s1")
    plan = sets.plan(*three, id="s1")["plan"]
    results = [started(plan) for _time in range(6)]
    assert [(states(result), "worker" in result) for result in results] == [(["published"] * 3, False)] * 6
    for vm in three:
        vm.quit()
    plan = sets.plan(*three, id="s2")["plan"]
    results = [started(plan) for _time in range(6)]
    told = [(states(result), "worker" in result, result["rc"]) for result in results]
    assert told == [(["failed"] * 3, False, 1)] * 6


def test_the_next_one_is_not_taken_for_the_last(three: list[Qemu], sets: Sets) -> None:
    three[0].quit()
    plan = sets.plan(three[0], id="s1")["plan"]
    assert states(started(plan, slice=60)) == ["failed"]
    with one_that_begins(sets):
        assert started(plan)["msg"].startswith("detach: another process begins to make sets in ")
        found = follow(sets)
        assert (found["running"], "vms" in found) == (False, False)


def test_one_whose_child_cannot_end_has_ended(three: list[Qemu], sets: Sets) -> None:
    leave(sets, three)
    process = who(sets)
    assert process
    locked = [
        child
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for file in Path(f"/proc/{child}/fd").iterdir()
        if os.readlink(file) == place(sets).lock
    ]
    # It lets go of the lock when it has done its work: before that, it ends with the worker.
    assert len(locked) == 1
    for _vm in three:
        release_next(three)
    wait_until(lambda: not who(sets), "the end of the worker")


def test_one_that_cannot_say_how_far_it_is(three: list[Qemu], sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place.PATIENCE", 1)
    os.mkdir(f"{place(sets).progress}.new")
    try:
        found = leave(sets, three)
        assert (states(found), "worker" in found) == (["queued"] * 3, True)
        for _vm in three:
            release_next(three)
        assert states(follow(sets, found["worker"], wait=60)) == ["published"] * 3
    finally:
        os.rmdir(f"{place(sets).progress}.new")


def test_one_that_cannot_begin(three: list[Qemu], sets: Sets) -> None:
    os.mkdir(place(sets).result)
    try:
        plan = sets.plan(*three, speed=SLOW, id="s1")["plan"]
        said = f"detach: the worker of {sets.path} could not begin: {place(sets).result}: "
        assert started(plan)["msg"].startswith(said)
        assert not [vm for vm in three if vm.block_jobs]
        found = started(plan, "preferred")
        assert [warning.startswith(said) for warning in found["warnings"]] == [True]
        assert (states(found), "worker" in found) == (["queued", "queued", "running"], False)
        assert cancel(sets)["rc"] == 0
    finally:
        os.rmdir(place(sets).result)


@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_times_that_cannot_be_meant(three: list[Qemu], sets: Sets, value: str) -> None:
    said = started(sets.plan(three[0], id="s1")["plan"], slice=value)["msg"]
    assert said.startswith("slice: ")
    said = fail("backup_follow", {"repository": str(sets.path), "wait": value})["msg"]
    assert said.startswith("wait: ")
    assert not who(sets)


# To end one


def test_who_follows_one_that_is_cancelled_leaves_it_at_that(three: list[Qemu], sets: Sets, directory: Path) -> None:
    hypervisor = Hypervisor(directory)
    sockets = [f"{vm.directory}/*.qmp" for vm in three]
    with hypervisor.on_terminal("backup", sockets=sockets, speed=SLOW, max_vms=1) as screen:
        screen.wait_for("1 running")
        assert states(cancel(sets)) == ["cancelled"]
        play = screen.end()
    assert play.rc == 2, play.output
    assert "0 of 3 VMs have their set, 3 failed" in " ".join(play.output.split())
    assert "all sets were cancelled on this hypervisor" in " ".join(play.output.split())
    assert not who(sets)
    assert not [vm for vm in three if vm.block_jobs]


def test_what_it_would_begin_later_is_not_cancelled_by_name(three: list[Qemu], sets: Sets) -> None:
    found = leave(sets, three)
    queued = [name for name, state in by_name(found).items() if state == "queued"]
    said = cancel(sets, names=queued[:1])["msg"]
    assert said.startswith(f"names: {queued[0]}: the worker of {sets.path}, process ")
    plan = sets.plan(*three[:2], id="s1")["plan"]
    assert run_module("backup_set", {"plan": plan, "state": "cancelled"})["msg"].startswith("names: ")
    [running] = set(by_name(found)) - set(queued)
    assert states(cancel(sets, names=[running])) == ["cancelled"]
    assert who(sets)
    # Who names all of them means the worker, too.
    assert cancel(sets, names=["vm*"])["rc"] == 0
    assert not who(sets)


def test_what_it_would_begin_next_is_not_cancelled_by_name(three: list[Qemu], sets: Sets) -> None:
    sets.start(three[0], id="s0")
    assert by_name(leave(sets, three[:2], max_vms=2)) == {"vm0": "running", "vm1": "running"}
    said = cancel(sets, names=["vm0"])["msg"]
    assert said.startswith(f"names: vm0: the worker of {sets.path}, process ")
    assert len(three[0].block_jobs) == 1
    # What it has begun itself it does not begin again.
    assert states(cancel(sets, names=["vm1"])) == ["cancelled"]
    wait_until(lambda: not release_all(three[:1]) and not who(sets), "the end of the worker", 3 * PATIENCE)
    assert {path.parent.parent.name for path in sets.path.glob("*/s1/manifest.json")} == {"vm0"}


def test_it_goes_on_where_not_all_can_be_cancelled(three: list[Qemu], sets: Sets) -> None:
    found = leave(sets, three)
    process = who(sets)

    def goes_on() -> bool:
        told = follow(sets, found["worker"])
        return who(sets) == process and told["running"] and states(told) == ["queued", "queued", "running"]

    said = cancel(sets, names=["vm*", "typo"])["msg"]
    assert said.startswith(f"names: typo has no set in {sets.path}; ")
    assert goes_on()
    [running] = [name for name, state in by_name(found).items() if state == "running"]
    for exposed in (sets.path, sets.directory(running)):
        os.chmod(exposed, 0o777)
        assert cancel(sets)["msg"].startswith(f"repository: {exposed} ")
        os.chmod(exposed, 0o700)
        assert goes_on()
    # The sets of another plan are not these.
    other = sets.plan(*three, id="s2")["plan"]
    assert run_module("backup_set", {"plan": other, "state": "cancelled"})["rc"] == 0
    assert goes_on()
    assert states(cancel(sets)) == ["cancelled"]
    assert not who(sets)


def test_it_is_ended_by_another_path_of_its_repository(three: list[Qemu], sets: Sets, directory: Path) -> None:
    found = leave(sets, three)
    other = Sets(directory / "other")
    other.back_up(three[1])
    assert (cancel(other)["rc"], bool(who(sets))) == (0, True)
    (directory / "link").symlink_to(sets.path)
    linked = Sets(directory / "link")
    queued = next(name for name, state in by_name(found).items() if state == "queued")
    assert cancel(linked, names=[queued])["msg"].startswith(f"names: {queued}: the worker of {linked.path}, process ")
    assert who(sets)
    assert states(cancel(linked)) == ["cancelled"]
    assert not who(sets)
    assert not [vm for vm in three if vm.block_jobs]


def test_there_is_one_whatever_the_path_of_its_repository(three: list[Qemu], sets: Sets, directory: Path) -> None:
    leave(sets, three[:2])
    process = who(sets)
    assert process
    (directory / "link").symlink_to(sets.path)
    linked = Sets(directory / "link")
    try:
        plan = linked.plan(three[2], speed=SLOW, id="s1")["plan"]
        assert started(plan)["msg"].startswith(
            f"detach: process {process.pid} makes the sets s1 in the same repository"
        )
        assert not three[2].block_jobs
        beside = started(plan, "preferred")
        assert (states(beside), "worker" in beside) == (["running"], False)
        assert not who(linked)
    finally:
        for path in place(linked):
            Path(path).unlink(missing_ok=True)
    assert cancel(sets)["rc"] == 0


def test_it_goes_on_where_the_repository_hangs(three: list[Qemu], sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(sets, three)
    process = who(sets)
    monkeypatch.setattr("ansible_collections.vmfleet.backup.plugins.module_utils._host.probe.TIMEOUT", 0.1)
    monkeypatch.setattr(
        "ansible_collections.vmfleet.backup.plugins.module_utils._host.probe._ask", lambda *_asked: time.sleep(2) or 0
    )
    assert "does not answer" in cancel(sets)["msg"]
    assert who(sets) == process
    monkeypatch.undo()
    assert states(cancel(sets)) == ["cancelled"]


@pytest.mark.parametrize("other", ["a later process of that number", "a process of another container"])
def test_nobody_else_is_killed(sets: Sets, other: str) -> None:
    sets.path.mkdir()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        here = spaces()[PROCESSES]
        process = Process.of(stranger.pid)
        assert process
        start, space = (process.start, "1") if "container" in other else (process.start - 1, here)
        fd = place(sets).take()
        assert fd is not None
        said = Who(stranger.pid, start, space, "0" * 16, "s0", "2026-11-30T01:00:05Z", ["vm0"], [], "r0")
        os.pwrite(fd, json.dumps(said._asdict()).encode(), 0)
        with pytest.raises(BackupError, match=f"process {stranger.pid}, runs in another container"):
            end_worker(sets.path)
        assert stranger.poll() is None
        os.close(fd)
        stranger.kill()


def test_one_that_begins_cannot_be_ended_yet(sets: Sets) -> None:
    sets.path.mkdir()
    with one_that_begins(sets), pytest.raises(BackupError, match="is about to make sets; repeat the cancellation"):
        end_worker(sets.path)


def test_looks_do_not_keep_others_from_looking(sets: Sets) -> None:
    fd = place(sets).take()
    assert fd is not None
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert not place(sets).is_held()
    os.close(fd)
