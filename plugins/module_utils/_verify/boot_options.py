# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Build the command line that boots the images of a set."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .._common.device_names import FLASH
from .._common.errors import BackupError, Refused
from .._common.formats import human
from .._qemu.image_chain import FORMAT
from .._repository.names import refuse_inside
from .boot_values import checked
from .cage import SANDBOX
from .command_line import option_keys, pairs, properties

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from .cage import User


MIB = 1 << 20
FORBIDDEN = frozenset({"-nic", "-net", "-netdev", "-daemonize"})
"""Options that would give the throwaway VM a network, or leave it running."""
FILES = ("-kernel", "-initrd", "-dtb", "-bios")
"""Options of the VM's command line that name a file which it is started from."""
MACHINE_PROPERTIES = ("acpi", "smm", "hpet", "vmport", "gic-version", "secure", "virtualization", "highmem")
"""Properties of the machine that its firmware or kernel may depend on. Others name objects that are not there."""
FLASH_GLOBAL = re.compile(r"(?:driver=)?(?:cfi\.pflash01|ICH9-LPC)\b")
"""Values of C(-global) that belong to firmware with Secure Boot."""
FLASH_UNITS = ("0", "1")
"""The flash chips that a machine has whose firmware is in some (-machine pflash0=...)."""
MEMORY_SHARE = 0.75
"""How much of the memory that is available a throwaway VM may take: the others grow."""
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

    C(extra) are options for QEMU, C(files) what else a set may name of this machine. QEMU changes to C(user).
    """

    qemu: str
    tmpdir: str
    timeout: float
    pattern: str
    agent: bool
    extra: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    user: User | None = None

    def check(self) -> None:
        """Raise Refused where these options cannot be used."""
        if not self.pattern and not self.agent:
            raise Refused(
                "boot_agent", "without the agent, only boot_pattern can show that the guest has started; give one"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise Refused("boot_pattern", f"{self.pattern!r} is no regular expression: {error}") from error
        for option, _value in pairs(self.extra):
            if option in FORBIDDEN:
                raise Refused(
                    "boot_options",
                    f"{option}: a throwaway VM may not have a network, and may not run in the background",
                )
        for path in self.files:
            if not os.path.isabs(path) or not os.path.exists(path):
                raise Refused("boot_files", f"there is no file or directory {path}")
        if not os.path.isdir(self.tmpdir):
            raise Refused("tmpdir", f"there is no directory {self.tmpdir}")
        refuse_inside("tmpdir", self.tmpdir)

    @property
    def given(self) -> set[str]:
        """Return the options that take the place of those of the VM."""
        found = {option for option, _value in pairs(self.extra)}
        if any("accel" in properties(value, "type") for option, value in pairs(self.extra) if option == "-machine"):
            found.add("-accel")
        return found

    @property
    def with_flash(self) -> bool:
        """Return whether the firmware is that of the VM."""
        return not self.given & {"-bios", "-pflash"}


@dataclass(frozen=True)
class BootDisk:
    """A disk of a throwaway VM: its C(overlay) at C(path), and the images below, the top one first, by QEMU's names."""

    name: str
    node: str
    qdev: str
    path: str
    overlay: str
    layers: tuple[str, ...]

    def blockdev(self, node: str) -> str:
        """Return the value of C(-blockdev): all that QEMU is to open."""
        below: dict[str, Any] | None = None
        for name in reversed(self.layers):
            file = {"driver": "file", "filename": name}
            # The QEMU that has made an image may still have it open, and locked: one whose VM is paused does.
            below = {"driver": FORMAT, "read-only": True, "force-share": True, "file": file, "backing": below}
        # The overlay is thrown away soon: nothing has to reach stable storage.
        cache = {"no-flush": True}
        own = {"driver": "file", "filename": self.overlay, "cache": cache}
        return json.dumps({"driver": FORMAT, "node-name": node, "cache": cache, "file": own, "backing": below})


@dataclass(frozen=True)
class Host:
    """What a machine has for a throwaway VM. C(memory) are the bytes that are available."""

    kvm: bool
    processors: int
    memory: int


@dataclass(frozen=True)
class Handed:
    """What QEMU gets as open files, by the names that it knows them by.

    C(files) are what options of the VM have named, by option, C(flash) copies of flash chips that the backup does not
    have, by name. C(console) is written to, and C(agent) is a socket that listens, for which zero stands where none is.
    """

    files: Mapping[str, str]
    flash: Mapping[str, str]
    console: str
    agent: int


def named_files(description: Mapping[str, Any], options: BootOptions) -> dict[str, str]:
    """Return the files that the VM was started from, as far as nothing is given in their place, by option."""
    return {
        option: value
        for option, value in _original_options(description)
        if option in FILES and value and option not in options.given and (option != "-bios" or options.with_flash)
    }


def qemu_options(
    description: Mapping[str, Any], disks: Sequence[BootDisk], handed: Handed, options: BootOptions, host: Host
) -> list[str]:
    """Return QEMU's options. BackupError where the set asks for what no throwaway VM is given."""
    ours = [(option, value) for option, value in _machine(description, handed, host, options) if value]
    if options.with_flash:
        ours += _flash(description, disks, handed.flash)
    others = [disk for disk in disks if not FLASH.match(disk.qdev)]
    ours += _hardware(description, others, _agent_channel(handed.agent) if options.agent else [])
    ours += [("-chardev", f"file,id=console,path={handed.console}"), ("-serial", "chardev:console")]
    flat = [word for pair in ours for word in pair]
    return ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none", *flat, *options.extra]


def _machine(description: Mapping[str, Any], handed: Handed, host: Host, options: BootOptions) -> list[tuple[str, str]]:
    """Return the options of the machine, its processors and memory, and of what it is started from."""
    original = _original_options(description)
    had_kvm = description.get("accelerator") == "kvm"
    kvm = had_kvm and host.kvm
    cpus = description.get("cpus") or {}
    found: dict[str, Callable[[], str]] = {
        # It tells in a list of processes what this one is.
        "-name": lambda: "guest=verify-" + re.sub(r"[^A-Za-z0-9._-]", "_", description.get("name") or "vm")[:64],
        "-sandbox": lambda: SANDBOX,
        "-machine": lambda: _machine_type(description, original),
        "-accel": lambda: "kvm" if kvm else "tcg",
        # TCG cannot do what a real processor did; this is the most that it can.
        "-cpu": lambda: "max" if had_kvm and not kvm else _cpu(cpus, original),
        "-smp": lambda: str(min(cpus.get("count") or 1, host.processors)),
        "-m": lambda: _memory(description.get("memory") or 0, host.memory),
        "-uuid": lambda: _checked("uuid", description.get("uuid")),
        **{option: partial(str, handed.files.get(option, "")) for option in FILES},
        "-append": lambda: _checked("kernel command line", dict(original).get("-append")),
    }
    # What is given in the place of a value may be anything, and so may the value.
    taken = [(option, value()) for option, value in found.items() if option not in options.given]
    if options.with_flash and "-global" not in options.given:
        secure = (value for option, value in original if option == "-global" and FLASH_GLOBAL.match(value))
        taken += [("-global", checked("-global", value)) for value in secure]
    return taken


def _checked(kind: str, value: str | None) -> str:
    return checked(kind, value) if value else ""


def _memory(wanted: int, available: int) -> str:
    """Return the memory of a VM; BackupError where the machine has too little for it."""
    if wanted > available * MEMORY_SHARE:
        raise BackupError(
            f"the VM had {human(wanted)} of memory. This machine has {human(available)} available, and a throwaway VM"
            f" may use {MEMORY_SHARE:.0%} of that; give it less with boot_options, such as [-m, 1G]"
        )
    return f"{wanted // MIB}M" if wanted else ""


def _machine_type(description: Mapping[str, Any], original: Sequence[tuple[str, str]]) -> str:
    given: dict[str, str] = {}
    for option, value in original:
        if option == "-machine":
            given.update(properties(value, "type"))
    kind = description.get("machine") or given.get("type", "")
    kept = [f"{key}={checked('property of the machine', given[key])}" for key in MACHINE_PROPERTIES if key in given]
    return ",".join([checked("machine", kind), *kept]) if kind else ""


def _cpu(cpus: Mapping[str, Any], original: Sequence[tuple[str, str]]) -> str:
    given = [value for option, value in original if option == "-cpu"]
    # Without the original command line only the type is known, such as Haswell-x86_64-cpu.
    return _checked("processor", given[-1] if given else re.sub(r"-[a-z0-9_]+-cpu\Z", "", cpus.get("type") or ""))


def _flash(
    description: Mapping[str, Any], disks: Sequence[BootDisk], copies: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return the options of the firmware's flash chips: of the backup, or else copies of those on this machine."""
    chips = {_unit(disk.qdev): disk.blockdev for disk in disks if FLASH.match(disk.qdev)}
    for chip in flash_chips(description):
        if copies.get(chip["name"]):
            chips[_unit(chip["qdev"])] = partial(_raw, copies[chip["name"]])
    found = []
    for unit in sorted(chips):
        found += [("-blockdev", chips[unit](f"flash{unit}")), ("-machine", f"pflash{unit}=flash{unit}")]
    return found


def _raw(name: str, node: str) -> str:
    return json.dumps({"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": name}})


def _unit(qdev: str) -> int:
    """Return which flash chip it is; BackupError for one that no machine has."""
    unit = re.findall(r"flash(\d+)", qdev)[0]
    if unit not in FLASH_UNITS:
        raise BackupError(
            f"the set has flash chip {unit[:9]}, and a throwaway VM can only have {' and '.join(FLASH_UNITS)}"
        )
    return int(unit)


def flash_chips(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the VM's flash chips, as C(vm.json) describes them among its disks."""
    return [disk for disk in description.get("disks") or () if disk.get("name") and FLASH.match(disk.get("qdev", ""))]


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
    driver = checked("disk", SUBSTITUTES.get(own.get("driver", ""), own.get("driver", "")))
    controller = _controller(driver.partition("-")[0], own, devices)
    found = []
    if controller and controller not in buses:
        buses[controller] = f"bus{len(buses)}"
        found.append(("-device", f"{checked('controller', controller)},id={buses[controller]}"))
    device = {"driver": driver, "drive": node}
    for key in DISK_PROPERTIES:
        if key in own:
            device[key] = checked("serial" if key == "serial" else "property of a disk", own[key])
    if driver == "nvme":
        device.setdefault("serial", node)
    if controller:
        device["bus"] = buses[controller] + ".0"
    return [*found, ("-blockdev", disk.blockdev(node)), ("-device", option_keys(device))]


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
    kinds = {device["id"]: device.get("type") for device in description.get("devices") or () if device.get("id")}
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
    return next((one.get("driver", "") for one in devices if name and one.get("id") == name), CONTROLLERS[bus])


def _agent_channel(socket: int) -> list[tuple[str, str]]:
    return [
        ("-chardev", f"socket,id=agent,fd={socket},server=on,wait=off"),
        ("-device", "virtio-serial"),
        ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]
