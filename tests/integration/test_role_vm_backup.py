# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role vm_backup and the playbook, as a user runs them."""

from __future__ import annotations

import re
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, snapshot
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, SLOW

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def hypervisor(directory: Path) -> Hypervisor:
    return Hypervisor(directory)


def sockets(*machines: Qemu) -> list[str]:
    return [f"{vm.directory}/*.qmp" for vm in machines]


def test_check_then_back_up_then_nothing_to_do(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    checked = hypervisor.run("--check", sockets=sockets(vm))
    assert checked.rc == 0, checked.output
    assert "start   web01" in checked.output
    assert checked.recap()["changed"] == 0
    assert not hypervisor.sets.path.exists()
    first = hypervisor.run(sockets=sockets(vm))
    assert first.rc == 0, first.output
    assert first.recap()["changed"] > 0
    assert "published  web01" in first.output
    hypervisor.sets.assert_good("web01", copies)
    before = snapshot(hypervisor.sets.path)
    second = hypervisor.run(sockets=sockets(vm))
    assert (second.rc, second.recap()["changed"]) == (0, 0)
    assert snapshot(hypervisor.sets.path) == before


def test_the_second_set_is_an_increment(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    assert hypervisor.run(sockets=sockets(vm)).rc == 0
    vm.write("drive0", 0x77, 5 << 20, 1 << 20)
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    checked = hypervisor.run("--check", sockets=sockets(vm), id="s2")
    assert "drive0: incremental" in checked.output
    assert "changes since set s1" in checked.output
    assert not (hypervisor.sets.path / "web01" / "s2").exists()
    second = hypervisor.run(sockets=sockets(vm), id="s2")
    assert second.rc == 0, second.output
    assert "1 incremental, 1 crash consistent" in second.output
    hypervisor.sets.assert_good("web01", copies, "s2", dict.fromkeys(copies, "incremental"))
    before = snapshot(hypervisor.sets.path)
    again = hypervisor.run(sockets=sockets(vm), id="s2")
    assert (again.rc, again.recap()["changed"]) == (0, 0)
    assert snapshot(hypervisor.sets.path) == before


def test_what_is_said_of_one_vm_wins(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    assert hypervisor.run(sockets=sockets(vm)).rc == 0
    own = [{"name": "web01", "monitor": str(vm.monitor), "level": "full", "quiesce": "none"}]
    play = hypervisor.run(vms=own, id="s2", level="incremental", quiesce="require")
    assert play.rc == 0, play.output
    assert hypervisor.sets.reasons("web01", "s2") == {"drive0": "a full image is asked for"}


def test_a_guest_that_must_be_frozen_and_cannot_be_has_no_set(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(sockets=sockets(vm), quiesce="require")
    assert play.rc != 0
    assert "quiesce: the VM" in play.output
    assert "no set s1 of web01;" in play.output
    hypervisor.sets.assert_absent("web01")
    # Nothing but the wish stood in its way.
    play = hypervisor.run(sockets=sockets(vm), quiesce="try")
    assert play.rc == 0, play.output
    assert "were not frozen: the VM" in play.output


def test_the_number_of_tasks_does_not_depend_on_the_number_of_vms(vms: Vms, hypervisor: Hypervisor) -> None:
    machines = [vms.start(vms.disk(number, size=8 << 20), name=f"vm{number}") for number in range(5)]
    one = hypervisor.run(sockets=sockets(machines[0]))
    five = hypervisor.run(sockets=sockets(*machines), id="s2", max_vms=2)
    assert (one.rc, five.rc) == (0, 0), five.output
    assert one.output.count("\nTASK [") == five.output.count("\nTASK [")
    assert "5 of 5 VMs have their set" in five.output


def test_case_35_a_vm_that_is_off_fails_at_the_end(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(sockets=[*sockets(vm), f"{directory}/off.qmp"])
    assert play.rc != 0
    assert "published  web01" in play.output
    assert "no set s1 of off;" in play.output
    assert f"-e vm_backup_id={ID}" in play.output
    assert hypervisor.run(sockets=[*sockets(vm), f"{directory}/off.qmp"], offline="skip").rc == 0


def test_tags_start_here_and_wait_there(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    started = hypervisor.run("--tags", "start", sockets=sockets(vm), speed=SLOW)
    assert started.rc == 0, started.output
    assert vm.job["status"] == "running"
    assert not (hypervisor.sets.path / "web01" / ID).exists()
    release(vm)
    waited = hypervisor.run("--tags", "wait", sockets=sockets(vm))
    assert waited.rc == 0, waited.output
    assert "published  web01" in waited.output


def test_tag_plan_only_plans(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run("--tags", "plan", sockets=sockets(vm))
    assert play.rc == 0
    assert "start   web01" in play.output
    assert not hypervisor.sets.path.exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"repository": "backup"}, "vm_backup_repository is 'backup'"),
        ({"repository_create": False}, "vm_backup_repository_create: true"),
        ({"sockets": []}, "vm_backup_vms, vm_backup_domains and vm_backup_sockets are all empty"),
        ({"id": "../up"}, "no id of a set"),
        ({"speed": "fast"}, "speed"),
        ({"max_chain": 0}, "max_chain: 0 is not from 1 to"),
        ({"reserve": "some"}, "reserve: 'some' is neither an amount"),
        ({"compression": "lzma"}, "value of vm_backup_compression must be one of"),
    ],
)
def test_preflight_refuses_and_says_what_to_do(
    vms: Vms, hypervisor: Hypervisor, variables: dict[str, t.Any], said: str
) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(**{"sockets": sockets(vm), **variables})
    assert play.rc != 0
    assert said in play.output
    assert not hypervisor.sets.path.exists()


def test_without_room_a_set_that_is_there_is_still_reported(vms: Vms, hypervisor: Hypervisor) -> None:
    done, new = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    assert hypervisor.run(sockets=sockets(done)).rc == 0
    play = hypervisor.run(sockets=sockets(done, new), reserve="100000T")
    assert play.rc == 2
    assert re.search(r"published  web01 .* \(was there\)", play.output)
    assert re.search(r"failed     db01   not enough space: .*make room, or lower the reserve", play.output)


def test_the_day_is_fixed_by_the_playbook(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(sockets=sockets(vm), id="")
    assert play.rc == 0, play.output
    [found] = [path.name for path in (hypervisor.sets.path / "web01").iterdir() if path.name != ".lock"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found)


def test_limited_to_one_hypervisor(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run("--limit", "hv1", sockets=sockets(vm), id="")
    assert play.rc == 0, play.output


def test_other_hosts_by_variable(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    assert hypervisor.run("-e", "vm_backup_hosts=hv1", sockets=sockets(vm)).rc == 0
    play = hypervisor.run("-e", "vm_backup_hosts=nobody", sockets=sockets(vm))
    assert "hv1 " not in play.output
