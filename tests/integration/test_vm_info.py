# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""vm_info against real VMs."""

from __future__ import annotations

import subprocess
import threading
import typing as t
from concurrent.futures import ThreadPoolExecutor

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import start_foreign, start_slowly
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, patterned, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

UUID = "5b0cbdf5-94ec-4f2b-b8a0-6c1a3b0c7d11"


def vm_info(*monitors: object, sockets: t.Sequence[object] = ()) -> list[dict[str, t.Any]]:
    """What vm_info tells."""
    result = succeed("vm_info", {"monitors": [str(monitor) for monitor in monitors], "sockets": list(sockets)})
    assert result["changed"] is False
    vms: list[dict[str, t.Any]] = result["vms"]
    return vms


def disks_of(vm: Qemu) -> dict[str, dict[str, t.Any]]:
    """Its disks by name."""
    [told] = vm_info(vm.monitor)
    return {disk["name"]: disk for disk in told["disks"]}


def test_vm(vms: Vms) -> None:
    vm = vms.start(name="web01", uuid=UUID)
    [told] = vm_info(vm.monitor)
    version = vm.qmp.greeting["QMP"]["version"]["qemu"]
    assert told["monitor"] == f"unix:{vm.monitor}"
    assert told["name"] == "web01"
    assert told["uuid"] == UUID
    assert told["status"] == "running"
    assert told["version"] == f"{version['major']}.{version['minor']}.{version['micro']}"
    assert told["pid"] == vm.pid
    assert told["jobs"] == []
    assert told["agent"] is None
    assert told["error"] == ""


def test_vm_without_name_and_uuid(vms: Vms) -> None:
    vm = vms.start(paused=True)
    [told] = vm_info(vm.monitor)
    assert told["name"] == "vm"
    assert told["uuid"] == ""
    assert told["status"] == "prelaunch"


def test_disk(vm: Qemu) -> None:
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    vm.write("drive0", 1, 0, MIB)
    [disk] = disks_of(vm).values()
    assert disk["name"] == "drive0"
    assert disk["device"] == "drive0"
    assert disk["node"] == "n0"
    assert disk["driver"] == "qcow2"
    assert disk["filename"] == str(vm.disks[0].path)
    assert disk["virtual_size"] == 64 * MIB
    assert 32 * MIB < disk["actual_size"] < 36 * MIB
    assert disk["read_only"] is False
    assert disk["backing_file"] == ""
    assert disk["filters"] == []
    [bitmap] = disk["bitmaps"]
    assert bitmap["name"] == "b0"
    assert bitmap["count"] == MIB
    assert bitmap["recording"] is True
    assert bitmap["persistent"] is True
    assert bitmap["busy"] is False
    assert bitmap["inconsistent"] is False


def test_names_of_disks(vms: Vms) -> None:
    vm = vms.start(
        vms.disk(0, device="virtio-blk-pci,id=vd0"),
        vms.disk(1, id=None, device="virtio-blk-pci,id=vd1"),
        vms.disk(2, id=None, device="virtio-blk-pci"),
        vms.disk(3, node=None),
        vms.disk(4, id=None),
        vms.disk(5, throttle=512 * MIB),
        Disk(None, id="cd", node=None),
        machine="q35,accel=tcg",
        paused=True,
    )
    disks = disks_of(vm)
    assert set(disks) == {"drive0", "vd1", "n2", "drive3", "n4", "drive5"}
    assert disks["drive5"]["node"] == "n5"
    assert disks["drive5"]["filters"]
    assert all(disk["stable_name"] for disk in disks.values())
    [told] = vm_info(vm.monitor)
    assert told["empty"] == ["cd"]


def test_images_that_keep_bitmaps(vms: Vms, directory: Path) -> None:
    images = {
        "new": (),
        "old": ("-o", "compat=0.10"),
        "data": ("-o", f"data_file={directory}/file1"),
        "raw_data": ("-o", f"data_file={directory}/file2,data_file_raw=on"),
    }
    for name, options in images.items():
        qemu_img("create", "-q", "-f", "qcow2", *options, directory / name, "1M")
    disks = [Disk(directory / name, id=name, node=None) for name in images]
    read_only = Disk(create(directory / "ro", MIB), id="ro", node=None, read_only=True)
    vm = vms.start(*disks, read_only, vms.disk(0, format="raw", id="raw"))
    assert {name for name, disk in disks_of(vm).items() if disk["keeps_bitmaps"]} == {"new", "data"}


def test_names_stay_while_a_backup_runs(vms: Vms, target: Path) -> None:
    vm = vms.start(
        vms.disk(0, device="virtio-blk-pci,id=vd0"),
        vms.disk(1, id=None),
        vms.disk(2, node=None),
        vms.disk(3, throttle=512 * MIB),
        machine="q35,accel=tcg",
    )
    before = disks_of(vm)
    for device in ("drive0", "n1", "drive2", "drive3"):
        start_slowly(vm, target.with_name(device), device=device)
        during = disks_of(vm)
        assert {name: disk["node"] for name, disk in during.items()} == {
            name: disk["node"] for name, disk in before.items()
        }
        [told] = vm_info(vm.monitor)
        assert [job["type"] for job in told["jobs"]] == ["backup"]
        vm.qmp.execute("block-job-cancel", device=vm.job["device"], force=True)
        wait_until(lambda: vm.job["status"] == "concluded", "the end of the job")
        vm.qmp.execute("job-dismiss", id=vm.job["device"])


def test_names_stay_while_jobs_come_and_go(vms: Vms, directory: Path) -> None:
    vm = vms.start(vms.disk(0, size=8 * MIB), vms.disk(1, size=8 * MIB, id=None))
    before = {name: disk["node"] for name, disk in disks_of(vm).items()}
    target = create(directory / "target.qcow2", 8 * MIB)
    over = threading.Event()

    def keep_busy() -> None:
        # Each job puts a filter above its node and takes it away again: in the midst of the module's questions, too.
        while not over.is_set():
            start_foreign(vm, target, "j")
            wait_until(lambda: not vm.block_jobs, "the end of the job")

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(keep_busy)
        try:
            for _number in range(8):
                assert {name: disk["node"] for name, disk in disks_of(vm).items()} == before
        finally:
            over.set()
        busy.result()


def test_overlay_is_one_disk(vms: Vms, directory: Path) -> None:
    base = patterned(directory / "base.qcow2")
    vm = vms.start(Disk(create(directory / "top.qcow2", backing=base)))
    [disk] = disks_of(vm).values()
    assert disk["node"] == "n0"
    assert disk["backing_file"] == str(base)
    assert disk["actual_size"] > 32 * MIB


def test_read_only_and_raw(vms: Vms) -> None:
    vm = vms.start(vms.disk(0, format="raw", read_only=True))
    [disk] = disks_of(vm).values()
    assert disk["read_only"] is True
    assert disk["driver"] == "raw"


def test_patterns(vms: Vms) -> None:
    first = vms.start(vms.disk(0), name="first")
    second = vms.start(vms.disk(1), name="second")
    patterns = [str(vm.directory / "*.qmp") for vm in (first, second)]
    assert {told["name"] for told in vm_info(sockets=patterns)} == {"first", "second"}
    # One that is listed and matched is asked once: a monitor serves one client at a time.
    assert len(vm_info(first.monitor, sockets=patterns)) == 2
    assert vm_info(sockets=["/nonexistent/*.qmp"]) == []


def test_tcp(vms: Vms) -> None:
    vm = vms.start(tcp=True, name="web01")
    [told] = vm_info(f"tcp:127.0.0.1:{vm.tcp_port}")
    assert told["name"] == "web01"
    assert told["disks"]


def test_silent_ones_are_listed_with_their_error(vm: Qemu, directory: Path) -> None:
    missing = directory / "missing.qmp"
    found = {told["monitor"]: told for told in vm_info(vm.monitor, missing)}
    assert found[f"unix:{vm.monitor}"]["error"] == ""
    assert str(missing) in found[f"unix:{missing}"]["error"]


def test_monitor_of_something_else_is_listed_with_its_error(vm: Qemu, directory: Path) -> None:
    # A qemu-storage-daemon speaks QMP, and knows half of the commands.
    path = directory / "storage.qmp"
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    command = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=c"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as daemon:
        try:
            wait_until(path.exists, "the storage daemon's monitor")
            found = {told["monitor"]: told for told in vm_info(vm.monitor, path)}
        finally:
            daemon.kill()
    assert found[f"unix:{vm.monitor}"]["error"] == ""
    assert found[f"unix:{path}"]["error"]


def test_agent(vms: Vms, directory: Path) -> None:
    channel = directory / "agent"
    extra = [
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={channel},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]
    vm = vms.start(machine="q35,accel=tcg", paused=True, extra=extra)
    [told] = vm_info(vm.monitor)
    assert told["agent"] == {"socket": str(channel), "connected": False}


def test_check_mode_is_the_same(vm: Qemu) -> None:
    given = {"monitors": [str(vm.monitor)]}
    assert succeed("vm_info", given, check=True) == succeed("vm_info", given)


@pytest.mark.parametrize("options", [{}, {"monitors": ["relative.sock"]}, {"monitors": ["libvirt:a/b"]}])
def test_bad_options(options: dict[str, t.Any]) -> None:
    assert "monitors" in fail("vm_info", options)["msg"]


def test_no_monitor_stays_occupied(vm: Qemu) -> None:
    for _number in range(3):
        assert vm_info(vm.monitor)[0]["error"] == ""
