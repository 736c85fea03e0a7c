# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real domains of a real libvirt, reached at libvirt:NAME: what is backed up, and what is told where that cannot be."""

from __future__ import annotations

import asyncio
import os
import signal
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import prepare
from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import block_jobs, libvirt_domain
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_list import list_domains
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import query_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.libvirt_connection import load_binding
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import vm_directory
from ansible_collections.vmfleet.backup.tests.harness.backup import SLOW, assert_absent, assert_good, rebase
from ansible_collections.vmfleet.backup.tests.harness.forks import Fork
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt import restart_in_here
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.libvirt_client import LibvirtClient
    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")

ADDRESS = "libvirt:web01"
SECOND = "/var/lib/libvirt/qemu/second.qmp"
COMMAND_LINE = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{SECOND},server=on,wait=off'/></qemu:commandline>"
)
MOMENT = 3.0
"""Seconds after which the impatient give up."""


@pytest.fixture
def disks(directory: Path) -> tuple[DomainDisk, ...]:
    return (
        DomainDisk(patterned(directory / "a.qcow2")),
        DomainDisk(patterned(directory / "b.raw", "raw", seed=16), "sda", "scsi", "raw"),
    )


@pytest.fixture
def domain(libvirt: Libvirt, disks: tuple[DomainDisk, ...]) -> t.Iterator[Domain]:
    """A domain with two disks, in which nothing of ours is left at the end."""
    domain = libvirt.start("web01", *disks, more=COMMAND_LINE)
    yield domain
    if domain.state == "running":
        assert_tidy(domain)


@pytest.fixture
def sets(libvirt: Libvirt, directory: Path) -> Sets:
    return Sets(directory / "repository", libvirt.inside)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_domain, "CALL_TIMEOUT", MOMENT)
    monkeypatch.setattr(libvirt_domain, "OCCUPIED_LIMIT", MOMENT)


def assert_tidy(domain: Domain) -> None:
    assert domain.qmp("query-jobs") == []
    assert domain.qmp("query-fdsets") == []
    nodes = {node["node-name"]: node["drv"] for node in domain.qmp("query-named-block-nodes", flat=True)}
    assert not [name for name, driver in nodes.items() if name.startswith("vmf.") or driver == "copy-before-write"]


def copies(domain: Domain) -> bool:
    """Return whether a job runs, and all has been said that belongs to its start."""
    return bool(domain.qmp("query-jobs")) and not domain.qmp("query-fdsets")


def converse(libvirt: Libvirt, question: Callable[[Monitor], Awaitable[t.Any]], address: str = ADDRESS) -> str:
    """Return what is told of a conversation that fails, or C(none)."""

    async def run() -> None:
        async with Monitor(parse_address(address)) as monitor:
            await question(monitor)

    def main() -> None:
        try:
            asyncio.run(run())
            print("none")
        except errors.BackupError as error:
            print(f"{type(error).__name__}: {error}")

    process = Fork(main, b"", libvirt.inside)
    output, told = process.communicate(PATIENCE)
    assert process.poll() == 0, told
    assert told == "", told
    return output.strip()


async def ask(monitor: Monitor) -> None:
    await monitor.execute("query-status")


# What is backed up


def test_vm_is_described(domain: Domain) -> None:
    [found] = succeed("vm_info", {"monitors": [ADDRESS]}, inside=domain.libvirt.inside)["vms"]
    assert (found["monitor"], found["error"]) == (ADDRESS, "")
    assert (found["name"], found["uuid"], found["pid"]) == ("web01", domain.uuid, domain.pid)
    assert [disk.pop("name") for disk in found["disks"]] == ["vda", "sda"]
    # All else is what a monitor of its own tells.
    [other] = succeed("vm_info", {"monitors": [SECOND]}, inside=domain.libvirt.inside)["vms"]
    assert [disk.pop("name") for disk in other["disks"]] == ["virtio-disk0", "scsi0-0-0-0"]
    assert {**other, "monitor": ADDRESS} == found


def test_full_and_increment(domain: Domain, target: Path, directory: Path) -> None:
    inside = domain.libvirt.inside
    node = domain.qmp("query-block")[0]["inserted"]["node-name"]
    domain.qmp("block-dirty-bitmap-add", node=node, name="b0", persistent=True)
    asked = {"monitor": ADDRESS, "device": "virtio-disk0", "target": str(target)}
    before = domain.freeze("vda", directory / "before.qcow2")
    done = succeed("drive_backup", asked, inside=inside)
    assert [command["execute"] for command in done["qmp"]].count("add-fd") == 2
    assert_good(target, before)
    assert not succeed("drive_backup", asked, inside=inside)["changed"]
    domain.write("vda", 0x51, 5 * MIB, 65536)
    increment = target.with_name("increment.qcow2")
    incremental = {**asked, "target": str(increment), "sync": "incremental", "bitmap": "b0"}
    assert succeed("drive_backup", incremental, inside=inside)["changed"]
    assert_good(rebase(increment, target), domain.freeze("vda", directory / "after.qcow2"))
    domain.qmp("block-dirty-bitmap-remove", node=node, name="b0")


def test_sets(domain: Domain, sets: Sets, directory: Path) -> None:
    copies = {
        "vda": domain.freeze("vda", directory / "vda.qcow2"),
        "sda": domain.freeze("sda", directory / "sda.qcow2"),
    }
    sets.back_up(ADDRESS)
    sets.assert_good("web01", copies)
    domain.write("vda", 0x51, 5 * MIB, 65536)
    copies["vda"] = domain.freeze("vda", directory / "vda-2.qcow2")
    sets.back_up(ADDRESS, id="s2")
    sets.assert_good("web01", copies, "s2", dict.fromkeys(copies, "incremental"))
    assert sets.manifest("web01", "s2")["monitor"] == ADDRESS
    assert not sets.back_up(ADDRESS, id="s2")["changed"]
    # What a monitor of its own has begun goes on here, and the other way round.
    sets.back_up(SECOND, id="s3")
    assert sets.levels("web01", "s3") == dict.fromkeys(["virtio-disk0", "scsi0-0-0-0"], "incremental")


def test_jobs_are_told_and_steered(domain: Domain, target: Path) -> None:
    inside = domain.libvirt.inside
    asked = {"monitor": ADDRESS, "device": "virtio-disk0", "target": str(target), "job_id": "j0", "speed": str(SLOW)}
    succeed("drive_backup", {**asked, "state": "started"}, inside=inside)
    [job] = succeed("block_job_info", {"monitor": ADDRESS}, inside=inside)["jobs"]
    assert (job["id"], job["speed"]) == ("j0", SLOW)
    for state in ("paused", "running", "cancelled"):
        told = succeed("block_job", {"monitor": ADDRESS, "job_id": "j0", "state": state}, inside=inside)
        assert told["changed"]
    succeed("drive_backup", {**asked, "state": "cancelled"}, inside=inside)
    assert_absent(target)


@pytest.mark.usefixtures("domain")
def test_domain_and_its_second_monitor_are_one_vm(sets: Sets) -> None:
    plan = sets.plan(ADDRESS, SECOND, vms=[{"monitor": ADDRESS}, {"monitor": SECOND, "name": "other"}])["plan"]
    assert [vm["action"] for vm in plan["vms"]] == ["fail", "fail"]
    assert f"{ADDRESS} belongs to the same QEMU as unix:{SECOND}" in plan["vms"][0]["reason"]


@pytest.mark.parametrize("name", ["-odd name:x?#%=é", "libvirt:web01"])
def test_odd_names(libvirt: Libvirt, disks: tuple[DomainDisk, ...], sets: Sets, name: str) -> None:
    domain = libvirt.start(name, disks[0])
    sets.back_up(f"libvirt:{name}")
    assert sets.levels(vm_directory(name)) == {"vda": "full"}
    assert_tidy(domain)


# Where libvirt or a domain does not answer


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_libvirtd_is_restarted_in_the_middle_of_a_copy(
    domain: Domain, target: Path, directory: Path, how: signal.Signals
) -> None:
    before = domain.freeze("vda", directory / "before.qcow2")
    asked = {"monitor": ADDRESS, "device": "virtio-disk0", "target": str(target), "speed": str(8 * MIB)}
    process = ModuleProcess("drive_backup", asked, inside=domain.libvirt.inside)
    wait_until(lambda: copies(domain), "the job")
    domain.libvirt.stop_daemon(how)
    domain.libvirt.start_daemon()
    result = process.result()
    assert result["rc"] == 0, result["msg"]
    assert result["jobs"][0]["state"] == "completed"
    assert_good(target, before)


def test_libvirtd_is_restarted_in_the_middle_of_a_set(domain: Domain, sets: Sets, directory: Path) -> None:
    copy = domain.freeze("vda", directory / "before.qcow2")
    plan = sets.plan(ADDRESS, speed=8 * MIB, exclude_disks=["scsi0-0-0-0"])["plan"]
    process = ModuleProcess("backup_set", {"plan": plan}, inside=domain.libvirt.inside)
    wait_until(lambda: copies(domain), "the job")
    domain.libvirt.restart_daemon()
    assert result_of(process.result(), "web01")["state"] == "published"
    sets.assert_good("web01", {"vda": copy})


def test_libvirtd_is_restarted_before_anything_of_a_set_exists(
    domain: Domain, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe_vm = prepare.describe_vm
    restarted: list[int] = []

    async def restart_and_describe(*args: t.Any) -> t.Any:
        if not restarted:
            restarted.append(restart_in_here())
        return await describe_vm(*args)

    monkeypatch.setattr(prepare, "describe_vm", restart_and_describe)
    pid = domain.libvirt.daemon
    done = succeed("backup_set", {"plan": sets.plan(ADDRESS)["plan"]}, inside=domain.libvirt.inside)
    assert result_of(done, "web01")["state"] == "published"
    assert domain.libvirt.daemon != pid
    sets.assert_tidy("web01")


@pytest.mark.parametrize("module", ["drive_backup", "backup_set"])
def test_libvirtd_is_restarted_in_the_middle_of_the_last_step(
    domain: Domain, sets: Sets, target: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    dismiss_jobs = block_jobs.dismiss_jobs
    restarted: list[int] = []

    async def restart_and_dismiss(*args: t.Any) -> None:
        if not restarted and any(job.ended for job in await query_jobs(args[0])):
            restarted.append(restart_in_here())
        await dismiss_jobs(*args)

    monkeypatch.setattr(block_jobs, "dismiss_jobs", restart_and_dismiss)
    asked: dict[str, t.Any] = {"monitor": ADDRESS, "device": "virtio-disk0", "target": str(target)}
    if module == "backup_set":
        asked = {"plan": sets.plan(ADDRESS)["plan"]}
    pid = int(domain.libvirt.seen_here("/run/libvirtd.pid").read_text())
    succeed(module, asked, inside=domain.libvirt.inside)
    assert int(domain.libvirt.seen_here("/run/libvirtd.pid").read_text()) != pid


@pytest.mark.usefixtures("impatient")
def test_domain_that_hangs_costs_itself_only(libvirt: Libvirt, sets: Sets, directory: Path) -> None:
    names = [f"vm{number}" for number in range(8)]
    domains = [libvirt.start(name, DomainDisk(patterned(directory / f"{name}.qcow2", size=MIB))) for name in names]
    addresses = [f"libvirt:{name}" for name in names]
    domains[3].hang()
    try:
        result = sets.attempt(*addresses)
        states = {vm["name"]: vm["state"] for vm in result["vms"]}
        assert states == {name: "failed" if name == "vm3" else "published" for name in names}
        assert "libvirt:vm3: no answer to query-version within 3 s: QEMU's main loop is blocked" in result["msg"]
        # Everybody else is served.
        assert libvirt.virsh("list", "--name").split() == names
        assert domains[4].qmp("query-status")["running"]
        # Nobody adds a call to the one that hangs.
        told = fail("block_job", {"monitor": "libvirt:vm3", "job_id": "j0", "state": "paused"}, inside=libvirt.inside)
        assert "libvirt:vm3: QEMU has not answered a command to this domain, from any program, for" in told["msg"]
    finally:
        domains[3].wake()
    sets.back_up(*addresses)
    for domain in domains:
        assert_tidy(domain)


@pytest.mark.usefixtures("impatient")
def test_after_a_time_out_nothing_more_is_asked(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(monitor: Monitor) -> None:
        assert monitor.process
        thread = t.cast("LibvirtClient", monitor._client)._domain._thread
        assert thread
        calls, call = [], thread.call
        monkeypatch.setattr(thread, "call", lambda *args: calls.append(args) or call(*args))
        os.kill(monitor.process.pid, signal.SIGSTOP)
        try:
            questions = (monitor.execute("query-status") for _number in range(9))
            found = await asyncio.gather(*questions, return_exceptions=True)
            assert {str(error) for error in found} == {str(found[0])}
            assert len(calls) == 1
            raise t.cast("Exception", found[0])
        finally:
            os.kill(monitor.process.pid, signal.SIGCONT)

    told = converse(domain.libvirt, hang)
    assert told.startswith(f"MonitorTimeout: {ADDRESS}: no answer to query-status within 3 s")
    assert converse(domain.libvirt, ask) == "none"


def test_domain_that_is_restarted_is_another_one(domain: Domain) -> None:
    async def restart(monitor: Monitor) -> None:
        assert monitor.process
        os.kill(monitor.process.pid, signal.SIGKILL)
        while monitor.process.alive or os.system(f"virsh -q start {domain.name} 2> /dev/null"):
            await asyncio.sleep(0.1)
        await ask(monitor)

    assert "its QEMU (process" in converse(domain.libvirt, restart)
    assert converse(domain.libvirt, ask) == "none"


def test_qemu_ends_in_the_middle_of_a_call(domain: Domain) -> None:
    async def end(monitor: Monitor) -> None:
        assert monitor.process
        os.kill(monitor.process.pid, signal.SIGSTOP)
        asked = asyncio.ensure_future(ask(monitor))
        await asyncio.sleep(0.5)
        os.kill(monitor.process.pid, signal.SIGKILL)
        await asked

    assert converse(domain.libvirt, end).startswith(f"MonitorGone: {ADDRESS}: the domain is off, or its QEMU has just")


# What is refused


def test_no_such_domain(domain: Domain) -> None:
    libvirt = domain.libvirt
    similar = converse(libvirt, ask, "libvirt:web02")
    assert similar == "MonitorGone: libvirt:web02: libvirt has no domain of this name: is web01 meant?"
    other = converse(libvirt, ask, "libvirt:mail")
    assert other.startswith(
        "MonitorGone: libvirt:mail: libvirt has no domain of this name: it has 1 of other names at q"
    )


def test_domain_is_off(domain: Domain, target: Path) -> None:
    domain.destroy()
    asked = {"monitor": ADDRESS, "device": "virtio-disk0", "target": str(target)}
    told = fail("drive_backup", asked, inside=domain.libvirt.inside)["msg"]
    assert told == f"{ADDRESS}: the domain is shut off"
    plan = succeed(
        "backup_plan",
        {
            "repository": str(target.parent / "r"),
            "create_repository": True,
            "vms": [{"monitor": ADDRESS}],
            "offline": "skip",
        },
        inside=domain.libvirt.inside,
    )["plan"]
    assert [(vm["name"], vm["action"]) for vm in plan["vms"]] == [("web01", "skip")]


def test_libvirtd_does_not_run(domain: Domain) -> None:
    domain.libvirt.stop_daemon()
    try:
        told = converse(domain.libvirt, ask)
    finally:
        domain.libvirt.start_daemon()
    assert told.startswith(f"MonitorLost: {ADDRESS}: cannot connect to libvirt at qemu:///system (")
    assert "its daemon (libvirtd or virtqemud) does not run" in told


@pytest.mark.usefixtures("impatient")
def test_libvirtd_hangs(domain: Domain) -> None:
    libvirt = domain.libvirt
    pid = int(libvirt.seen_here("/run/libvirtd.pid").read_text())
    libvirt.send_signal(signal.SIGSTOP, pid)
    try:
        told = converse(libvirt, ask)
    finally:
        libvirt.send_signal(signal.SIGCONT, pid)
    assert told.startswith(
        f"MonitorTimeout: {ADDRESS}: no answer to the look for the domain within 3 s: libvirt itself"
    )


def test_no_right_to_use_libvirt(domain: Domain) -> None:
    async def never(_monitor: Monitor) -> None:
        raise AssertionError

    def main() -> None:
        # Nobody else may look into the directory of the tests.
        load_binding(parse_address(ADDRESS))
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

        async def run() -> None:
            async with Monitor(parse_address(ADDRESS)) as monitor:
                await never(monitor)

        for question in (run(), list_domains("qemu:///system")):
            try:
                asyncio.run(question)
            except errors.MonitorError as error:
                print(error)

    process = Fork(main, b"", domain.libvirt.inside)
    output, _told = process.communicate(PATIENCE)
    assert output.count("no right to use libvirt at qemu:///system") == 2
    assert output.count("let Ansible become root") == 2


def test_connection_that_only_reads(domain: Domain) -> None:
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro"
    told = fail("block_job_info", {"monitor": ADDRESS, "libvirt_uri": uri}, inside=domain.libvirt.inside)["msg"]
    assert "let Ansible become root" in told


@pytest.mark.parametrize("uri", ["qemu+ssh://root@hv2/system", "qemu+tcp://127.0.0.1/system"])
def test_other_machines_are_refused(domain: Domain, target: Path, uri: str) -> None:
    asked = {"monitor": ADDRESS, "device": "virtio-disk0", "target": str(target), "libvirt_uri": uri}
    assert fail("drive_backup", asked, inside=domain.libvirt.inside)["msg"].startswith("libvirt_uri: ")
    assert_absent(target)


def test_socket_that_is_named(domain: Domain) -> None:
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"
    told = succeed("vm_info", {"monitors": [ADDRESS], "libvirt_uri": uri}, inside=domain.libvirt.inside)
    assert told["vms"][0]["uuid"] == domain.uuid


def test_commands_that_qemu_refuses(domain: Domain) -> None:
    asked = {"monitor": ADDRESS, "job_id": "nosuch", "state": "paused"}
    assert "nosuch is not a job of this VM" in fail("block_job", asked, inside=domain.libvirt.inside)["msg"]

    async def refused(monitor: Monitor) -> None:
        await monitor.execute("block-job-pause", {"device": "nosuch"})

    said = "CommandError: libvirt:web01: QEMU refused block-job-pause: Block job 'nosuch' not found"
    assert converse(domain.libvirt, refused) == said


def test_images_are_identical_to_those_of_a_second_monitor(domain: Domain, target: Path) -> None:
    others = target.with_name("other.qcow2")
    for monitor, path in ((ADDRESS, target), (SECOND, others)):
        asked = {"monitor": monitor, "device": "scsi0-0-0-0", "target": str(path)}
        succeed("drive_backup", asked, inside=domain.libvirt.inside)
    assert identical(target, others)
