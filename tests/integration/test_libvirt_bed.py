# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The harness for libvirt: real domains, which leave nothing behind, and modules that run beside them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.forks import Fork
from ansible_collections.vmfleet.backup.tests.harness.guest import file_in, file_system
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned, unlocked
from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.libvirt_guest import TARGETS, GuestDomain
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import HYPERVISOR_PYTHON, Hypervisor, python_path
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")

MONITOR = "/var/lib/libvirt/qemu/second.qmp"
# As an administrator gives QEMU one more monitor.
SECOND = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{MONITOR},server=on,wait=off'/></qemu:commandline>"
)

PLAYBOOK = f"""
- hosts: all
  gather_facts: false
  tasks:
    - name: Look
      vmfleet.backup.vm_info:
        monitors: ["{MONITOR}"]
      register: found
    - name: Tell
      ansible.builtin.debug:
        var: found.vms[0].name
"""


@pytest.fixture
def domain(libvirt: Libvirt, directory: Path) -> Domain:
    """A domain with two disks that runs, and has a second monitor."""
    disks = (
        DomainDisk(patterned(directory / "a.qcow2")),
        DomainDisk(patterned(directory / "b.raw", "raw", seed=16), "sda", "scsi", "raw"),
    )
    return libvirt.start("web01", *disks, more=SECOND)


def processes(space: str) -> dict[int, str]:
    """Return the processes of a process name space, and what they run."""
    found = {}
    for process in Path("/proc").glob("[1-9]*"):
        # Processes come and go meanwhile, and not everybody's may be looked into.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.readlink(process / "ns/pid") == space:
                found[int(process.name)] = (process / "comm").read_text().strip()
    return found


def mounts() -> set[str]:
    """Return where file systems are mounted on this machine, but for other tests."""
    points = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    return {point for point in points if not point.startswith(tempfile.gettempdir())}


def test_writes_are_in_the_image(domain: Domain, directory: Path) -> None:
    for target, image in (("vda", "a.qcow2"), ("sda", "b.raw")):
        before = domain.freeze(target, directory / f"{target}-before.qcow2")
        domain.write(target, 0x51, 5 * MIB, 65536)
        after = domain.freeze(target, directory / f"{target}-after.qcow2")
        assert not identical(before, after)
        fmt = domain.image(target)[1]
        assert identical(after, directory / image, other_format=fmt)
        assert not unlocked(directory / image, fmt)
    domain.destroy()
    assert domain.state == "shut off"
    assert unlocked(directory / "a.qcow2")


def test_write_that_fails_is_seen(domain: Domain) -> None:
    with pytest.raises(AssertionError):
        domain.write("vda", 0x51, 64 * MIB, 65536)


def test_snapshot(domain: Domain, directory: Path) -> None:
    domain.virsh("snapshot-create-as", "--disk-only", "--diskspec", f"vda,file={directory}/over.qcow2")
    assert domain.image("vda") == (directory / "over.qcow2", "qcow2")
    domain.write("vda", 0x52, 0, 65536)
    domain.virsh("blockcommit", "vda", "--active", "--pivot", "--wait")
    assert domain.image("vda") == (directory / "a.qcow2", "qcow2")


def test_qemu_is_stopped_and_goes_on(domain: Domain) -> None:
    domain.hang()
    # What needs no QEMU still works.
    assert domain.state == "running"
    assert domain.libvirt.processes[domain.pid]
    assert domain.libvirt.run("ps", "-o", "stat=", "-p", str(domain.pid)).startswith("T")
    domain.wake()
    assert domain.qmp("query-status")["status"] == "running"


def test_killed_qemu_is_gone(domain: Domain) -> None:
    domain.kill()
    wait_until(lambda: domain.state == "shut off", "libvirt to notice it")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_domains_outlive_libvirtd(domain: Domain, how: signal.Signals) -> None:
    pid = domain.pid
    domain.libvirt.stop_daemon(how)
    assert "Failed to connect" in domain.libvirt.attempt("virsh", "list").stderr
    domain.libvirt.start_daemon()
    assert domain.state == "running"
    assert domain.pid == pid


def test_module_sees_what_is_inside(domain: Domain) -> None:
    [found] = succeed("vm_info", {"monitors": [MONITOR]}, inside=domain.libvirt.inside)["vms"]
    assert (found["name"], found["uuid"]) == ("web01", domain.uuid)
    assert not Path(MONITOR).exists()


def test_playbook_sees_what_is_inside(domain: Domain, directory: Path) -> None:
    (directory / "look.yml").write_text(PLAYBOOK)
    play = Hypervisor(directory, inside=domain.libvirt.inside).play(str(directory / "look.yml"))
    assert play.rc == 0, play.output
    assert '"found.vms[0].name": "web01"' in play.output


def test_binding_reaches_it(domain: Domain) -> None:
    def main() -> None:
        import libvirt
        import libvirt_qemu

        found = libvirt.open("qemu:///system").lookupByName("web01")
        print(libvirt_qemu.qemuMonitorCommand(found, '{"execute":"query-name"}', 0))
        print(found.UUIDString(), os.getcwd())

    process = Fork(main, b"", domain.libvirt.inside)
    output, errors = process.communicate(PATIENCE)
    assert process.poll() == 0, errors
    answer, told = output.splitlines()
    assert '"name":"web01"' in answer
    assert told == f"{domain.uuid} {os.getcwd()}"


def test_python_of_playbooks_has_the_binding(libvirt: Libvirt) -> None:
    script = "import libvirt, libvirt_qemu; print(len(libvirt.open('qemu:///system').listAllDomains()))"
    if sys.executable != HYPERVISOR_PYTHON and "libvirt" not in HYPERVISOR_PYTHON:
        pytest.skip("this Python has no binding of libvirt")
    environment = f"PYTHONPATH={os.pathsep.join(python_path())}"
    assert libvirt.run("env", environment, HYPERVISOR_PYTHON, "-c", script) == "0\n"


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_firmware_and_tpm(libvirt: Libvirt, directory: Path, machine: str) -> None:
    disk = DomainDisk(patterned(directory / "disk.qcow2"), "sda", "sata" if machine == "q35" else "scsi")
    found = libvirt.start("uefi", disk, machine=machine, memory=64, nvram=True, tpm=True)
    assert found.nvram.stat().st_size == 540672
    assert (found.tpm / "tpm2-00.permall").stat().st_size
    found.write("sda", 0x54, 0, 65536)
    found.destroy()
    assert found.nvram.exists()
    libvirt.clear()
    assert not found.nvram.exists()


def test_two_at_once(libvirt: Libvirt, domain: Domain, directory: Path) -> None:
    with Libvirt() as other:
        second = other.start("web01", DomainDisk(patterned(directory / "other.qcow2")))
        assert second.uuid != domain.uuid
        second.write("vda", 0x53, 0, 65536)
        second.destroy()
        assert domain.state == "running"
    assert libvirt.virsh("list", "--name") == "web01"


KILLED = """
import sys, time
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
from pathlib import Path
bed = Libvirt()
domain = bed.start(sys.argv[2], DomainDisk(Path(sys.argv[1])), nvram=True, memory=64)
assert domain.nvram.exists() and domain.log
print(bed.inside.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_a_test_that_is_killed(directory: Path) -> None:
    image = patterned(directory / "disk.qcow2")
    name = f"left-{os.getpid()}"
    before = mounts()
    test = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(image), name],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    with test:
        try:
            assert test.stdout
            space = os.readlink(f"/proc/{int(test.stdout.readline())}/ns/pid")
            inside = processes(space)
            assert {"libvirtd", "virtlogd", "qemu-system-x86", "sleep"} <= set(inside.values())
            assert not unlocked(image)
            left = [path for place in ("/etc", "/run", "/var") for path in Path(place).rglob(f"*{name}*")]
            assert not left
        finally:
            test.kill()
    wait_until(lambda: not processes(space), "the end of all")
    assert unlocked(image)
    assert mounts() == before


@pytest.mark.slow
def test_guest_is_frozen(libvirt: Libvirt, directory: Path) -> None:
    guest = GuestDomain(libvirt, directory)
    guest.start()
    assert guest.agent("guest-fsfreeze-status") == "thawed"
    guest.virsh("domfsfreeze")
    assert guest.agent("guest-fsfreeze-status") == "frozen"
    # The round that the freeze has met.
    wait_until(lambda: not guest_writes(guest), "the end of the guest's writes")
    copies = [guest.freeze(target, directory / f"{target}.qcow2") for target in TARGETS]
    guest.virsh("domfsthaw")
    rounds = guest.rounds
    wait_until(lambda: guest.rounds > rounds + 1, "the guest's next writes")
    found = [int(file_in(file_system(copy, copy.with_suffix(".raw")), "round")) for copy in copies]
    assert found[0] - found[1] in (0, 1)


def guest_writes(guest: GuestDomain) -> bool:
    """Return whether the guest writes within a second."""
    before = [guest.virsh("domblkstat", target) for target in TARGETS]
    time.sleep(1)
    return before != [guest.virsh("domblkstat", target) for target in TARGETS]
