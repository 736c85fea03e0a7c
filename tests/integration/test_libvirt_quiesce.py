# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Guests of a real libvirt are frozen through it, and do not stay frozen, whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import guest_agent, guest_freeze
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_freeze import AgentPlace, Freezer
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.libvirt_agent import LibvirtAgent
from ansible_collections.vmfleet.backup.tests.harness import binding
from ansible_collections.vmfleet.backup.tests.harness.forks import Fork
from ansible_collections.vmfleet.backup.tests.harness.guest import DISKS, built
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import QmpError
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets, result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")]

ADDRESS = "libvirt:guest"
PLACE = AgentPlace(ADDRESS, "qemu:///system")
CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
REQUIRED: dict[str, t.Any] = {"vms": [{"monitor": ADDRESS, "quiesce": "require"}]}


def status(domain: Domain) -> str:
    """Return what the agent says of the guest's file systems; nothing where it says nothing."""
    asked = json.dumps({"execute": "guest-fsfreeze-status"})
    done = domain.libvirt.attempt("virsh", "qemu-agent-command", "--domain", domain.name, "--timeout", "5", asked)
    return str(json.loads(done.stdout)["return"]) if done.returncode == 0 else ""


def written(domain: Domain) -> int:
    return sum(int(disk["stats"]["wr_bytes"]) for disk in domain.qmp("query-blockstats"))


def assert_writes(domain: Domain) -> None:
    """The guest goes on, and its agent says so."""
    wait_until(lambda: status(domain) == "thawed", "the guest to be thawed")
    before = written(domain)
    wait_until(lambda: written(domain) > before, "the guest's next writes")


@pytest.fixture
def sets(libvirt: Libvirt, directory: Path) -> Sets:
    return Sets(directory / "repository", libvirt.inside)


def frozen_by(domain: Domain, go_on: Path) -> Fork:
    """Return a process that has frozen the guest, and thaws when the file is there."""

    async def run() -> None:
        freezer = Freezer(PLACE)
        async with freezer:
            print(freezer.filesystems, flush=True)
            while not go_on.exists():
                await asyncio.sleep(0.05)
        print(freezer.held, freezer.thaw_error, flush=True)

    process = Fork(lambda: asyncio.run(run()), b"", domain.libvirt.inside)
    wait_until(lambda: status(domain) == "frozen", "the guest to be frozen")
    return process


def guards(domain: Domain) -> list[int]:
    """Return the guards that live, by the ids that they have inside."""
    # Of a long command line, ps shows the beginning.
    return [pid for pid, line in domain.libvirt.processes.items() if " -I -S -B -c" in line]


# Without a guest. After each of these, all domains are removed: none of them may come later.


@pytest.mark.parametrize(
    ("channel", "reason"),
    [
        (CHANNEL, "no agent has opened its channel"),
        ("", "the VM has no channel for a guest agent"),
    ],
)
def test_guest_without_an_agent(libvirt: Libvirt, directory: Path, sets: Sets, channel: str, reason: str) -> None:
    libvirt.start("guest", DomainDisk(create(directory / "a.qcow2", MIB)), devices=channel)
    found = result_of(sets.back_up(vms=[{"monitor": ADDRESS, "quiesce": "try"}]), "guest")
    assert (found["state"], found["consistency"]) == ("published", "crash")
    assert reason in found["consistency_reason"]
    result = sets.fail(id="s2", **REQUIRED)
    assert f"quiesce: {reason}" in result["msg"]


def test_domain_that_has_gone(libvirt: Libvirt) -> None:
    def main() -> None:
        for ask in (guest_freeze.check, guest_freeze.thaw):
            try:
                asyncio.run(ask(PLACE))
            except BackupError as error:
                print(f"{type(error).__name__}: {error}")

    process = Fork(main, b"", libvirt.inside)
    output, _told = process.communicate(PATIENCE)
    told = f"AgentGone: {ADDRESS}: libvirt has no domain of this name"
    assert [line.startswith(told) for line in output.splitlines()] == [True, True]


# With a guest, which all of these have in common


@pytest.fixture(scope="module")
def running(libvirt_bed: Libvirt) -> t.Iterator[Domain]:
    """A Linux that writes to two disks, and has an agent."""
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path:
        # libvirt's QEMU is no root.
        directory = Path(path)
        directory.chmod(0o755)
        for name in ("vmlinuz", "initrd.img", *(f"{disk}.qcow2" for disk in DISKS)):
            shutil.copy(built() / name, directory / name)
        disks = [
            DomainDisk(directory / f"{disk}.qcow2", f"vd{letter}") for letter, disk in zip("ab", DISKS, strict=True)
        ]
        boot = (
            f"<kernel>{directory}/vmlinuz</kernel><initrd>{directory}/initrd.img</initrd>"
            "<cmdline>console=ttyS0 quiet panic=-1 writer agent</cmdline>"
        )
        console = directory / "console"
        console.touch()
        devices = f"{CHANNEL}<serial type='file'><source path='{console}'/></serial>"
        domain = libvirt_bed.start("guest", *disks, memory=192, os=boot, devices=devices)
        # A busy machine takes long for a boot.
        wait_until(lambda: "GUEST READY" in console.read_text(errors="replace"), "the guest's start", 5 * PATIENCE)
        wait_until(lambda: status(domain) == "thawed", "the guest's agent")
        yield domain
        domain.destroy()


@pytest.fixture
def guest(running: Domain) -> t.Iterator[Domain]:
    """It ends thawed."""
    yield running
    assert_writes(running)
    assert not running.qmp("query-jobs")


@pytest.fixture
def own_sets(running: Domain, directory: Path) -> Sets:
    return Sets(directory / "repository", running.libvirt.inside)


def test_set_of_a_guest_at_rest(guest: Domain, own_sets: Sets) -> None:
    [vm] = succeed("vm_info", {"monitors": [ADDRESS]}, inside=guest.libvirt.inside)["vms"]
    assert vm["agent"] == {"socket": ADDRESS, "connected": True}
    for set_id, level in (("s1", "full"), ("s2", "incremental")):
        found = result_of(own_sets.back_up(id=set_id, **REQUIRED), "guest")
        assert (found["state"], found["consistency"], found["consistency_reason"]) == ("published", "filesystem", "")
        assert found["frozen_ms"] > 0
        assert set(own_sets.levels("guest", set_id).values()) == {level}
        assert_writes(guest)
    assert guards(guest) == []


def test_module_is_killed(guest: Domain, directory: Path) -> None:
    process = frozen_by(guest, directory / "go-on")
    process.send_signal(signal.SIGKILL)
    assert_writes(guest)
    wait_until(lambda: not guards(guest), "the end of the guard")


def test_guard_is_killed(guest: Domain, directory: Path) -> None:
    process = frozen_by(guest, directory / "go-on")
    [guard] = guards(guest)
    guest.libvirt.send_signal(signal.SIGKILL, guard)
    (directory / "go-on").touch()
    assert process.communicate(PATIENCE) == ("2\nTrue \n", "")


def test_libvirtd_is_restarted(guest: Domain, directory: Path) -> None:
    process = frozen_by(guest, directory / "go-on")
    guest.libvirt.restart_daemon()
    assert status(guest) == "frozen"
    (directory / "go-on").touch()
    assert process.communicate(PATIENCE) == ("2\nTrue \n", "")


def test_module_and_guard_are_killed(guest: Domain, own_sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Freezer.__aenter__

    async def enter_and_stop(freezer: Freezer) -> Freezer:
        await enter(freezer)
        os.kill(os.getpid(), signal.SIGSTOP)
        return freezer

    plan = own_sets.plan(**REQUIRED)["plan"]
    with monkeypatch.context() as patch:
        patch.setattr(Freezer, "__aenter__", enter_and_stop)
        process = ModuleProcess("backup_set", {"plan": plan}, inside=guest.libvirt.inside)
        wait_until(lambda: status(guest) == "frozen", "the guest to be frozen")
        for pid in guards(guest):
            guest.libvirt.send_signal(signal.SIGKILL, pid)
        process.kill()
    assert status(guest) == "frozen"
    assert not guards(guest)
    found = result_of(succeed("backup_set", {"plan": plan}, inside=guest.libvirt.inside), "guest")
    assert (found["state"], found["consistency"]) == ("published", "filesystem")


def test_freeze_that_was_given_up_and_comes_later(guest: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = guest.pid
    freeze = LibvirtAgent.freeze

    async def freeze_when_it_stands_still(agent: LibvirtAgent) -> int:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(4.0, os.kill, (pid, signal.SIGCONT)).start()
        try:
            return await freeze(agent)
        finally:
            print(f"given up at {time.monotonic()}", flush=True)

    def be_guard() -> None:
        ours, guards_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guest_freeze._run(guest_freeze._guard(PLACE, guards_end))
        while ours.recv(65536, socket.MSG_DONTWAIT | socket.MSG_PEEK):
            print(ours.recv(65536).decode())

    monkeypatch.setattr(guest_agent, "FREEZE_TIMEOUT", 1.0)
    monkeypatch.setattr(guest_agent, "THAW_TIMEOUT", 1.0)
    monkeypatch.setattr(LibvirtAgent, "freeze", freeze_when_it_stands_still)
    process = Fork(be_guard, b"", guest.libvirt.inside)
    output, _told = process.communicate(PATIENCE)
    words = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert "since" in words[0]
    assert "did not answer guest-fsfreeze-freeze within 1 s" in words[1]["error"]
    assert words[1]["silent"]
    assert words[2]["held"] is False
    # It is thawed, whether the freeze came or not.
    assert status(guest) == "thawed"


def test_worker_freezes_when_its_module_has_gone(guest: Domain, own_sets: Sets, directory: Path) -> None:
    """Ansible removes what it has packed for a module when that ends: a guard begins anew in a process of its own."""
    libvirt = guest.libvirt
    other = libvirt.start("other", DomainDisk(patterned(directory / "other.qcow2", size=8 * MIB)))
    play = Packed(directory, inside=libvirt.inside)
    vms = [{"monitor": "libvirt:other"}, REQUIRED["vms"][0]]
    options: dict[str, t.Any] = {"vms": vms, "max_vms": 1, "speed": "64K", "detach": True}
    begun = play.run(**options)
    assert begun.rc == 0, begun.output
    assert re.search("queued +guest", begun.output), begun.output
    [job] = other.qmp("query-block-jobs")
    other.qmp("block-job-set-speed", device=job["device"], speed=0)
    place = own_sets.directory("guest")

    def ended() -> list[Path]:
        for running in guest.qmp("query-block-jobs"):
            # It may have just ended.
            with contextlib.suppress(QmpError):
                guest.qmp("block-job-set-speed", device=running["device"], speed=0)
        return [path for path in place.glob("*") if path.name == ID] + list(place.glob(".*.failed.json"))

    [found] = wait_until(ended, "the end of the guest's set")
    assert found.name == ID, found.read_text()
    assert own_sets.manifest("guest")["consistency"] == "filesystem"
    wait_until(lambda: not guest.qmp("query-jobs"), "the end of the worker")
    other.destroy()


class Packed(Hypervisor):
    """A hypervisor on which nothing of the collection is, but what Ansible packs for each module."""

    @property
    def _environment(self) -> dict[str, str]:
        return {**super()._environment, "PYTHONPATH": str(binding.directory())}
