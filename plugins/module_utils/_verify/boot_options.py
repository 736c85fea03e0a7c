# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Build the command line that boots the images of a set."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._qemu.command_line import FLASH, escape, flatten, option_keys, pairs, properties

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


MIB = 1 << 20
FORBIDDEN = frozenset({"-nic", "-net", "-netdev", "-daemonize"})
"""Options that would give the throwaway VM a network, or leave it running."""
KEPT = ("-kernel", "-initrd", "-append", "-dtb", "-bios")
"""Options of the VM's command line that are taken over as they are."""
MACHINE_PROPERTIES = ("acpi", "smm", "hpet", "vmport", "gic-version", "secure", "virtualization", "highmem")
"""Properties of the machine that its firmware or kernel may depend on. Others name objects that are not there."""
FLASH_GLOBAL = re.compile(r"(?:driver=)?(?:cfi\.pflash01|ICH9-LPC)\b")
"""Values of C(-global) that belong to firmware with Secure Boot."""
DISK_PROPERTIES = ("serial", "wwn", "bootindex", "logical_block_size", "physical_block_size")
"""Properties of a disk by which firmware and guest find it, or its partitions."""
INTERFACES = {"ide": "ide-hd", "scsi": "scsi-hd", "virtio": "virtio-blk"}
"""The devices that C(-drive if=...) makes. Its backends are called C(ide0-hd0), C(virtio0) and so on."""
SUBSTITUTES = {"scsi-block": "scsi-hd", "scsi-generic": "scsi-hd", "scsi-disk": "scsi-hd", "ide-drive": "ide-hd"}
"""Stand for devices that need a real disk behind them, or that new QEMUs do not know."""
CONTROLLERS = {"scsi": "virtio-scsi", "usb": "qemu-xhci"}
"""The controller that disks of a bus need; the first word of their driver tells the bus."""


@dataclass(frozen=True)
class BootOptions:
    """How to start, and the signs of life: console text that C(pattern) matches, the agent's answer.

    C(extra) are options for QEMU.
    """

    qemu: str
    tmpdir: str
    timeout: float
    pattern: str
    agent: bool
    extra: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise Refused where these options cannot be used."""
        if not self.pattern and not self.agent:
            raise Refused("boot_agent", "without the agent, only a boot_pattern could show that the guest lives")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise Refused("boot_pattern", f"{self.pattern!r} is no regular expression: {error}") from error
        for option, _value in pairs(self.extra):
            if option in FORBIDDEN:
                raise Refused("boot_options", f"{option}: a throwaway VM has no network, and is waited for")
        if not os.path.isdir(self.tmpdir):
            raise Refused("tmpdir", f"there is no directory {self.tmpdir}")


@dataclass(frozen=True)
class BootDisk:
    """A disk of a throwaway VM: the C(image) of a set, and the C(overlay) on it."""

    name: str
    node: str
    qdev: str
    image: str
    overlay: str

    def blockdev(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """Return the overlay for QEMU. C(file) is added to the options of its own file."""
        # The QEMU that has made an image may still have it open, and locked: one whose VM is paused does.
        backing = {
            "driver": "qcow2",
            "read-only": "on",
            "force-share": "on",
            "file": {"driver": "file", "filename": self.image},
        }
        return {"driver": "qcow2", "file": {"driver": "file", "filename": self.overlay, **file}, "backing": backing}


@dataclass(frozen=True)
class Host:
    """What a machine has for a throwaway VM."""

    kvm: bool
    processors: int


def qemu_options(
    description: Mapping[str, Any],
    disks: Sequence[BootDisk],
    flash: Mapping[str, str],
    options: BootOptions,
    host: Host,
    directory: str,
) -> list[str]:
    """Return QEMU's options. C(flash) are copies of flash chips that the backup does not have, by name."""
    given = {option for option, _value in pairs(options.extra)}
    if any("accel" in properties(value, "type") for option, value in pairs(options.extra) if option == "-machine"):
        given.add("-accel")
    ours = [(option, value) for option, value in _machine(description, host) if option not in given]
    if given & {"-bios", "-pflash"}:
        ours = [(option, value) for option, value in ours if option not in ("-bios", "-global")]
    else:
        ours += _flash(description, disks, flash)
    others = [disk for disk in disks if not FLASH.match(disk.qdev)]
    ours += _hardware(description, others, _agent_channel(directory) if options.agent else [])
    ours += _console(directory)
    flat = [word for pair in ours for word in pair]
    return ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none", *flat, *options.extra]


def _machine(description: Mapping[str, Any], host: Host) -> list[tuple[str, str]]:
    """Return the options of the machine, its processors and memory, and of what it is started from."""
    original = _original_options(description)
    had_kvm = description.get("accelerator") == "kvm"
    kvm = had_kvm and host.kvm
    cpus = description.get("cpus") or {}
    memory = description.get("memory")
    found = [
        ("-name", escape("guest=verify-{}".format(description.get("name") or "vm"))),
        ("-machine", _machine_type(description, original)),
        ("-accel", "kvm" if kvm else "tcg"),
        # TCG cannot do what a real processor did; this is the most that it can.
        ("-cpu", "max" if had_kvm and not kvm else _cpu(cpus, original)),
        ("-smp", str(min(cpus.get("count") or 1, host.processors))),
        ("-m", f"{memory // MIB}M" if memory else ""),
        ("-uuid", description.get("uuid") or ""),
    ]
    found += [(option, value) for option, value in original if option in KEPT]
    found += [(option, value) for option, value in original if option == "-global" and FLASH_GLOBAL.match(value)]
    return [(option, value) for option, value in found if value]


def _machine_type(description: Mapping[str, Any], original: Sequence[tuple[str, str]]) -> str:
    given: dict[str, str] = {}
    for option, value in original:
        if option == "-machine":
            given.update(properties(value, "type"))
    kind = description.get("machine") or given.get("type", "")
    kept = [f"{key}={given[key]}" for key in MACHINE_PROPERTIES if key in given]
    return ",".join([kind, *kept]) if kind else ""


def _cpu(cpus: Mapping[str, Any], original: Sequence[tuple[str, str]]) -> str:
    given = [value for option, value in original if option == "-cpu"]
    # Without the original command line only the type is known, such as Haswell-x86_64-cpu.
    return given[-1] if given else re.sub(r"-[a-z0-9_]+-cpu\Z", "", cpus.get("type") or "")


def _flash(
    description: Mapping[str, Any], disks: Sequence[BootDisk], copies: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return the options of the firmware's flash chips: of the backup, or else copies of those on this machine."""
    chips = {_unit(disk.qdev): dict(flatten(disk.blockdev({}))) for disk in disks if FLASH.match(disk.qdev)}
    for chip in flash_chips(description):
        if chip["name"] in copies:
            chips[_unit(chip["qdev"])] = {"driver": chip["driver"], "file.filename": copies[chip["name"]]}
    return [("-drive", option_keys({"if": "pflash", "unit": str(unit), **chips[unit]})) for unit in sorted(chips)]


def _unit(qdev: str) -> int:
    return int(re.findall(r"flash(\d+)", qdev)[0])


def flash_chips(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the VM's flash chips, as C(vm.json) describes them among its disks."""
    return [disk for disk in description.get("disks") or () if FLASH.match(disk.get("qdev") or "")]


def _hardware(
    description: Mapping[str, Any], disks: Sequence[BootDisk], channel: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return the disks and the agent's channel in the order in which the guest had their devices: it counts them."""
    devices = [properties(value, "driver") for option, value in _original_options(description) if option == "-device"]
    serial = [at for at, device in enumerate(devices) if device.get("driver", "").startswith("virtio-serial")]
    first = serial[0] if serial else len(devices)
    # A disk that was plugged in later comes after all others.
    order = sorted((_device_index(description, disk, devices), number) for number, disk in enumerate(disks))
    found: list[tuple[str, str]] = []
    buses: dict[str, str] = {}
    for at, number in order:
        if at > first and channel:
            found += channel
            channel = ()
        own = devices[at] if at < len(devices) else {"driver": _driver(description, disks[number])}
        found += _disk(f"disk{number}", disks[number], own, devices, buses)
    return [*found, *channel]


def _disk(
    node: str, disk: BootDisk, own: Mapping[str, str], devices: Sequence[Mapping[str, str]], buses: dict[str, str]
) -> list[tuple[str, str]]:
    """Return the options of a disk on a device like its C(own). C(buses) are the controllers so far, by driver."""
    driver = SUBSTITUTES.get(own["driver"], own["driver"])
    controller = _controller(driver.partition("-")[0], own, devices)
    found = []
    if controller and controller not in buses:
        buses[controller] = f"bus{len(buses)}"
        found.append(("-device", f"{controller},id={buses[controller]}"))
    # The overlay is thrown away soon: nothing has to reach stable storage.
    cache = {"cache.no-flush": "on"}
    blockdev = {"node-name": node, **cache, **dict(flatten(disk.blockdev(cache)))}
    device = {"driver": driver, "drive": node, **{key: own[key] for key in DISK_PROPERTIES if key in own}}
    if driver == "nvme":
        device.setdefault("serial", node)
    if controller:
        device["bus"] = buses[controller] + ".0"
    return [*found, ("-blockdev", option_keys(blockdev)), ("-device", option_keys(device))]


def _original_options(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    return pairs(description.get("command_line") or ())


def _device_index(description: Mapping[str, Any], disk: BootDisk, devices: Sequence[Mapping[str, str]]) -> int:
    """Return which device of the command line a disk was on; one behind the last where it was on none."""
    described = _described(description, disk)
    drives = {described.get("device"), described.get("node"), disk.node, disk.name} - {None, ""}
    for at, device in enumerate(devices):
        # A filter may stand between device and disk. Then only the device's own id tells.
        if device.get("drive") in drives or (device.get("id") and device["id"] == _device_id(disk.qdev)):
            return at
    return len(devices)


def _described(description: Mapping[str, Any], disk: BootDisk) -> Mapping[str, Any]:
    """Return what C(vm.json) says of a disk."""
    return next((one for one in description.get("disks") or () if one.get("name") == disk.name), {})


def _device_id(qdev: str) -> str:
    """Return C(vd0) of C(/machine/peripheral/vd0/virtio-backend), or of C(vd0) itself."""
    return qdev.partition("/machine/peripheral/")[2].partition("/")[0] if qdev.startswith("/") else qdev


def _driver(description: Mapping[str, Any], disk: BootDisk) -> str:
    """Return the driver of a disk whose device is not on the command line."""
    kinds = {device["id"]: device["type"] for device in description.get("devices") or () if device.get("id")}
    plugged = kinds.get(_device_id(disk.qdev))
    if plugged:
        return str(plugged)
    backend = re.match(r"[a-z]+(?=\d)", _described(description, disk).get("device") or "")
    return INTERFACES.get(backend.group() if backend else "", "virtio-blk-pci")


def _controller(bus: str, device: Mapping[str, str], devices: Sequence[Mapping[str, str]]) -> str:
    """Return the driver of the controller that a disk needs; empty where it needs none."""
    if bus not in CONTROLLERS:
        return ""
    name = device.get("bus", "").partition(".")[0]
    return next((one["driver"] for one in devices if name and one.get("id") == name), CONTROLLERS[bus])


def _console(directory: str) -> list[tuple[str, str]]:
    path = escape(os.path.join(directory, "console"))
    return [("-chardev", f"file,id=console,path={path}"), ("-serial", "chardev:console")]


def _agent_channel(directory: str) -> list[tuple[str, str]]:
    path = escape(os.path.join(directory, "agent"))
    return [
        ("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
        ("-device", "virtio-serial"),
        ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]
