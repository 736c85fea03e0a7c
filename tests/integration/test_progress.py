# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The action plugin of backup_set: what a person sees, and that slices are nobody's business but its own."""

from __future__ import annotations

import json
import os
import re
import signal
import typing as t

import pytest
import yaml

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import WorkerPlace
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, SLOW

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

# Too slow for the first slice, also where nobody looks on, and through before anybody gets impatient.
LEISURELY = "4M"

BAR = re.compile(r"^hv1:   web01  \[[#.]{20}\] +\d+ %  [\d.]+ [KM]iB of 64\.0 MiB$", re.MULTILINE)


@pytest.fixture
def hypervisor(directory: Path) -> Hypervisor:
    return Hypervisor(directory)


def sockets(*machines: Qemu) -> list[str]:
    return [f"{vm.directory}/*.qmp" for vm in machines]


def write_playbook(hypervisor: Hypervisor, task: dict[str, t.Any]) -> str:
    """A playbook that plans, and has backup_set do it as `task` says; what that returns goes to `result.json`."""
    plan = {"repository": "{{ vm_backup_repository }}", "create_repository": True, "id": "{{ vm_backup_id }}"}
    tasks = [
        {
            "vmfleet.backup.backup_plan": {
                **plan,
                "reserve": "0",
                "vms": "{{ vm_backup_vms }}",
                "speed": "{{ vm_backup_speed | default('0') }}",
            },
            "register": "planned",
        },
        {
            "vmfleet.backup.backup_set": {"plan": "{{ planned.plan }}", **task.pop("with", {})},
            "register": "done",
            "ignore_errors": True,
            **task,
        },
        {"ansible.builtin.copy": {"content": "{{ done | to_json }}", "dest": f"{hypervisor.directory}/result.json"}},
    ]
    (hypervisor.directory / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "hypervisors", "gather_facts": False, "tasks": tasks}])
    )
    return "play.yml"


def returned(hypervisor: Hypervisor) -> dict[str, t.Any]:
    found: dict[str, t.Any] = json.loads((hypervisor.directory / "result.json").read_text())
    return found


def test_a_person_sees_how_far_it_is(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    with hypervisor.on_terminal("backup", sockets=sockets(vm), speed=SLOW) as screen:
        screen.wait_for("; .* left$")
        release(vm)
        play = screen.end()
    assert play.rc == 0, play.output
    assert "The copies continue after Ctrl-C" in play.output
    assert f"-e vm_backup_id={ID}." in play.output
    assert "hv1: 0 of 1 VMs done, 1 running; " in play.output
    # Nobody needs a total of one.
    assert "fleet: " not in play.output
    assert BAR.search(play.output), play.output
    assert "\nhv1: 1 of 1 VMs done; 64.0 MiB of 64.0 MiB (100 %)\n" in play.output
    hypervisor.sets.assert_good("web01", copies)


def spread(vms: Vms, directory: Path, speed: str, **disk: t.Any) -> tuple[Hypervisor, list[Qemu], dict[str, str]]:
    """Three hypervisors, a VM of each, and variables to back them up at this speed."""
    machines = [vms.start(vms.disk(number, **disk), name=f"vm{number}") for number in (1, 2, 3)]
    of_hosts = {f"hv{number}": sockets(vm) for number, vm in enumerate(machines, 1)}
    variables = {
        "sockets": f"{{{{ {of_hosts}[inventory_hostname] }}}}",
        "repository": f"{directory}/{{{{ inventory_hostname }}}}",
        "speed": speed,
    }
    return Hypervisor(directory, tuple(of_hosts)), machines, variables


def test_hypervisors_in_parallel_do_not_get_mixed_up(vms: Vms, directory: Path) -> None:
    hypervisor, machines, variables = spread(vms, directory, SLOW)
    with hypervisor.on_terminal("backup", **variables) as screen:
        for host in hypervisor.hosts:
            screen.wait_for(f"^{host}: 0 of 1 .* left$")
        for vm in machines:
            release(vm)
        play = screen.end()
    assert play.rc == 0, play.output
    assert play.output.count("The copies continue after Ctrl-C") == 1
    lines = play.output.splitlines()
    for number, line in enumerate(lines):
        if "VMs done, 1 running" in line and not line.startswith("fleet: "):
            # What belongs together stands together.
            assert re.match(rf"{line[:4]}   vm{line[2]}  \[", lines[number + 1]), play.output


def in_turns(vms: Vms, directory: Path) -> tuple[Hypervisor, list[Qemu], dict[str, str]]:
    """Three hypervisors with small disks: after its first pieces QEMU waits until it is let go."""
    return spread(vms, directory, "64K", size=8 * MIB)


def followed(vms: Vms, directory: Path, *options: str, line: str) -> str:
    """Back all of them up, and let the copies go when this line is there; returns what was shown."""
    hypervisor, machines, variables = in_turns(vms, directory)
    with hypervisor.on_terminal("backup", *options, **variables) as screen:
        screen.wait_for(line)
        for vm in machines:
            release(vm)
        play = screen.end()
    assert play.rc == 0, play.output
    return play.output


def test_all_are_told_of_though_they_are_followed_in_turns(vms: Vms, directory: Path) -> None:
    # The only fork follows the first one; the others copy, and are counted.
    line = "^fleet: 0 of 3 VMs done, 3 running; .*; 0 of 3 hypervisors done, 2 not followed yet$"
    output = followed(vms, directory, "--forks", "1", line=line)
    assert "Backup s1 of 3 hypervisors: 3 of 3 VMs have their set" in " ".join(output.split())


def test_where_none_waits_for_another_all_are_told_of(vms: Vms, directory: Path) -> None:
    line = "^fleet: 0 of 3 VMs done, 3 running; .*; 0 of 3 hypervisors done$"
    followed(vms, directory, "-e", "vm_backup_strategy=free", line=line)


def test_batches_are_a_fleet(vms: Vms, directory: Path) -> None:
    hypervisor, machines, variables = in_turns(vms, directory)
    with hypervisor.on_terminal("backup", "-e", "vm_backup_serial=2", **variables) as screen:
        screen.wait_for("^fleet: 0 of 2 VMs done, 2 running; .*; 0 of 2 hypervisors done$")
        for vm in machines[:2]:
            release(vm)
        screen.wait_for("^fleet: 2 of 3 VMs done, 1 running; .*; 2 of 3 hypervisors done$")
        release(machines[2])
        play = screen.end()
    assert play.rc == 0, play.output


def test_elsewhere_it_is_quiet(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(sockets=sockets(vm), speed=LEISURELY)
    assert play.rc == 0, play.output
    assert "\nhv1: 0 of 1 VMs done, 1 running; " in play.output
    assert not BAR.search(play.output)
    assert "1 of 1 VMs done" not in play.output


def test_nothing_is_shown_where_that_is_asked_for(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(sockets=sockets(vm), speed=LEISURELY, progress="none")
    assert play.rc == 0, play.output
    assert "VMs done" not in play.output
    wrong = hypervisor.run(sockets=sockets(vm), progress="loud")
    assert "value of vm_backup_progress must be one of" in wrong.output


def test_an_interrupted_run_goes_on(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    with hypervisor.on_terminal("backup", sockets=sockets(vm), speed=SLOW) as screen:
        screen.wait_for("1 running")
        screen.interrupt()
        play = screen.end()
    assert play.rc != 0
    job = vm.job
    assert job["status"] == "running"
    release(vm)
    play = hypervisor.run(sockets=sockets(vm))
    assert play.rc == 0, play.output
    assert "published  web01" in play.output
    hypervisor.sets.assert_good("web01", copies)


def test_an_interrupted_run_can_be_cancelled(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    with hypervisor.on_terminal("backup", sockets=sockets(vm), speed=SLOW) as screen:
        screen.wait_for("1 running")
        screen.interrupt()
        screen.end()
    play = hypervisor.play("cancel")
    assert play.rc == 0, play.output
    assert not vm.block_jobs
    hypervisor.sets.assert_absent("web01")


def test_slices_return_what_one_call_does(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    machines = [vms.start(vms.disk(number), name=f"vm{number}") for number in range(3)]
    # The first is copied, one fails at once, and one has to wait for its turn.
    wanted: list[dict[str, t.Any]] = [{"monitor": str(vm.monitor)} for vm in machines]
    wanted[1]["include_disks"] = ["nix"]
    found = {}
    for name, options, speed in (("slices", {}, LEISURELY), ("once", {"slice": 0}, "0")):
        playbook = write_playbook(hypervisor, {"with": {"max_vms": 1, **options}})
        play = hypervisor.play(playbook, vms=wanted, speed=speed, repository=f"{directory}/{name}")
        assert play.rc == 0, play.output
        assert ("VMs done" in play.output) == (name == "slices"), play.output
        found[name] = _comparable(returned(hypervisor), name)
    assert found["slices"]["msg"].startswith("1 of 3 VMs have no set s1: vm1: ")
    assert [vm["state"] for vm in found["slices"]["vms"]] == ["published", "failed", "published"]
    assert found["slices"] == found["once"]


def _comparable(result: dict[str, t.Any], name: str) -> dict[str, t.Any]:
    """A result without what is never twice the same."""
    kept = {key: value for key, value in result.items() if key not in ("invocation", "exception")}
    kept["qmp"] = sorted(entry["execute"] for entry in result["qmp"])
    text = json.dumps(kept).replace(f"/{name}/", "/repository/")
    text = re.sub(r'"duration": [\d.]+', '"duration": 0', text)
    text = re.sub(r"MiB in [\d.]+ s", "MiB", text)
    found: dict[str, t.Any] = json.loads(text)
    return found


@pytest.mark.parametrize("home", ["its own", "elsewhere"])
def test_async_is_not_sliced(
    vms: Vms, directory: Path, hypervisor: Hypervisor, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home == "elsewhere":
        (directory / "home").mkdir()
        monkeypatch.setenv("HOME", str(directory / "home"))
    vm = vms.start(name="web01")
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    playbook = write_playbook(hypervisor, {"async": 600, "poll": 1})
    play = hypervisor.play(playbook, vms=[{"monitor": str(vm.monitor)}], speed=LEISURELY)
    assert play.rc == 0, play.output
    assert "VMs done" not in play.output
    assert [found["state"] for found in returned(hypervisor)["vms"]] == ["published"]
    hypervisor.sets.assert_good("web01", copies)


def test_check_mode_is_one_call(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    playbook = write_playbook(hypervisor, {"check_mode": True})
    play = hypervisor.play(playbook, vms=[{"monitor": str(vm.monitor)}])
    assert play.rc == 0, play.output
    result = returned(hypervisor)
    assert (result["changed"], [found["state"] for found in result["vms"]]) == (True, ["published"])
    assert not hypervisor.sets.path.exists()


def test_defaults_of_the_group_reach_the_module(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    playbook = write_playbook(hypervisor, {"module_defaults": {"group/vmfleet.backup.backup": {"max_vms": -1}}})
    play = hypervisor.play(playbook, vms=[{"monitor": str(vm.monitor)}])
    assert play.rc == 0, play.output
    assert "max_vms: -1 is not from 0 to" in returned(hypervisor)["msg"]


def test_a_repository_that_goes_away_between_slices(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(name="web01")
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    playbook = write_playbook(hypervisor, {})
    marker, aside = hypervisor.sets.path / "vmfleet.json", directory / "aside"
    with hypervisor.on_terminal(playbook, vms=[{"monitor": str(vm.monitor)}], speed=SLOW) as screen:
        screen.wait_for("1 running")
        marker.rename(aside)
        screen.end()
    said = returned(hypervisor)["msg"]
    assert "1 of 1 VMs are unfinished, and their copies may still run: web01." in said
    assert f"Run the backup again with id {ID} to continue them" in said
    assert_it_goes_on(hypervisor, vm, aside, copies)


def test_a_repository_that_goes_away_from_its_worker(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB), name="web01")
    copies = {str(disk.id): vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    marker, aside = hypervisor.sets.path / "vmfleet.json", directory / "aside"
    with hypervisor.on_terminal("backup", sockets=sockets(vm), speed=SLOW) as screen:
        screen.wait_for("1 running")
        marker.rename(aside)
        play = screen.end()
    assert play.rc != 0
    assert "0 of 1 VMs have their set, 1 failed" in " ".join(play.output.split())
    assert_it_goes_on(hypervisor, vm, aside, copies)


def assert_it_goes_on(hypervisor: Hypervisor, vm: Qemu, aside: Path, copies: dict[str, Path]) -> None:
    """The next run makes the set when the repository is back, whose marker was put aside."""
    marker = hypervisor.sets.path / "vmfleet.json"
    assert not marker.exists()
    aside.rename(marker)
    release(vm)
    play = hypervisor.run(sockets=sockets(vm))
    assert play.rc == 0, play.output
    hypervisor.sets.assert_good("web01", copies)


def test_a_worker_that_is_killed_is_replaced(vms: Vms, directory: Path, hypervisor: Hypervisor) -> None:
    machines = [vms.start(vms.disk(number), name=f"vm{number}") for number in range(2)]
    copies = [{str(disk.id): vm.freeze(disk, directory / f"{disk.id}.qcow2") for disk in vm.disks} for vm in machines]
    place = WorkerPlace.of(str(hypervisor.sets.path))
    killed: list[int] = []
    with hypervisor.on_terminal("backup", sockets=sockets(*machines), speed=SLOW, max_vms=1) as screen:
        for _number in range(2):
            wait_until(lambda: place.is_held() and getattr(place.who(), "pid", 0) not in {0, *killed}, "the worker")
            who = place.who()
            assert who
            os.kill(who.pid, signal.SIGKILL)
            killed.append(who.pid)
        wait_until(lambda: not release_all(machines) and len(manifests(hypervisor)) == 2, "both sets", 3 * PATIENCE)
        play = screen.end()
    assert play.rc == 0, play.output
    assert "2 of 2 VMs have their set, 0 failed, 0 skipped" in " ".join(play.output.split())
    for number, expected in enumerate(copies):
        hypervisor.sets.assert_good(f"vm{number}", expected)


def test_a_worker_works_on_when_nobody_follows(vms: Vms, hypervisor: Hypervisor) -> None:
    machines = [vms.start(vms.disk(number), name=f"vm{number}") for number in range(2)]
    with hypervisor.on_terminal("backup", sockets=sockets(*machines), speed=SLOW, max_vms=1) as screen:
        screen.wait_for("1 running")
        screen.interrupt()
        screen.end()
    play = hypervisor.play("status")
    told = r"makes set \S+ since \S+ \(process \d+\): 0 of 2 VMs done, 1 running, 1 queued"
    assert re.search(told, " ".join(play.output.split())), play.output
    wait_until(lambda: not release_all(machines) and len(manifests(hypervisor)) == 2, "both sets", 3 * PATIENCE)
    wait_until(lambda: not WorkerPlace.of(str(hypervisor.sets.path)).is_held(), "the end of the worker")
    play = hypervisor.run(sockets=sockets(*machines))
    assert (play.rc, play.recap()["changed"]) == (0, 0), play.output


def manifests(hypervisor: Hypervisor) -> list[Path]:
    return list(hypervisor.sets.path.glob(f"*/{ID}/manifest.json"))


def release_all(machines: list[Qemu]) -> None:
    """Let all copies go on that run at this moment."""
    for vm in machines:
        release(vm)
