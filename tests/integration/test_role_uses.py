# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role vm_backup, used more than once in a playbook: each use begins clean and tells of itself."""

from __future__ import annotations

import re
import typing as t

import pytest
import yaml

from ansible_collections.vmfleet.backup.tests.harness.library import Chain
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import ID

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play

pytestmark = pytest.mark.usefixtures("clean")


class Playbook:
    """A playbook of a user, whose tasks are given."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor
        self.path = hypervisor.directory / "own.yml"

    def run(self, *tasks: dict[str, t.Any], serial: str = "100%", **variables: t.Any) -> Play:
        play = {"name": "Own", "hosts": "hypervisors", "gather_facts": False, "serial": serial, "tasks": list(tasks)}
        self.path.write_text(yaml.safe_dump([play], sort_keys=False))
        return self.hypervisor.play(str(self.path), **variables)


def use(
    name: str = "Use", tasks_from: str = "main", loop: t.Sequence[t.Any] = (), **variables: t.Any
) -> dict[str, t.Any]:
    """A task that includes the role, with variables that are given without their prefix."""
    found: dict[str, t.Any] = {
        "name": name,
        "ansible.builtin.include_role": {"name": "vmfleet.backup.vm_backup", "tasks_from": tasks_from},
        "vars": {f"vm_backup_{key}": value for key, value in variables.items()},
    }
    return {**found, "loop": list(loop)} if loop else found


def tried_again(first: dict[str, t.Any], *second: dict[str, t.Any]) -> dict[str, t.Any]:
    return {"name": "Try", "block": [first], "rescue": list(second)}


@pytest.fixture
def playbook(directory: Path) -> Playbook:
    return Playbook(Hypervisor(directory))


def published(hypervisor: Hypervisor) -> set[str]:
    """The sets that there are, as VM/id."""
    return {f"{path.parent.parent.name}/{path.parent.name}" for path in hypervisor.sets.path.glob("*/*/manifest.json")}


def test_again_after_a_plan_that_failed(vms: Vms, playbook: Playbook) -> None:
    vm = vms.start(name="web01")
    play = playbook.run(tried_again(use(repository="relative"), use()), sockets=[str(vm.monitor)])
    assert play.rc == 0, play.output
    assert "vm_backup_repository is 'relative'" in play.output
    assert "1 of 1 VMs have their set, 0 failed" in play.output
    assert published(playbook.hypervisor) == {f"web01/{ID}"}


def test_again_after_a_vm_that_failed(vms: Vms, playbook: Playbook) -> None:
    """One run does not try a VM twice. Whoever asks again has a run of his own."""
    vm = vms.start(name="web01")
    play = playbook.run(tried_again(use(quiesce="require"), use()), sockets=[str(vm.monitor)])
    assert play.rc == 0, play.output
    assert f"no set {ID} of web01" in play.output
    assert published(playbook.hypervisor) == {f"web01/{ID}"}


def test_again_after_a_hypervisor_that_could_not_be_reached(vms: Vms, playbook: Playbook) -> None:
    vm = vms.start(name="web01")
    off = {"ansible_connection": "ssh", "ansible_ssh_common_args": "-o ProxyCommand=false"}
    first = use()
    first["vars"].update(off)
    play = playbook.run(tried_again(first, use()), sockets=[str(vm.monitor)])
    assert play.rc == 0, play.output
    assert "Failed to connect" in play.output
    assert published(playbook.hypervisor) == {f"web01/{ID}"}


def test_what_fails_again_says_why_it_did_now(vms: Vms, playbook: Playbook) -> None:
    vm = vms.start(name="web01")
    play = playbook.run(tried_again(use(repository="relative"), use(speed="fast")), sockets=[str(vm.monitor)])
    assert play.rc != 0
    last = play.output.rpartition("Fail if a VM has no set")[2]
    assert "speed" in last
    assert "relative" not in last


def test_a_loop_over_repositories(vms: Vms, directory: Path, playbook: Playbook) -> None:
    vm = vms.start(name="web01")
    places = [str(directory / name) for name in ("one", "two")]
    play = playbook.run(use(repository="{{ item }}", loop=places), sockets=[str(vm.monitor)], id="")
    assert play.rc == 0, play.output
    ids = [path.parent.name for place in places for path in (directory / place).glob("web01/*/manifest.json")]
    assert len(ids) == 2
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", found) for found in ids)


def test_a_loop_over_ids(vms: Vms, playbook: Playbook) -> None:
    vm = vms.start(name="web01")
    play = playbook.run(use(id="{{ item }}", loop=["a", "b"]), sockets=[str(vm.monitor)])
    assert play.rc == 0, play.output
    assert published(playbook.hypervisor) == {"web01/a", "web01/b"}
    assert [re.findall(rf"Backup {name} of hv1 .*: 1 of 1 VMs", play.output) != [] for name in "ab"] == [True, True]


def test_the_summary_is_about_those_who_take_part(vms: Vms, directory: Path, playbook: Playbook) -> None:
    """Of three hypervisors one takes part in the second use; another has failed before it."""
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    playbook.hypervisor.hosts = {
        "hv1": {"vm_backup_sockets": [str(vm.monitor)]},
        "hv2": {"vm_backup_sockets": [str(other.monitor)]},
        "hv3": {"vm_backup_sockets": [f"{directory}/off.qmp"]},
    }
    second = {**use("Second", id="s2", repository=str(directory / "second")), "when": "inventory_hostname == 'hv1'"}
    play = playbook.run(use("First"), second)
    assert play.rc != 0
    first, last = re.findall(r"Backup (s\d) of (\d) hypervisors: (\d) of (\d) VMs have their set", play.output)
    assert first == (ID, "3", "2", "3")
    # hv2 has nothing to do with it, and hv3 was lost before.
    assert last == ("s2", "2", "1", "1")
    assert "FAILED  hv3: it was lost before" in play.output.partition("TASK [Second]")[2]
    assert "the playbook of this play, with -e vm_backup_id=s2 --limit hv3" in play.output


def test_the_summary_of_another_try_is_about_all_that_have_the_set(vms: Vms, playbook: Playbook) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    playbook.hypervisor.hosts = {
        "hv1": {"vm_backup_sockets": [str(vm.monitor)]},
        "hv2": {"vm_backup_sockets": [str(other.monitor)], "vm_backup_quiesce": "require"},
    }
    play = playbook.run(tried_again(use(), use(quiesce="none")))
    assert play.rc == 0, play.output
    heads = re.findall(rf"Backup {ID} of 2 hypervisors: (\d) of (\d) VMs", play.output)
    assert heads == [("1", "2"), ("2", "2")], play.output


def test_no_verb_is_left_to_one_who_takes_no_part(vms: Vms, directory: Path, playbook: Playbook) -> None:
    chain = Chain(vms, directory)
    playbook.hypervisor.hosts = ("hv1", "hv2")
    second = {**use("Second", "verify"), "when": "inventory_hostname == 'hv2'"}
    play = playbook.run(use("First", "verify"), second, id="")
    assert play.rc == 0, play.output
    assert len(chain.library.listed()) == 3
    first, last = play.output.split("TASK [Second]")
    assert first.count("1 of 1 sets are good") == 1
    assert last.count("1 of 1 sets are good") == 1


def test_a_batch_does_not_speak_of_those_to_come(vms: Vms, playbook: Playbook) -> None:
    vm, other = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    playbook.hypervisor.hosts = {
        "hv1": {"vm_backup_sockets": [str(vm.monitor)]},
        "hv2": {"vm_backup_sockets": [str(other.monitor)]},
    }
    play = playbook.run(use(), serial="1")
    assert play.rc == 0, play.output
    assert "FAILED" not in play.output
