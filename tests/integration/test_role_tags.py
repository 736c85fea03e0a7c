# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Parts of the role vm_backup: each documented tag run alone and left out alone, and a start in the middle."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, SLOW

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

PLANNED = "start   web01"
REPORTED = "of 1 VMs have their set"
DONE = "1 of 1 VMs have their set"
NOT_BEGUN = "skipped    web01  set s1 is not being made"
COPIES = "running    web01"


@pytest.fixture
def hypervisor(directory: Path) -> Hypervisor:
    return Hypervisor(directory)


@pytest.mark.parametrize(
    ("options", "published", "copies", "said", "unsaid"),
    [
        ("--tags preflight", False, False, (), (PLANNED, REPORTED)),
        ("--tags plan", False, False, (PLANNED,), (REPORTED,)),
        ("--tags start", False, True, (PLANNED,), (REPORTED,)),
        ("--tags wait", True, False, (PLANNED, DONE), ()),
        ("--tags report", False, False, (NOT_BEGUN, REPORTED), (PLANNED,)),
        ("--skip-tags preflight", True, False, (PLANNED, DONE), ()),
        ("--skip-tags plan", True, False, (DONE,), (PLANNED,)),
        ("--skip-tags start", False, False, (PLANNED, NOT_BEGUN), ()),
        ("--skip-tags wait", False, True, (PLANNED, COPIES), ()),
        ("--skip-tags report", True, False, (PLANNED,), (REPORTED,)),
        ("--skip-tags plan,start,wait,report", False, False, (), (PLANNED, REPORTED)),
    ],
)
def test_a_phase_alone_and_all_but_one(
    vms: Vms,
    hypervisor: Hypervisor,
    options: str,
    published: bool,
    copies: bool,
    said: tuple[str, ...],
    unsaid: tuple[str, ...],
) -> None:
    vm = vms.start(name=NAME)
    # Only where the copy is to be seen does it have to last.
    play = hypervisor.run(*options.split(), sockets=[str(vm.monitor)], speed=SLOW if copies else "0")
    assert play.rc == 0, play.output
    assert (hypervisor.sets.path / NAME / ID / "manifest.json").exists() == published
    assert bool(vm.block_jobs) == copies
    for text in said:
        assert text in play.output
    for text in unsaid:
        assert text not in play.output
    # Whoever only looks makes no repository.
    assert hypervisor.sets.path.exists() == (published or copies)
    release(vm)
    assert not copies or hypervisor.play("cancel").rc == 0


def test_without_the_start_goes_on_what_was_begun(vms: Vms, hypervisor: Hypervisor) -> None:
    begun, other = vms.start(name=NAME), vms.start(vms.disk(1), name="db01")
    assert hypervisor.run("--tags", "start", sockets=[str(begun.monitor)], speed=SLOW).rc == 0
    both = [str(begun.monitor), str(other.monitor)]
    seen = hypervisor.run("--tags", "report", sockets=both, speed=SLOW)
    assert (seen.rc, begun.job["status"]) == (0, "running"), seen.output
    assert COPIES in seen.output
    release(begun)
    play = hypervisor.run("--tags", "wait,report", "--skip-tags", "start", sockets=both, speed=SLOW)
    assert play.rc == 0, play.output
    assert "1 of 2 VMs have their set, 0 failed, 1 skipped" in play.output
    assert not (hypervisor.sets.path / "db01" / ID).exists()
    assert other.block_jobs == []


def test_who_only_looks_removes_nothing(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name=NAME)
    sockets = [str(vm.monitor)]
    assert hypervisor.run("--tags", "start", sockets=sockets, speed=SLOW, id="s0").rc == 0
    seen = hypervisor.run("--tags", "report", sockets=sockets, id="s1", supersede=True, takeover=True)
    assert seen.rc == 0, seen.output
    assert (vm.job["status"], "superseded" in seen.output) == ("running", False), seen.output
    release(vm)
    wait_until((hypervisor.sets.path / NAME / "s0" / "manifest.json").exists, "the set")


@pytest.mark.parametrize("options", ["--tags start", "--skip-tags wait", "--skip-tags report"])
def test_a_failure_has_its_reason_whatever_is_left_out(vms: Vms, hypervisor: Hypervisor, options: str) -> None:
    vm = vms.start(name=NAME)
    play = hypervisor.run(*options.split(), sockets=[str(vm.monitor)], quiesce="require")
    assert play.rc != 0
    last = play.output.rpartition("Fail if a VM has no set")[2]
    assert f"no set {ID} of {NAME}" in last
    assert "the reasons are above" in last if options == "--skip-tags wait" else "quiesce: the VM" in last


def test_wrong_variables_are_refused_by_the_tag_preflight(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name=NAME)
    play = hypervisor.run("--tags", "preflight", sockets=[str(vm.monitor)], repository="relative")
    assert play.rc != 0
    assert "vm_backup_repository is 'relative'" in play.output


@pytest.mark.parametrize(
    "task",
    [
        "Preflight | Check the variables",
        "Plan | Ask the VMs and plan their sets",
        "Plan | Show the plan",
        "Start | Start the copies",
        "Wait | Wait for the copies",
        "Report | Show the result of each VM",
        "Report | Write the metrics",
        "Summary | Fail if a VM has no set",
    ],
)
def test_a_start_in_the_middle_says_what_is_missing(
    vms: Vms, directory: Path, hypervisor: Hypervisor, task: str
) -> None:
    vm = vms.start(name=NAME)
    play = hypervisor.run(
        "--start-at-task",
        f"vmfleet.backup.vm_backup : {task}",
        sockets=[str(vm.monitor)],
        id="",
        metrics_dir=str(directory),
    )
    assert play.rc != 0, play.output
    assert "cannot start at a later task (--start-at-task)" in play.output
    assert "ndefined" not in play.output
    assert "has no attribute" not in play.output
    assert vm.block_jobs == []
    assert not hypervisor.sets.path.exists()


@pytest.mark.parametrize(
    ("verb", "variables", "said"),
    [
        ("restore", {"restore_vm": NAME, "id": ""}, "Set s3 of web01"),
        ("verify", {"id": ""}, "1 of 1 sets are good"),
        ("prune", {"keep": {"last": 3}}, "nothing to remove"),
        ("status", {}, "3 sets of 1 VM"),
        ("cancel", {}, "no set is being made"),
    ],
)
def test_the_tag_of_a_verb(
    vms: Vms, directory: Path, hypervisor: Hypervisor, verb: str, variables: dict[str, t.Any], said: str
) -> None:
    Chain(vms, directory)
    where = directory / "restored"
    where.mkdir()
    given = {**variables, **({"restore_directory": str(where)} if verb == "restore" else {})}
    alone = hypervisor.play(verb, "--tags", verb, **given)
    assert alone.rc == 0, alone.output
    assert said in alone.output
    without = hypervisor.play(verb, "--skip-tags", verb, **given)
    assert without.rc == 0, without.output
    assert said not in without.output


def test_the_tag_restore_keeps_the_refusal_of_several_machines(directory: Path) -> None:
    play = Hypervisor(directory, ("hv1", "hv2")).play("restore", "--tags", "restore", restore_vm=NAME)
    assert play.rc != 0
    assert "This would restore on hv1, hv2" in play.output
