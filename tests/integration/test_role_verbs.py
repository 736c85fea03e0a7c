# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role's other verbs and their playbooks, as a user runs them: restore, verify, prune, status, cancel."""

from __future__ import annotations

import re
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, restored_to
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

# What no test outlives.
YEAR = "52w"


@pytest.fixture
def chain(vms: Vms, directory: Path) -> Chain:
    return Chain(vms, directory)


@pytest.fixture
def hypervisor(directory: Path) -> Hypervisor:
    return Hypervisor(directory)


def rows(output: str) -> dict[str, list[str]]:
    """The lines of the status table, by VM: the mark and what follows the name."""
    table = output.partition("  VM  ")[2].partition("\nok: ")[0]
    found = re.findall(r"^([! ]) (\S+)  +(.*?) *$", table, re.MULTILINE)
    return {name: [mark, *re.split(r"  +", rest)] for mark, name, rest in found}


def test_restore(chain: Chain, directory: Path, hypervisor: Hypervisor) -> None:
    where = directory / "restored"
    where.mkdir()
    before = chain.library.content()
    asked: dict[str, t.Any] = {"restore_vm": NAME, "id": "s2", "restore_directory": str(where)}
    checked = hypervisor.play("restore", "--check", **asked)
    assert (checked.rc, checked.recap()["changed"]) == (0, 1), checked.output
    assert "Set s2 of web01: 2 of 2 disks would be restored" in checked.output
    assert not list(where.iterdir())
    done = hypervisor.play("restore", **asked)
    assert (done.rc, done.recap()["changed"]) == (0, 1), done.output
    assert f"drive0: {where}/drive0.qcow2 (qcow2, 8.0 MiB, copy of set s2 on s1)" in done.output
    chain.assert_restored("s2", restored_to(where))
    again = hypervisor.play("restore", **asked)
    assert (again.rc, again.recap()["changed"]) == (0, 0), again.output
    assert "all disks are there already" in again.output
    assert chain.library.content() == before


def test_restore_an_overlay_and_remove_it(chain: Chain, directory: Path, hypervisor: Hypervisor) -> None:
    where = directory / "look"
    where.mkdir()
    asked = {"restore_vm": NAME, "id": "", "restore_directory": str(where)}
    made = hypervisor.play("restore", restore_method="overlay", **asked)
    assert made.rc == 0, made.output
    assert "overlay of set s3 on s2 on s1" in made.output
    chain.assert_restored("s3", restored_to(where))
    removed = hypervisor.play("restore", restore_state="absent", **asked)
    assert (removed.rc, removed.recap()["changed"]) == (0, 1), removed.output
    assert "Overlays of web01 that were removed: 2" in removed.output
    assert not list(where.iterdir())


def test_restore_on_one_machine_only(directory: Path) -> None:
    two = Hypervisor(directory, ("hv1", "hv2"))
    play = two.play("restore", restore_vm=NAME, restore_directory=str(directory))
    assert play.rc != 0
    assert "This would restore on hv1, hv2." in play.output
    assert "-e vm_backup_hosts=NAME" in play.output


@pytest.mark.parametrize(
    ("verb", "variables", "said"),
    [
        ("restore", {"restore_vm": NAME}, "Give vm_backup_restore_directory for all disks"),
        (
            "restore",
            {"restore_vm": NAME, "restore_directory": "/x", "restore_before": "2026-11-22"},
            "Both say which set",
        ),
        ("restore", {"restore_directory": "/x"}, "vm_backup_restore_vm is missing"),
        ("prune", {}, "vm_backup_keep is empty"),
        ("status", {"max_age": "26"}, "vm_backup_max_age is '26'"),
        ("verify", {"verify": "deeply"}, "value of vm_backup_verify must be one of"),
    ],
)
def test_variables_that_are_wrong_are_named(
    hypervisor: Hypervisor, verb: str, variables: dict[str, t.Any], said: str
) -> None:
    play = hypervisor.play(verb, **variables)
    assert play.rc != 0
    assert said in play.output


def test_verify(chain: Chain, hypervisor: Hypervisor) -> None:
    good = hypervisor.play("verify", id="")
    assert (good.rc, good.recap()["changed"]) == (0, 0), good.output
    assert "depth checksum: 1 of 1 sets are good" in good.output
    assert "good      web01/s3  drive0, drive1" in good.output
    # One byte of the full image, on which the others build.
    image = chain.library.images(NAME, "s1")["drive1"]
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    bad = hypervisor.play("verify", id="")
    assert bad.rc != 0
    assert "0 of 1 sets are good" in bad.output
    assert f"NOT GOOD  web01/s3  drive1: image {image}" in bad.output
    assert "hv1: not good: web01/s3" in bad.output
    status = hypervisor.play("status", max_age=YEAR)
    assert status.rc != 0
    assert rows(status.output)[NAME][0] == "!"
    assert "NOT GOOD" in rows(status.output)[NAME]


def test_prune(chain: Chain, directory: Path, hypervisor: Hypervisor) -> None:
    before = chain.library.content()
    rules = {"keep": {"last": 1}, "consolidate": True}
    checked = hypervisor.play("prune", "--check", **rules)
    assert (checked.rc, checked.recap()["changed"]) == (0, 1), checked.output
    assert "would be removed, 1 would be made full, 1 kept" in checked.output
    assert "consolidate  web01/s3  last" in checked.output
    assert "remove       web01/s1  no rule keeps it" in checked.output
    assert chain.library.content() == before
    done = hypervisor.play("prune", **rules)
    assert (done.rc, done.recap()["changed"]) == (0, 1), done.output
    assert "removed, 1 made full, 1 kept" in done.output
    assert chain.library.listed() == ["s3"]
    chain.assert_all_restore(chain.library, directory / "restored", {"s3": "full"})
    again = hypervisor.play("prune", **rules)
    assert (again.rc, again.recap()["changed"]) == (0, 0), again.output
    assert "nothing to remove, 1 kept" in again.output
    # What is kept is of no interest then.
    assert "web01/s3" not in again.output


def test_status(chain: Chain, vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    monitors = [f"{chain.vm.directory}/*.qmp"]
    good = hypervisor.play("status", sockets=monitors, max_age=YEAR)
    assert (good.rc, good.recap()["changed"]) == (0, 0), good.output
    assert f"{chain.library.path}: 3 sets of 1 VM" in good.output
    assert f"without a good set that is at most {YEAR} old: 0" in good.output
    mark, newest, _age, level, sets, _size, verified, host = rows(good.output)[NAME]
    assert (mark, newest, level, sets, verified, host) == (" ", "s3", "incremental", "3", "no", "hv1")
    # One whose newest set is old, one without any set, and one that is not there at all.
    chain.library.rewrite("s3", started="2020-01-01T00:00:00Z")
    other = vms.start(vms.disk(2), name="new01")
    monitors += [f"{other.directory}/*.qmp", f"{directory}/off.qmp"]
    bad = hypervisor.play("status", sockets=monitors, max_age=YEAR)
    assert bad.rc != 0
    assert "hv1: no good set that is at most 52w old: new01, off, web01" in bad.output, bad.output
    found = rows(bad.output)
    assert [found[name][:2] for name in (NAME, "new01", "off")] == [["!", "s3"], ["!", "none"], ["!", "none"]]
    # Without a limit, only what has no set at all stands out, and nothing fails.
    unlimited = hypervisor.play("status", "--check", sockets=monitors)
    assert unlimited.rc == 0, unlimited.output
    assert {name: row[0] for name, row in rows(unlimited.output).items()} == {NAME: " ", "new01": "!", "off": "!"}


def test_cancel(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(name=NAME)
    sets = Sets(directory / "repository")
    sets.start(vm, speed=SLOW)
    status = hypervisor.play("status")
    assert status.rc == 0, status.output
    assert "web01: set s1 is being made by hypervisor" in status.output
    checked = hypervisor.play("cancel", "--check")
    assert (checked.rc, checked.recap()["changed"]) == (0, 1), checked.output
    assert "1 set would be cancelled" in checked.output
    assert len(vm.block_jobs) == 1
    done = hypervisor.play("cancel")
    assert (done.rc, done.recap()["changed"]) == (0, 1), done.output
    assert "1 set cancelled" in done.output
    assert vm.block_jobs == []
    sets.assert_absent(NAME)
    again = hypervisor.play("cancel")
    assert (again.rc, again.recap()["changed"]) == (0, 0), again.output
    assert "no set is being made" in again.output


@pytest.mark.parametrize("shared", [True, False])
def test_cancel_of_some_vms_of_all_hypervisors(vms: Vms, directory: Path, shared: bool) -> None:
    started = []
    hosts = {}
    for number, name in enumerate(("web01", "db01", "db02")):
        vm = vms.start(vms.disk(number), name=name)
        sets = Sets(directory / ("repository" if shared else name))
        sets.start(vm, speed=SLOW)
        started.append(vm)
        hosts[f"hv{number}"] = {"vm_backup_repository": str(sets.path)}
    three = Hypervisor(directory, hosts=hosts)
    del three.variables["vm_backup_repository"]
    for options in (("--check",), ()):
        play = three.play("cancel", *options, names=["web*", "db01"])
        assert play.rc == 0, play.output
    assert [len(vm.block_jobs) for vm in started] == [0, 0, 1]
    play = three.play("cancel", names=["db02", "wbe01"])
    assert play.rc == 2, play.output
    assert "vm_backup_names: no repository of these hypervisors has a VM of the name wbe01. " in play.output
    assert started[2].block_jobs == []


def test_a_shared_repository_is_looked_after_once(chain: Chain, directory: Path) -> None:
    three = Hypervisor(directory, ("hv1", "hv2", "hv3"))
    verified = three.play("verify", id="")
    assert verified.rc == 0, verified.output
    assert verified.output.count("1 of 1 sets are good") == 1
    assert verified.output.count("is the repository of hv1 as well") == 2
    pruned = three.play("prune", keep={"last": 2}, consolidate=True)
    assert [pruned.recap(host)["changed"] for host in three.hosts] == [1, 0, 0], pruned.output
    status = three.play("status", sockets=[f"{chain.vm.directory}/*.qmp"])
    assert status.output.count("newest set") == 1
    assert rows(status.output)[NAME][-1] == "hv1, hv2, hv3"
