# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The backup of a whole fleet over SSH, also while parts of it break."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import WorkerPlace
from ansible_collections.vmfleet.backup.plugins.module_utils._report.record import parse_report
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.fleet import Fleet
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import ScriptedAgent

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fleet import Hypervisor
    from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = [
    pytest.mark.slow,
    # Dozens of processes want the processor at the same time.
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0, reason="a machine of its own needs root"),
]

# After its first pieces QEMU waits for a minute, so that a job with more to copy is there until it is let go.
SLOW = "64K"
# Seconds for what a whole fleet does at the same time.
PLENTY = 300.0
BIG = 8 * MIB

# As an administrator has it who wants batches: the id is fixed before the first one.
OWN_PLAYBOOK = """
- name: Fix the id of the run
  hosts: localhost
  gather_facts: false
  tasks:
    - name: Take the time, once for all hypervisors
      ansible.builtin.set_fact:
        backup_id: "{{ now(utc=true).strftime('%Y-%m-%dT%H%M%S') }}"

- name: Back up
  hosts: hypervisors
  gather_facts: false
  serial: 3
  strategy: STRATEGY
  any_errors_fatal: false
  vars:
    vm_backup_id: "{{ hostvars.localhost.backup_id }}"
  roles:
    - vmfleet.backup.vm_backup
"""


@pytest.fixture
def fleet() -> t.Iterator[Fleet]:
    with Fleet() as fleet:
        yield fleet


def name_of(vm: Qemu) -> str:
    return vm.monitor.stem


def assert_good(hypervisor: Hypervisor, vm: Qemu, set_id: str = ID, level: str = "full") -> None:
    """The set of a VM holds what its disks hold now."""
    sources = {}
    for disk in vm.disks:
        assert disk.path
        vm.io(disk.name, "flush")
        sources[disk.name] = disk.path
    hypervisor.sets.assert_good(name_of(vm), sources, set_id, dict.fromkeys(sources, level))


def assert_all_good(fleet: Fleet, set_id: str = ID, level: str = "full") -> None:
    for hypervisor in fleet.hypervisors:
        for vm in hypervisor.vms:
            assert_good(hypervisor, vm, set_id, level)


def published(hypervisor: Hypervisor, set_id: str = ID) -> set[str]:
    return {path.parent.parent.name for path in hypervisor.sets.path.glob(f"*/{set_id}/manifest.json")}


def tasks(play: Play, host: str) -> int:
    """How many tasks Ansible has done for a host."""
    recap = play.recap(host)
    return sum(recap[kind] for kind in ("ok", "skipped", "failed", "unreachable", "rescued", "ignored"))


def copies(vm: Qemu) -> bool:
    return bool(vm.block_jobs)


def release_all(vms: t.Iterable[Qemu]) -> None:
    for vm in vms:
        # One that has just been killed has no jobs to be released.
        with contextlib.suppress(OSError):
            if vm.alive:
                release(vm)


def test_eight_hypervisors_with_ten_vms_each(fleet: Fleet) -> None:
    for _number in range(8):
        fleet.add(vms=10)
    first = fleet.back_up("--forks", "8", id="s1")
    assert first.rc == 0, first.output
    assert_all_good(fleet, "s1")
    for number, vm in enumerate(fleet.vms):
        for disk in vm.disks:
            vm.write(disk.name, number + 100, MIB, 65536)
    second = fleet.back_up("--forks", "3", id="s2")
    assert second.rc == 0, second.output
    assert_all_good(fleet, "s2", "incremental")
    # What is done once for all is done for the first one.
    recaps = [second.recap(hypervisor.name) for hypervisor in fleet.hypervisors[1:]]
    assert recaps == [recaps[0]] * 7
    assert len({path.read_text() for path in fleet.directory.glob("hv*/machine-id")}) == 8


def test_the_number_of_tasks_is_the_same_for_one_vm_and_for_ten(fleet: Fleet) -> None:
    # What is done once for all is done for the first one.
    for vms in (1, 1, 10):
        fleet.add(vms=vms)
    for set_id in ("s1", "s2"):
        play = fleet.back_up(id=set_id, max_vms=2)
        assert play.rc == 0, play.output
        assert tasks(play, "hv2") == tasks(play, "hv3") > 0
    assert_all_good(fleet, "s2", "incremental")


def test_batches_have_one_id(fleet: Fleet) -> None:
    for _number in range(4):
        fleet.add(vms=1)
    ids: set[str] = set()
    for strategy, level in (("linear", "full"), ("free", "incremental")):
        playbook = fleet.directory / f"{strategy}.yml"
        playbook.write_text(OWN_PLAYBOOK.replace("STRATEGY", strategy))
        play = fleet.play(playbook, "--forks", "2")
        assert play.rc == 0, play.output
        # The second batch begins seconds after the first one, and its sets have the same id.
        [set_id] = {path.parent.name for path in manifests(fleet)} - ids
        ids.add(set_id)
        assert_all_good(fleet, set_id, level)
    play = fleet.back_up("--forks", "2", "-e", "vm_backup_serial=3", "-e", "vm_backup_strategy=free")
    assert play.rc == 0, play.output
    [set_id] = {path.parent.name for path in manifests(fleet)} - ids
    assert_all_good(fleet, set_id, "incremental")


def test_a_batch_that_is_lost_does_not_stop_the_next(fleet: Fleet) -> None:
    for room in (1 << 30, MIB, 1 << 30):
        fleet.add(vms=1, room=room)
    lost, full, healthy = fleet.hypervisors
    lost.cut_off()
    play = fleet.back_up("-e", "vm_backup_serial=1", id=ID)
    assert play.rc != 0
    assert published(full) == set()
    assert_good(healthy, healthy.vms[0])
    assert play.recap(healthy.name)["failed"] == 0
    assert_named_once(play, [lost.name, full.name])


class HungAgent:
    """The channel of an agent that takes whatever it is told, and never answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)

    def close(self) -> None:
        self._listener.close()
        self.path.unlink()


def test_what_breaks_during_a_run_is_mended_by_the_next(fleet: Fleet) -> None:
    lost, killed, full, mute, healthy = (
        fleet.add(vms=2, size=BIG),
        fleet.add(vms=2, size=BIG),
        # Enough for one of the VMs.
        fleet.add(vms=2, room=6 * MIB),
        fleet.add(vms=2),
        fleet.add(vms=2),
    )
    victim, survivor = killed.vms
    for hypervisor in (lost, killed):
        hypervisor.variables["vm_backup_speed"] = SLOW
    agent = mute.directory / "agent"
    mute.variables["vm_backup_vms"] = [
        {"monitor": f"{mute.directory}/{name_of(vm)}.qmp", "agent": str(agent), "quiesce": quiesce}
        for vm, quiesce in zip(mute.vms, ("try", "require"), strict=True)
    ]

    with contextlib.closing(HungAgent(agent)):
        run = fleet.start("vmfleet.backup.backup", id=ID)
        for vm in (*lost.vms, victim):
            wait_until(lambda vm=vm: copies(vm) or not run.running, f"the jobs of {name_of(vm)}", PLENTY)
        assert run.running, run.output
        lost.cut_off()
        victim.kill()
        first = run.wait(lambda: release_all([survivor]))

    assert first.rc != 0
    assert first.recap(lost.name)["unreachable"] + first.recap(lost.name)["failed"] == 1, first.output
    assert published(killed) == {name_of(survivor)}
    assert len(published(full)) == 1
    assert published(mute) == {name_of(mute.vms[0])}
    assert published(healthy) == {name_of(vm) for vm in healthy.vms}
    assert first.recap(healthy.name)["failed"] == first.recap(healthy.name)["unreachable"] == 0
    [too_big] = {name_of(vm) for vm in full.vms} - published(full)
    assert_named_once(first, [lost.name, name_of(victim), too_big, name_of(mute.vms[1])])
    before = {path: path.stat() for path in manifests(fleet)}

    lost.connect()
    killed.start_again(victim)
    full.grow(64 * MIB)
    with ScriptedAgent(agent):
        second = fleet.start("vmfleet.backup.backup", id=ID).wait(lambda: release_all(fleet.vms))
    assert second.rc == 0, second.output
    assert_all_good(fleet)
    for path, status in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


def manifests(fleet: Fleet) -> list[Path]:
    return [path for each in fleet.hypervisors for path in each.sets.path.glob("*/*/manifest.json")]


def assert_named_once(play: Play, names: list[str]) -> None:
    """What the last play tells of the fleet has one line for each failure."""
    told = play.output.rpartition("\nPLAY [")[2].partition("\nPLAY RECAP")[0]
    lines = [line for line in told.splitlines() if line.startswith("FAILED ")]
    for name in names:
        assert len([line for line in lines if re.search(rf"(?<![\w/-]){name}(?![\w/-])", line)]) == 1, play.output


def test_the_controller_is_killed(fleet: Fleet) -> None:
    for _number in range(3):
        fleet.add(vms=2, size=BIG)
    run = fleet.start("vmfleet.backup.backup", id=ID, speed=SLOW)
    for vm in fleet.vms:
        wait_until(lambda vm=vm: copies(vm) or not run.running, f"the jobs of {name_of(vm)}", PLENTY)
    assert run.running, run.output
    run.kill()
    for hypervisor in fleet.hypervisors:
        assert published(hypervisor) == set()
    # What QEMU has begun goes on.
    jobs = [{job["device"] for job in vm.block_jobs} for vm in fleet.vms]
    again = fleet.start("vmfleet.backup.backup", id=ID, speed=SLOW)
    wait_until(lambda: "TASK [vmfleet.backup.vm_backup : Wait" in again.output or not again.running, "the wait", PLENTY)
    assert [{job["device"] for job in vm.block_jobs} for vm in fleet.vms] == jobs
    play = again.wait(lambda: release_all(fleet.vms))
    assert play.rc == 0, play.output
    assert_all_good(fleet)


def test_nobody_is_needed_once_the_copies_have_been_started(fleet: Fleet) -> None:
    for _number in range(3):
        fleet.add(vms=2)
    play = fleet.back_up("--forks", "1", id=ID, speed=SLOW, max_vms=1, detach=True)
    assert play.rc == 0, play.output
    assert "Backup s1 of 3 hypervisors: 0 of 6 VMs have their set, 0 failed, 0 skipped" in play.output
    assert play.output.count("The hypervisor continues without Ansible") == 3
    # No controller is left. The second VM of each hypervisor gets its turn all the same.
    wait_until(lambda: not release_all(fleet.vms) and len(manifests(fleet)) == 6, "the sets of all VMs", PLENTY)
    assert_all_good(fleet)
    again = fleet.back_up(id=ID)
    assert again.rc == 0, again.output
    assert [again.recap(hypervisor.name)["changed"] for hypervisor in fleet.hypervisors] == [0, 0, 0]


@pytest.mark.parametrize("lost", ["controller", "sshd"])
def test_all_sets_are_made_though_their_followers_are_lost(fleet: Fleet, lost: str) -> None:
    for _number in range(3):
        fleet.add(vms=2)
    reports, metrics = fleet.directory / "reports", fleet.directory / "metrics"
    metrics.mkdir()
    wanted = {"id": ID, "speed": SLOW, "max_vms": 1, "report_dir": str(reports), "metrics_dir": str(metrics)}
    run = fleet.start("vmfleet.backup.backup", "--forks", "2", **wanted)
    for hypervisor in fleet.hypervisors:
        wait_until(lambda it=hypervisor: any(map(copies, it.vms)) or not run.running, "the first copy", PLENTY)
    assert run.running, run.output
    assert manifests(fleet) == []
    if lost == "controller":
        run.kill()
        wait_until(lambda: not kill_forks(fleet), "the end of what it has forked")
    else:
        for hypervisor in fleet.hypervisors:
            hypervisor.cut_off()
    # From here on, nobody reaches a hypervisor. The second VM of each gets its turn all the same.
    wait_until(lambda: not release_all(fleet.vms) and len(manifests(fleet)) == 6, "the sets of all VMs", PLENTY)
    wait_until(lambda: not any(map(works, fleet.hypervisors)), "the end of the workers", PLENTY)
    assert_all_good(fleet)
    if lost == "sshd":
        play = run.wait()
        assert play.rc != 0
        assert_named_once(play, [hypervisor.name for hypervisor in fleet.hypervisors])
        for hypervisor in fleet.hypervisors:
            hypervisor.connect()
    before = {path: path.stat() for path in manifests(fleet)}
    again = fleet.back_up(**wanted)
    assert again.rc == 0, again.output
    told = "Backup s1 of 3 hypervisors: 6 of 6 VMs have their set, 0 failed, 0 skipped, 0 Bytes written"
    assert told in " ".join(again.output.split())
    assert again.output.count("(was there)") == 6
    # What changes are the metrics, and the report, which the first hypervisor's play writes.
    assert [again.recap(hypervisor.name)["changed"] for hypervisor in fleet.hypervisors] == [2, 1, 1]
    assert {path: path.stat().st_mtime_ns for path in before} == {path: it.st_mtime_ns for path, it in before.items()}
    # What was made while nobody looked is told like what is made in a run.
    report = parse_report(json.loads((reports / f"{ID}.json").read_text()))
    counts = {name: report["summary"][name] for name in ("vms", "published", "failed", "new")}
    assert counts == {"vms": 6, "published": 6, "failed": 0, "new": 0}
    seconds = {path: json.loads(path.read_text())["duration"] for path in before}
    told = [vm["last"]["duration"] for hypervisor in report["hypervisors"] for vm in hypervisor["vms"]]
    assert sorted(told) == sorted(seconds.values())
    text = "".join(path.read_text() for path in metrics.iterdir())
    for name, value in (("last_success_timestamp_seconds", "[1-9][0-9]*"), ("failed", "0")):
        assert len(re.findall(rf"(?m)^vmfleet_backup_{name}{{.*}} {value}$", text)) == 6, text


def kill_forks(fleet: Fleet) -> list[int]:
    """Kill what ansible-playbook has forked, which would go on without it; returns who was there."""
    there = [pid for program in ("ansible-playboo", "ssh") for pid in fleet.controller.pids(program)]
    for pid in there:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return there


def works(hypervisor: Hypervisor) -> bool:
    """Whether there is a worker."""
    there = WorkerPlace.of(str(hypervisor.repository))
    return WorkerPlace(*(str(hypervisor.seen_here(Path(path))) for path in there)).is_held()


LEFT_ALONE = """
import sys, time
from ansible_collections.vmfleet.backup.tests.harness.fleet import Fleet

fleet = Fleet().__enter__()
hypervisor = fleet.add(vms=1)
[vm] = fleet.vms
run = fleet.start("vmfleet.backup.backup", id="s1", speed="1K")
while not vm.block_jobs:
    time.sleep(0.1)
print(fleet.directory, vm.directory, hypervisor.pid, fleet.controller.pid, vm.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_a_fleet_whose_test_was_killed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout
        *directories, hypervisor, controller, vm = process.stdout.readline().split()
        machines = {os.readlink(f"/proc/{pid}/ns/pid_for_children") for pid in (hypervisor, controller)}
        assert os.readlink(f"/proc/{vm}/ns/pid") in machines
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def nothing() -> bool:
        return not any(Path(path).exists() for path in directories) and not any(map(inhabited, machines))

    wait_until(nothing, "the end of all that there was")


def inhabited(machine: str) -> bool:
    for process in Path("/proc").glob("[1-9]*"):
        # Processes come and go meanwhile, and not everybody's may be looked into.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.readlink(process / "ns/pid") == machine:
                return True
    return False
