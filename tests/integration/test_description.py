# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Descriptions of real VMs."""

from __future__ import annotations

import asyncio
import json
import os
import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._common.redaction import REMOVED
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.vm_config import describe_vm
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

UUID = "4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10"


def describe(vm: Qemu, address: str = "") -> dict[str, t.Any]:
    async def look() -> dict[str, t.Any]:
        async with Monitor(parse_address(address or f"unix:{vm.monitor}")) as monitor:
            return await describe_vm(monitor, await inspect_vm(monitor))

    return asyncio.run(look())


def command_line(vm: Qemu) -> list[str]:
    """What the VM was started with, secrets and all."""
    with open(f"/proc/{vm.pid}/cmdline", "rb") as source:
        return [os.fsdecode(argument) for argument in source.read().split(b"\0")[:-1]]


def test_vm_without_devices(vms: Vms) -> None:
    vm = vms.start(name="web01", uuid=UUID)
    found = describe(vm)
    assert (found["name"], found["uuid"]) == ("web01", UUID)
    version = vm.qmp.execute("query-version")["qemu"]
    assert found["qemu"] == "{major}.{minor}.{micro}".format(**version)
    assert found["machine"] == "none"
    assert (found["memory"], found["cpus"]) == (0, {"count": 0, "type": None})
    assert found["firmware"] == {"bios": None, "flash": []}
    assert found["devices"] == found["removed"] == []
    assert any(chardev["filename"].startswith(f"unix:{vm.monitor}") for chardev in found["chardevs"])
    assert found["command_line"] == command_line(vm)
    (disk,) = found["disks"]
    assert (disk["name"], disk["node"], disk["driver"]) == ("drive0", "n0", "qcow2")
    assert (disk["file"], disk["virtual_size"]) == (str(vm.disks[0].path), 64 * MIB)


def test_vm_with_devices(vms: Vms, directory: Path) -> None:
    base = create(directory / "base.qcow2", 16 * MIB)
    flash = directory / "flash.raw"
    flash.write_bytes(bytes(4 * MIB))
    vm = vms.start(
        Disk(create(directory / "top.qcow2", 16 * MIB, backing=base), id=None, device="virtio-blk-pci,id=vd0"),
        machine="q35,accel=tcg",
        paused=True,
        extra=[
            *("-m", "192", "-smp", "2", "-cpu", "max", "-device", "virtio-rng-pci"),
            *("-drive", f"if=pflash,unit=0,id=code,format=raw,readonly=on,file={flash}"),
            *("-chardev", f"socket,id=agent,path={directory}/a,server=on,wait=off"),
        ],
    )
    found = describe(vm)
    assert found["machine"].startswith("pc-q35-")
    assert not found["machine"].endswith("-machine")
    assert found["accelerator"] is None
    assert found["memory"] == 192 * MIB
    assert found["cpus"] == {"count": 2, "type": "max-x86_64-cpu"}
    assert found["firmware"]["flash"] == ["code"]
    assert {"id": "vd0", "type": "virtio-blk-pci"} in found["devices"]
    assert {"id": "", "type": "virtio-rng-pci"} in found["devices"]
    assert f"{directory}/a" in {c["label"]: c["filename"] for c in found["chardevs"]}["agent"]
    disk = next(disk for disk in found["disks"] if disk["name"] == "vd0")
    assert (disk["node"], disk["device"]) == ("n0", "")
    assert disk["qdev"].startswith("/machine/peripheral/vd0")
    assert (disk["file"], disk["backing_file"]) == (str(directory / "top.qcow2"), str(base))


def test_secrets_stay_with_qemu(vms: Vms, directory: Path) -> None:
    """QEMU itself reads these forms: what we take for a secret is one."""
    image = create(directory / "plain.raw", MIB, "raw")
    file_name = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(image)}}).replace(",", ",,")
    vm = vms.start(
        machine="q35,accel=tcg",
        paused=True,
        extra=[
            *("-object", "secret,id=s0,data=hunter2,,hunter3"),
            *("--object", '{"qom-type": "secret", "id": "s1", "data": "hunter2"}'),
            *("-object", "{'qom-type': 'secret', 'id': 's2', 'data': 'hunter\\'2'}"),
            *("-fw_cfg", "opt/org.example/key,string=hunter2", "-fw_cfg", "name=opt/org.example/b,string=hunter2"),
            *("-smbios", "type=11,value=io.systemd.credential:passwd.root=hunter2"),
            *("-blockdev", f"driver=raw,node-name=kept,file.driver=file,file.filename={image}"),
            *("-drive", f"if=none,id=named,file=json:{file_name},read-only=on"),
            *("-drive", "if=none,id=cd,media=cdrom"),
        ],
    )
    assert "hunter2" in json.dumps(command_line(vm))
    found = describe(vm)
    assert "hunter" not in json.dumps(found)
    assert found["removed"] == [
        "-object s0: data",
        "-object s1: data",
        "-object s2: data",
        "-fw_cfg opt/org.example/key: string",
        "-fw_cfg opt/org.example/b: string",
        "-smbios: value",
    ]
    pairs = list(zip(command_line(vm), found["command_line"], strict=True))
    changed = [after for before, after in pairs if before != after]
    assert len(changed) == 6
    assert all(REMOVED in after for after in changed)


def test_process_behind_tcp_is_unknown(vms: Vms) -> None:
    vm = vms.start(tcp=True)
    found = describe(vm, f"tcp:127.0.0.1:{vm.tcp_port}")
    assert found["command_line"] is None
    assert found["machine"] == "none"


def test_no_secret_of_a_disk_gets_into_a_set_or_a_result(vms: Vms, sets: Sets, directory: Path) -> None:
    """An image names its backing file with a password, and one of the disk's own options is one."""
    base, top = create(directory / "base.qcow2", MIB), directory / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "nbd://me:hunter2@host/base", "-F", "qcow2", top, str(MIB))
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    vm = vms.start(
        Disk(top, id="drive0", node="n0", options=t.cast("dict[str, str]", {"backing": below})),
        name="web01",
        machine="q35,accel=tcg",
        paused=True,
        extra=["-smbios", "type=11,value=admin_password=hunter2", "-fw_cfg", "name=opt/x,string=hunter2"],
    )
    assert "hunter2" in json.dumps(vm.qmp.execute("query-named-block-nodes"))
    [found] = succeed("vm_info", {"monitors": [str(vm.monitor)]})["vms"]
    assert found["disks"][0]["backing_file"] == f"nbd://me:{REMOVED}@host/base"
    wanted = {"monitor": str(vm.monitor), "device": "drive0", "target": str(directory / "copy.qcow2")}
    refused = fail("drive_backup", {**wanted, "sync": "top"})["msg"]
    assert refused.startswith("sync: disk drive0 of VM web01: the name of its backing file contains a secret")
    assert "hunter2" not in refused
    assert not (directory / "copy.qcow2").exists()
    planned = sets.plan(vm)
    made = [sets.back_up(vm, id=one) for one in ("s1", "s2")]
    assert "hunter2" not in json.dumps([found, planned, *made])
    assert sets.levels("web01", "s2") == {"drive0": "incremental"}
    written = [path for path in sets.path.rglob("*.json") if path.is_file()]
    assert len(written) >= 5
    for path in written:
        assert "hunter2" not in path.read_text(), path
    described = json.loads((sets.directory("web01") / "s1" / "vm.json").read_text())
    assert "disk drive0: backing_file" in described["removed"]
