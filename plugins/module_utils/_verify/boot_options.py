# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
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
PROMISED = frozenset({"-nic", "-net", "-netdev", "-daemonize"})
"""Options that would break what is promised: no network, and nothing left running."""
PASSED_ON = ("-kernel", "-initrd", "-append", "-dtb", "-bios")
"""Options of the VM's command line that are taken over as they are."""
MACHINE_PROPERTIES = ("acpi", "smm", "hpet", "vmport", "gic-version", "secure", "virtualization", "highmem")
"""Properties of the machine that its firmware or kernel may depend on. Others name objects that are not there."""
FLASH_GLOBAL = re.compile(r"(?:driver=)?(?:cfi\.pflash01|ICH9-LPC)\b")
"""Values of C(-global) that belong to firmware with Secure Boot."""
DISK_PROPERTIES = ("serial", "wwn", "bootindex", "logical_block_size", "physical_block_size")
"""Properties of a disk by which firmware and guest find it, or its partitions."""
INTERFACES = {"ide": "ide-hd", "scsi": "scsi-hd", "virtio": "virtio-blk"}
"""The devices that C(-drive if=...) makes. Its backends are called C(ide0-hd0), C(virtio0) and so on."""
PASSED_THROUGH = {"scsi-block": "scsi-hd", "scsi-generic": "scsi-hd", "scsi-disk": "scsi-hd", "ide-drive": "ide-hd"}
"""What stands for devices that want a real disk behind them, or that new QEMUs do not know."""
CONTROLLERS = {"scsi": "virtio-scsi", "usb": "qemu-xhci"}
"""What disks of a bus need that is not there by itself; the first word of their driver tells the bus."""


@dataclass(frozen=True)
class BootOptions:
    """How to start, and what counts as a sign of life: what C(pattern) finds on the console, the agent's answer."""

    qemu: str
    tmpdir: str
    timeout: float
    pattern: str
    agent: bool
    options: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise Refused where this cannot be done."""
        if not self.pattern and not self.agent:
            raise Refused("boot_agent", "without the agent, only a boot_pattern could show that the guest lives")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise Refused("boot_pattern", f"{self.pattern!r} is no regular expression: {error}") from error
        for option, _value in pairs(self.options):
            if option in PROMISED:
                raise Refused("boot_options", f"{option}: a throwaway VM has no network, and is waited for")
        if not os.path.isdir(self.tmpdir):
            raise Refused("tmpdir", f"there is no directory {self.tmpdir}")


@dataclass(frozen=True)
class BootDisk:
    """A disk of a backup: its C(image), and the C(overlay) that is put over it. C(node), C(qdev) as in the manifest."""

    name: str
    node: str
    qdev: str
    image: str
    overlay: str

    def options(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """The overlay for QEMU, with what its own C(file) is to have besides."""
        # A QEMU may still hold the images open that it has made, and with them their locks: a paused one does.
        backing = {
            "driver": "qcow2",
            "read-only": "on",
            "force-share": "on",
            "file": {"driver": "file", "filename": self.image},
        }
        return {"driver": "qcow2", "file": {"driver": "file", "filename": self.overlay, **file}, "backing": backing}


@dataclass(frozen=True)
class Host:
    """What the machine has for the throwaway VM."""

    kvm: bool
    processors: int


# The command line: pure functions of vm.json


def command(
    description: Mapping[str, Any],
    layers: Sequence[BootDisk],
    copies: Mapping[str, str],
    wish: BootOptions,
    host: Host,
    place: str,
) -> list[str]:
    """QEMU's options. C(copies) are flash chips that the backup does not have, by name; C(place) is the directory."""
    given = {option for option, _value in pairs(wish.options)}
    if any("accel" in properties(value, "type") for option, value in pairs(wish.options) if option == "-machine"):
        given.add("-accel")
    ours = [(option, value) for option, value in _machine(description, host) if option not in given]
    if given & {"-bios", "-pflash"}:
        ours = [(option, value) for option, value in ours if option not in ("-bios", "-global")]
    else:
        ours += _flash(description, layers, copies)
    disks = [layer for layer in layers if not FLASH.match(layer.qdev)]
    ours += _hardware(description, disks, _agent_channel(place) if wish.agent else [])
    ours += _console(place)
    flat = [word for pair in ours for word in pair]
    return ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none", *flat, *wish.options]


def _machine(description: Mapping[str, Any], host: Host) -> list[tuple[str, str]]:
    """Machine, processors, memory, and what the VM was started from."""
    started = _started(description)
    had_kvm = description.get("accelerator") == "kvm"
    kvm = had_kvm and host.kvm
    cpus = description.get("cpus") or {}
    memory = description.get("memory")
    found = [
        ("-name", escape("guest=verify-{}".format(description.get("name") or "vm"))),
        ("-machine", _machine_type(description, started)),
        ("-accel", "kvm" if kvm else "tcg"),
        # What a real processor had is not to be had without one; this is all that there is.
        ("-cpu", "max" if had_kvm and not kvm else _cpu(cpus, started)),
        ("-smp", str(min(cpus.get("count") or 1, host.processors))),
        ("-m", f"{memory // MIB}M" if memory else ""),
        ("-uuid", description.get("uuid") or ""),
    ]
    found += [(option, value) for option, value in started if option in PASSED_ON]
    found += [(option, value) for option, value in started if option == "-global" and FLASH_GLOBAL.match(value)]
    return [(option, value) for option, value in found if value]


def _machine_type(description: Mapping[str, Any], started: Sequence[tuple[str, str]]) -> str:
    given: dict[str, str] = {}
    for option, value in started:
        if option == "-machine":
            given.update(properties(value, "type"))
    kind = description.get("machine") or given.get("type", "")
    kept = [f"{key}={given[key]}" for key in MACHINE_PROPERTIES if key in given]
    return ",".join([kind, *kept]) if kind else ""


def _cpu(cpus: Mapping[str, Any], started: Sequence[tuple[str, str]]) -> str:
    given = [value for option, value in started if option == "-cpu"]
    # Without a command line only the type is known, such as Haswell-x86_64-cpu.
    return given[-1] if given else re.sub(r"-[a-z0-9_]+-cpu\Z", "", cpus.get("type") or "")


def _flash(
    description: Mapping[str, Any], layers: Sequence[BootDisk], copies: Mapping[str, str]
) -> list[tuple[str, str]]:
    """The firmware's flash chips: of the backup, or else copies of those on this machine."""
    chips = {_unit(layer.qdev): dict(flatten(layer.options({}))) for layer in layers if FLASH.match(layer.qdev)}
    for disk in flash_chips(description):
        if disk["name"] in copies:
            chips[_unit(disk["qdev"])] = {"driver": disk["driver"], "file.filename": copies[disk["name"]]}
    return [("-drive", option_keys({"if": "pflash", "unit": str(unit), **chips[unit]})) for unit in sorted(chips)]


def _unit(qdev: str) -> int:
    return int(re.findall(r"flash(\d+)", qdev)[0])


def flash_chips(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The VM's flash chips, as C(vm.json) describes them among its disks."""
    return [disk for disk in description.get("disks") or () if FLASH.match(disk.get("qdev") or "")]


def _hardware(
    description: Mapping[str, Any], layers: Sequence[BootDisk], channel: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The disks and the agent's channel in the order in which the guest had their devices: it counts them."""
    devices = [properties(value, "driver") for option, value in _started(description) if option == "-device"]
    serial = [at for at, device in enumerate(devices) if device.get("driver", "").startswith("virtio-serial")]
    first = serial[0] if serial else len(devices)
    # A disk that was plugged in later comes after all others.
    seats = sorted((_device_index(description, layer, devices), number) for number, layer in enumerate(layers))
    found: list[tuple[str, str]] = []
    buses: dict[str, str] = {}
    for at, number in seats:
        if at > first and channel:
            found += channel
            channel = ()
        own = devices[at] if at < len(devices) else {"driver": _driver(description, layers[number])}
        found += _disk(f"disk{number}", layers[number], own, devices, buses)
    return [*found, *channel]


def _disk(
    node: str, layer: BootDisk, own: Mapping[str, str], devices: Sequence[Mapping[str, str]], buses: dict[str, str]
) -> list[tuple[str, str]]:
    """A disk on a device like its C(own). C(buses) are the controllers that there are, by driver."""
    driver = PASSED_THROUGH.get(own["driver"], own["driver"])
    controller = _controller(driver.partition("-")[0], own, devices)
    found = []
    if controller and controller not in buses:
        buses[controller] = f"bus{len(buses)}"
        found.append(("-device", f"{controller},id={buses[controller]}"))
    # What the guest wants flushed is thrown away soon.
    cache = {"cache.no-flush": "on"}
    blockdev = {"node-name": node, **cache, **dict(flatten(layer.options(cache)))}
    device = {"driver": driver, "drive": node, **{key: own[key] for key in DISK_PROPERTIES if key in own}}
    if driver == "nvme":
        device.setdefault("serial", node)
    if controller:
        device["bus"] = buses[controller] + ".0"
    return [*found, ("-blockdev", option_keys(blockdev)), ("-device", option_keys(device))]


def _started(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    return pairs(description.get("command_line") or ())


def _device_index(description: Mapping[str, Any], layer: BootDisk, devices: Sequence[Mapping[str, str]]) -> int:
    """Which of the devices of the command line this disk was on; beyond them all where it was on none."""
    told = _told(description, layer)
    drives = {told.get("device"), told.get("node"), layer.node, layer.name} - {None, ""}
    for at, device in enumerate(devices):
        # A filter may stand between device and disk. Then the device's own id is what tells.
        if device.get("drive") in drives or (device.get("id") and device["id"] == _device_id(layer.qdev)):
            return at
    return len(devices)


def _told(description: Mapping[str, Any], layer: BootDisk) -> Mapping[str, Any]:
    return next((disk for disk in description.get("disks") or () if disk.get("name") == layer.name), {})


def _device_id(qdev: str) -> str:
    """C(vd0) of C(/machine/peripheral/vd0/virtio-backend), or of C(vd0) itself."""
    return qdev.partition("/machine/peripheral/")[2].partition("/")[0] if qdev.startswith("/") else qdev


def _driver(description: Mapping[str, Any], layer: BootDisk) -> str:
    """The driver of a disk whose device is not on the command line."""
    kinds = {device["id"]: device["type"] for device in description.get("devices") or () if device.get("id")}
    plugged = kinds.get(_device_id(layer.qdev))
    if plugged:
        return str(plugged)
    backend = re.match(r"[a-z]+(?=\d)", _told(description, layer).get("device") or "")
    return INTERFACES.get(backend.group() if backend else "", "virtio-blk-pci")


def _controller(bus: str, device: Mapping[str, str], devices: Sequence[Mapping[str, str]]) -> str:
    """The driver of the controller that a disk needs; empty where it needs none of its own."""
    if bus not in CONTROLLERS:
        return ""
    name = device.get("bus", "").partition(".")[0]
    return next((one["driver"] for one in devices if name and one.get("id") == name), CONTROLLERS[bus])


def _console(place: str) -> list[tuple[str, str]]:
    path = escape(os.path.join(place, "console"))
    return [("-chardev", f"file,id=console,path={path}"), ("-serial", "chardev:console")]


def _agent_channel(place: str) -> list[tuple[str, str]]:
    path = escape(os.path.join(place, "agent"))
    return [
        ("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
        ("-device", "virtio-serial"),
        ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]
