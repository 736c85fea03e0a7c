# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets that an earlier run has left unfinished: in a repository without room for the next one, and cancelled.

Nobody who has begun them follows them any more, but a later run does.
"""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets
from ansible_collections.vmfleet.backup.tests.integration.test_backup_set_worker import (
    follow,
    leave,
    sets,
    states,
    who,
)

if t.TYPE_CHECKING:
    from collections.abc import Callable

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import Storage
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

__all__ = ["sets"]

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def vm(vms: Vms) -> Qemu:
    return vms.start(vms.disk(0), name="vm0")


@pytest.fixture
def tight(vm: Qemu, storage: Storage) -> Sets:
    """A repository in which the set s0 of the VM grows, and has taken the space that the next one would need."""
    sets = Sets(storage.mount("tmpfs", 48 * MIB).path / "repository")
    sets.start(vm, id="s0")
    return sets


def ended(result: dict[str, t.Any]) -> tuple[int, str, str]:
    [vm] = result["vms"]
    return result["rc"], vm["state"], vm["error"]


# Without room


def test_the_plan_says_that_there_may_be_no_room(vm: Qemu, tight: Sets) -> None:
    plan = tight.plan(vm, id="s1")["plan"]
    assert [planned["action"] for planned in plan["vms"]] == ["finish"]
    said = plan["vms"][0]["reason"]
    assert said.startswith(
        "set s0 of this VM is unfinished, and comes first. For the new set there is not enough space"
    )
    assert plan["space"]["needed"] == 0
    succeed("backup_set", {"repository": str(tight.path), "state": "cancelled"})


def test_one_whose_qemu_has_ended_gives_its_space_back(vm: Qemu, tight: Sets) -> None:
    vm.kill()
    vm.restart()
    assert ended(tight.attempt(vm, id="s1")) == (0, "published", "")
    assert not (tight.path / "vm0" / ".s0.staging").exists()


def test_one_whose_jobs_have_ended_is_published_first(vm: Qemu, tight: Sets) -> None:
    release(vm)
    wait_until(lambda: all(job["status"] == "concluded" for job in vm.block_jobs), "the end of the job")
    # Another full one has no room beside it, and is not begun.
    rc, state, error = ended(tight.attempt(vm, id="s1", level="full"))
    assert (rc, state) == (1, "failed")
    assert error.startswith("not enough space")
    assert not vm.block_jobs
    assert tight.manifest("vm0", "s0")["level"] == "full"
    assert sorted(path.name for path in (tight.path / "vm0").iterdir()) == [".lock", ".s1.failed.json", "s0"]
    # An increment has.
    assert ended(tight.attempt(vm, id="s2")) == (0, "published", "")
    assert tight.levels("vm0", "s2") == {"drive0": "incremental"}


def test_one_that_runs_is_watched(vm: Qemu, tight: Sets) -> None:
    vm.qmp.execute("block-job-set-speed", device=vm.block_jobs[0]["device"], speed=1)
    plan = tight.plan(vm, id="s1")["plan"]
    found = run_module("backup_set", {"plan": plan, "state": "completed", "stall_timeout": "2"})
    assert ended(found) == (0, "published", "")
    assert "progress" in (tight.path / "vm0" / ".s0.failed.json").read_text()


@pytest.mark.parametrize("known", [True, False], ids=["the plan knows", "the plan does not know"])
def test_one_that_is_superseded_is_removed(known: bool, vm: Qemu, tight: Sets) -> None:
    plan = tight.plan(vm, id="s1", **({"supersede": True} if known else {}))["plan"]
    found = run_module("backup_set", {"plan": plan, "supersede": True})
    assert ended(found) == (0, "published", "")
    assert not (tight.path / "vm0" / ".s0.staging").exists()


# Cancelled while a later run follows them


def test_the_run_that_follows_does_not_begin_it_again(
    vm: Qemu, sets: Sets, start_module: Callable[..., ModuleProcess]
) -> None:
    sets.start(vm, id="s1")
    plan = sets.plan(vm, id="s1", speed=SLOW)["plan"]
    assert plan["vms"][0]["action"] == "attach"
    follower = start_module("backup_set", {"plan": plan})
    wait_until(lambda: follower.children, "its work")
    offset = vm.job["offset"]
    wait_until(lambda: vm.job["offset"] >= offset + 2 * MIB, "its first looks")
    cancelled = succeed("backup_set", {"repository": str(sets.path), "state": "cancelled"})
    assert ended(cancelled) == (0, "cancelled", "")
    assert ended(follower.result()) == (1, "cancelled", "cancelled on request")
    assert not vm.block_jobs
    # One that begins after that is told nothing of it.
    assert ended(sets.attempt(vm, id="s1")) == (0, "published", "")


def test_the_worker_that_follows_does_not_begin_it_again(vms: Vms, sets: Sets) -> None:
    two = [vms.start(vms.disk(number), name=f"vm{number}") for number in range(2)]
    sets.start(two[0], id="s1")
    key = leave(sets, two, max_vms=2)["worker"]
    cancelled = succeed("backup_set", {"repository": str(sets.path), "state": "cancelled", "names": ["vm0"]})
    assert ended(cancelled) == (0, "cancelled", "")
    wait_until(lambda: states(follow(sets, key)) == ["cancelled", "running"], "the worker's next look")
    assert not two[0].block_jobs
    # It goes on with what it has begun itself.
    release(two[1])
    wait_until(lambda: not who(sets), "the end of the worker")
    assert (sets.path / "vm1" / "s1").exists()
    assert not (sets.path / "vm0" / "s1").exists()
