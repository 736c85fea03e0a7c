# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a throwaway VM is put together from what vm.json says of the real one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_options import (
    BootDisk,
    BootOptions,
    Handed,
    Host,
    flash_chips,
    named_files,
    qemu_options,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.command_line import pairs, properties

MIB = 1 << 20
OPTIONS = BootOptions("/usr/bin/qemu", "/var/tmp", 10, "login:", agent=False)
TCG = Host(kvm=False, processors=4, memory=1024 * MIB)
KVM = replace(TCG, kvm=True)
PLAIN = {
    "name": "web01",
    "uuid": "4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10",
    "machine": "pc-q35-7.2",
    "accelerator": None,
    "memory": 192 * MIB,
    "cpus": {"count": 2, "type": "qemu64-x86_64-cpu"},
    "command_line": ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "qemu64"],
}


def boot_disk(name: str, qdev: str = "", node: str = "") -> BootDisk:
    layers = (f"/dev/fdset/{name}-s2", f"/dev/fdset/{name}-s1")
    return BootDisk(name, node or f"node-{name}", qdev, f"/var/tmp/{name}", f"/dev/fdset/{name}", layers)


def built(
    description: dict[str, Any],
    *disks: BootDisk,
    options: tuple[str, ...] = (),
    host: Host = TCG,
    copies: dict[str, str] | None = None,
    agent: bool = False,
) -> list[tuple[str, str]]:
    """The options for a VM; the files that it names are handed over under their own names."""
    start = replace(OPTIONS, extra=options, agent=agent)
    files = {option: f"handed{path}" for option, path in named_files(description, start).items()}
    return pairs(qemu_options(description, disks, Handed(files, copies or {}, "/dev/fdset/5", 7), start, host))


def values(found: list[tuple[str, str]], option: str) -> list[str]:
    return [value for name, value in found if name == option]


def one(found: list[tuple[str, str]], option: str) -> str:
    [value] = values(found, option)
    return value


def attached(found: list[tuple[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """The overlay and the device of each disk, in their order."""
    nodes = {}
    for node in map(json.loads, values(found, "-blockdev")):
        name = node["file"]["filename"].rpartition("/")[2]
        nodes[node["node-name"]] = name
        # Nothing is left to what is in a header.
        below = node["backing"]
        for layer in ("s2", "s1"):
            assert below["file"] == {"driver": "file", "filename": f"/dev/fdset/{name}-{layer}"}
            assert (below["driver"], below["read-only"], below["force-share"]) == ("qcow2", True, True)
            below = below["backing"]
        assert below is None
    devices = [properties(value, "driver") for value in values(found, "-device")]
    return [(nodes[device["drive"]], device) for device in devices if "drive" in device]


def drivers(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, device["driver"]) for name, device in attached(found)]


def test_machine() -> None:
    found = built(PLAIN)
    assert one(found, "-machine") == "pc-q35-7.2"
    assert one(found, "-accel") == "tcg"
    assert one(found, "-cpu") == "qemu64"
    assert one(found, "-smp") == "2"
    assert one(found, "-m") == "192M"
    assert one(found, "-uuid") == PLAIN["uuid"]
    assert one(found, "-name") == "guest=verify-web01"
    assert one(built({**PLAIN, "name": "a b,debug-threads=on\n"}), "-name") == "guest=verify-a_b_debug-threads_on_"
    assert one(found, "-nic") == "none"
    assert one(found, "-display") == "none"
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= {option for option, _value in found}


def test_no_more_processors_than_there_are() -> None:
    assert one(built({**PLAIN, "cpus": {"count": 64, "type": None}}), "-smp") == "4"


@pytest.mark.parametrize(
    ("host", "accelerator", "cpu", "expected"),
    [
        (KVM, "kvm", "host,migratable=on", ("kvm", "host,migratable=on")),
        (TCG, "kvm", "host,migratable=on", ("tcg", "max")),
        (KVM, None, "qemu64", ("tcg", "qemu64")),
    ],
)
def test_accelerator(host: Host, accelerator: str | None, cpu: str, expected: tuple[str, str]) -> None:
    found = built({**PLAIN, "accelerator": accelerator, "command_line": ["qemu", "-cpu", cpu]}, host=host)
    assert (one(found, "-accel"), one(found, "-cpu")) == expected


def test_machine_properties_that_firmware_needs() -> None:
    given = "pc-q35-7.2,usb=off,smm=on,dump-guest-core=off,memory-backend=pc.ram,acpi=on,accel=kvm"
    assert one(built({**PLAIN, "command_line": ["qemu", "-M", given]}), "-machine") == "pc-q35-7.2,acpi=on,smm=on"


def test_unknown_process() -> None:
    """Over TCP, vm.json has no command line."""
    found = built({**PLAIN, "command_line": None}, boot_disk("drive0"))
    assert (one(found, "-machine"), one(found, "-cpu")) == ("pc-q35-7.2", "qemu64")
    assert drivers(found) == [("drive0", "virtio-blk-pci")]
    assert "-m" in dict(found)


def test_nothing_is_known() -> None:
    found = dict(built({"schema": 1}, boot_disk("drive0")))
    assert not {"-machine", "-cpu", "-m", "-uuid", "-kernel"} & set(found)


def test_kernel() -> None:
    line = ["qemu", "-kernel", "/boot/vmlinuz", "-initrd", "/boot/initrd", "-append", "root=/dev/vda quiet", "-S"]
    found = built({**PLAIN, "command_line": line})
    assert one(found, "-kernel") == "handed/boot/vmlinuz"
    assert one(found, "-initrd") == "handed/boot/initrd"
    assert one(found, "-append") == "root=/dev/vda quiet"
    assert "-S" not in dict(found)


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        (("-machine", "pc"), "-machine"),
        (("-M", "pc"), "-machine"),
        (("--cpu", "max"), "-cpu"),
        (("-m", "1G"), "-m"),
        (("-smp", "1"), "-smp"),
        (("-accel", "tcg,thread=single"), "-accel"),
        (("-enable-kvm",), "-accel"),
        (("-kernel", "/k"), "-kernel"),
        (("-initrd", "/i"), "-initrd"),
        (("-append", "single"), "-append"),
        (("-sandbox", "off"), "-sandbox"),
        (("-uuid", "u"), "-uuid"),
    ],
)
def test_options_take_the_place_of_those_of_the_vm(options: tuple[str, ...], replaced: str) -> None:
    line = [*PLAIN["command_line"], "-kernel", "/boot/k", "-initrd", "/boot/i", "-append", "quiet"]
    found = built({**PLAIN, "command_line": line}, options=options)
    assert values(found, replaced) == [options[1] if len(options) > 1 else ""]
    assert {"-machine", "-cpu", "-m", "-smp", "-accel", "-kernel", "-initrd", "-append"} <= set(dict(found))


def test_accelerator_of_a_machine() -> None:
    assert values(built(PLAIN, options=("-machine", "q35,accel=kvm")), "-accel") == []


def test_disks_in_the_order_of_their_devices() -> None:
    line = [
        *("qemu", "-drive", "if=none,id=a,file=a.qcow2", "-drive", "if=none,id=b,file=b.qcow2"),
        *("-device", "virtio-blk-pci,id=second,drive=b,serial=with,,comma,bootindex=1,werror=stop,iothread=io1"),
        *("-device", '{"driver":"virtio-blk-pci-non-transitional","drive":"node-a","bus":"pci.4","bootindex":2}'),
    ]
    entries = [{"name": name, "device": name, "node": f"node-{name}", "qdev": ""} for name in "ab"]
    found = attached(built({**PLAIN, "command_line": line, "disks": entries}, boot_disk("a"), boot_disk("b")))
    assert [name for name, _device in found] == ["b", "a"]
    assert found[0][1] == {"driver": "virtio-blk-pci", "drive": "disk1", "serial": "with,comma", "bootindex": "1"}
    assert found[1][1] == {"driver": "virtio-blk-pci-non-transitional", "drive": "disk0", "bootindex": "2"}


def test_disk_below_a_filter() -> None:
    line = ["qemu", "-device", "ide-hd,id=hd0,drive=throttle0"]
    entry = {"name": "hd0", "device": "", "node": "n0", "qdev": "hd0"}
    assert drivers(built({**PLAIN, "command_line": line, "disks": [entry]}, boot_disk("hd0", "hd0"))) == [
        ("hd0", "ide-hd")
    ]


def test_disk_that_was_plugged_in_later() -> None:
    line = ["qemu", "-device", "virtio-blk-pci,id=first,drive=node-first"]
    description = {**PLAIN, "command_line": line, "devices": [{"id": "late", "type": "nvme"}, {"id": "", "type": "x"}]}
    found = attached(built(description, boot_disk("late", "/machine/peripheral/late"), boot_disk("first")))
    assert [(name, device["driver"]) for name, device in found] == [("first", "virtio-blk-pci"), ("late", "nvme")]
    # QEMU refuses one without.
    assert found[1][1]["serial"] == "disk0"


@pytest.mark.parametrize(
    ("backend", "driver"), [("ide0-hd1", "ide-hd"), ("virtio3", "virtio-blk"), ("x0", "virtio-blk-pci")]
)
def test_disk_of_an_interface(backend: str, driver: str) -> None:
    entry = {"name": backend, "device": backend, "node": "#block1", "qdev": "/machine/unattached/device[3]"}
    assert drivers(built({**PLAIN, "disks": [entry]}, boot_disk(backend))) == [(backend, driver)]


@pytest.mark.parametrize(
    ("controller", "disk", "expected"),
    [
        ("lsi53c895a,id=scsi0", "scsi-hd,bus=scsi0.0,drive=a", ("lsi53c895a", "scsi-hd")),
        ("virtio-scsi-pci,id=s", "scsi-block,bus=s.0,drive=a", ("virtio-scsi-pci", "scsi-hd")),
        ("virtio-scsi-pci,id=s", "scsi-hd,drive=a", ("virtio-scsi", "scsi-hd")),
        ("ich9-usb-ehci1,id=usb", "usb-storage,bus=usb.0,drive=a", ("ich9-usb-ehci1", "usb-storage")),
    ],
)
def test_controllers(controller: str, disk: str, expected: tuple[str, str]) -> None:
    line = ["qemu", "-device", controller, "-device", disk, "-device", disk.replace("=a", "=b")]
    found = built({**PLAIN, "command_line": line}, boot_disk("a"), boot_disk("b"))
    devices = [properties(value, "driver") for value in values(found, "-device")]
    assert [device["driver"] for device in devices] == [expected[0], expected[1], expected[1]]
    assert devices[0]["id"] + ".0" == devices[1]["bus"] == devices[2]["bus"]


def test_firmware() -> None:
    """The variables are in the backup; the code is read-only, and is not."""
    entries = [
        {"name": "code", "driver": "raw", "file": "/usr/share/OVMF/CODE.fd", "qdev": "/machine/system.flash0"},
        {"name": "vars", "driver": "raw", "file": "/var/lib/vars,1.fd", "qdev": "/machine/system.flash1"},
        {"name": "a", "driver": "qcow2", "file": "/a", "qdev": "", "device": "a", "node": "n"},
    ]
    secure = "driver=cfi.pflash01,property=secure,value=on"
    line = ["qemu", "-bios", "seabios.bin", "-global", secure, "-global", "kvm-pit.lost_tick_policy=discard"]
    description = {**PLAIN, "command_line": line, "disks": entries}
    disks = (boot_disk("vars", "/machine/system.flash1"), boot_disk("a"))
    assert [chip["name"] for chip in flash_chips(description)] == ["code", "vars"]
    found = built(description, *disks, copies={"code": "/dev/fdset/9"})
    code, variables, _disk = map(json.loads, values(found, "-blockdev"))
    assert code == {"driver": "raw", "node-name": "flash0", "file": {"driver": "file", "filename": "/dev/fdset/9"}}
    assert (variables["node-name"], variables["file"]["filename"]) == ("flash1", "/dev/fdset/vars")
    assert variables["backing"]["file"]["filename"] == "/dev/fdset/vars-s2"
    assert values(found, "-machine") == ["pc-q35-7.2", "pflash0=flash0", "pflash1=flash1"]
    assert (one(found, "-global"), one(found, "-bios")) == (secure, "handedseabios.bin")
    assert drivers([pair for pair in found if "flash" not in pair[1]]) == [("a", "virtio-blk-pci")]
    # Firmware that is given takes the place of all that.
    for option in ("-bios", "-pflash"):
        found = built(description, *disks, options=(option, "/other.fd"))
        assert (len(values(found, "-blockdev")), values(found, "-global"), one(found, option)) == (1, [], "/other.fd")
        assert values(found, "-machine") == ["pc-q35-7.2"]
        assert len(values(found, "-bios")) == (option == "-bios")


def test_console_and_agent() -> None:
    found = built(PLAIN, agent=True)
    assert "file,id=console,path=/dev/fdset/5" in values(found, "-chardev")
    assert one(found, "-serial") == "chardev:console"
    assert "socket,id=agent,fd=7,server=on,wait=off" in values(found, "-chardev")
    assert any("name=org.qemu.guest_agent.0" in value for value in values(found, "-device"))
    assert len(values(built(PLAIN), "-chardev")) == 1


def test_the_cage() -> None:
    assert set(one(built(PLAIN), "-sandbox").split(",")) == {
        "on",
        *(f"{what}=deny" for what in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")),
    }


@pytest.mark.parametrize(("memory", "available", "refused"), [(768, 1024, False), (769, 1024, True), (64, 64, True)])
def test_memory_that_others_need_is_not_taken(memory: int, available: int, refused: bool) -> None:
    description, host = {**PLAIN, "memory": memory * MIB}, replace(TCG, memory=available * MIB)
    assert one(built(description, options=("-m", "1G"), host=host), "-m") == "1G"
    if refused:
        with pytest.raises(
            BackupError, match=r"the VM had .* MiB of memory\. This machine has .* available.* boot_options"
        ):
            built(description, host=host)
    else:
        assert one(built(description, host=host), "-m") == f"{memory}M"


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["virtio-serial-pci", "virtio-blk-pci,drive=a", "virtio-blk-pci,drive=b"], ["channel", "a", "b"]),
        (["virtio-blk-pci,drive=b", "virtio-serial", "virtio-blk-pci,drive=a"], ["b", "channel", "a"]),
        (["virtio-blk-pci,drive=b", "virtio-blk-pci,drive=a"], ["b", "a", "channel"]),
        ([], ["a", "b", "channel"]),
    ],
)
def test_agent_and_disks_are_counted_as_before(devices: list[str], expected: list[str]) -> None:
    """A guest may know its agent's port as /dev/vport0p1."""
    line = ["qemu", *(word for device in devices for word in ("-device", device))]
    found = built({**PLAIN, "command_line": line}, boot_disk("a"), boot_disk("b"), agent=True)
    names = {"virtio-serial": "channel", "disk0": "a", "disk1": "b"}
    given = [properties(value, "driver") for value in values(found, "-device")]
    assert [names[device.get("drive", device["driver"])] for device in given if "chardev" not in device] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(OPTIONS, pattern=""), "boot_agent: "),
        (replace(OPTIONS, pattern="["), "boot_pattern: "),
        (replace(OPTIONS, extra=("--net", "user")), "boot_options: -net"),
        (replace(OPTIONS, tmpdir="/nowhere"), "tmpdir: "),
        (replace(OPTIONS, files=("/usr/share", "/nowhere")), "boot_files: there is no file or directory /nowhere"),
        (replace(OPTIONS, files=("usr",)), "boot_files: "),
    ],
)
def test_refused(options: BootOptions, message: str) -> None:
    with pytest.raises(Refused, match=message):
        options.check()
