# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""A throwaway VM that starts from a backup: put together from C(vm.json), watched for a sign of life, and put away.

It has no network. It writes to overlays in a directory of its own, which goes with it; what it reads stays as it is.

Reference: QEMU 7.2, qemu-options.hx.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._agent import Agent
from ansible_collections.vmfleet.backup.plugins.module_utils._bound import bound
from ansible_collections.vmfleet.backup.plugins.module_utils._description import FLASH, ITEM
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import AgentError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._spaces import PROCESSES, spaces
from ansible_collections.vmfleet.backup.plugins.module_utils._target import free_bytes
from ansible_collections.vmfleet.backup.plugins.module_utils._units import human

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

PREFIX = "vmfleet-boot-"
"""What the directory of a throwaway VM is called, followed by whose it is."""

INTERVAL = 0.25
"""Seconds between two looks at the guest's console."""

ROOM = 128 << 20
"""Bytes that a throwaway VM leaves free where its overlays are: others live there."""

CONSOLE_LIMIT = 1 << 20
"""Bytes of the console, the last ones, that are looked at."""

TAIL = 40
"""Lines of the console that are told of a guest that did not start."""

END_TIMEOUT = 10.0
"""Seconds for a killed QEMU to be gone; only one that hangs in the kernel takes longer."""

MIB = 1 << 20

ALIASES = {"-M": "-machine", "-enable-kvm": "-accel", "-no-kvm": "-accel"}
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

NICENESS = 10
"""QEMU gives way to the VMs of the hypervisor."""

KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12

NOISE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]")
"""What moves a terminal's cursor or colours its text."""


@dataclass(frozen=True)
class Wish:
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
class Layer:
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


@dataclass(frozen=True)
class Ending:
    """How it went. C(error) is empty where there was a sign of life; C(guilty) tells the backup's faults from ours."""

    error: str = ""
    console: tuple[str, ...] = ()
    guilty: bool = True


# The command line: pure functions of vm.json


def command(
    description: Mapping[str, Any],
    layers: Sequence[Layer],
    copies: Mapping[str, str],
    wish: Wish,
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
        ("-name", _escape("guest=verify-{}".format(description.get("name") or "vm"))),
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


def _flash(description: Mapping[str, Any], layers: Sequence[Layer], copies: Mapping[str, str]) -> list[tuple[str, str]]:
    """The firmware's flash chips: of the backup, or else copies of those on this machine."""
    chips = {_unit(layer.qdev): dict(_flat(layer.options({}))) for layer in layers if FLASH.match(layer.qdev)}
    for disk in flash_chips(description):
        if disk["name"] in copies:
            chips[_unit(disk["qdev"])] = {"driver": disk["driver"], "file.filename": copies[disk["name"]]}
    return [("-drive", _keys({"if": "pflash", "unit": str(unit), **chips[unit]})) for unit in sorted(chips)]


def _unit(qdev: str) -> int:
    return int(re.findall(r"flash(\d+)", qdev)[0])


def flash_chips(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The VM's flash chips, as C(vm.json) describes them among its disks."""
    return [disk for disk in description.get("disks") or () if FLASH.match(disk.get("qdev") or "")]


def _hardware(
    description: Mapping[str, Any], layers: Sequence[Layer], channel: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The disks and the agent's channel in the order in which the guest had their devices: it counts them."""
    devices = [properties(value, "driver") for option, value in _started(description) if option == "-device"]
    serial = [at for at, device in enumerate(devices) if device.get("driver", "").startswith("virtio-serial")]
    first = serial[0] if serial else len(devices)
    # A disk that was plugged in later comes after all others.
    seats = sorted((_place(description, layer, devices), number) for number, layer in enumerate(layers))
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
    node: str, layer: Layer, own: Mapping[str, str], devices: Sequence[Mapping[str, str]], buses: dict[str, str]
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
    blockdev = {"node-name": node, **cache, **dict(_flat(layer.options(cache)))}
    device = {"driver": driver, "drive": node, **{key: own[key] for key in DISK_PROPERTIES if key in own}}
    if driver == "nvme":
        device.setdefault("serial", node)
    if controller:
        device["bus"] = buses[controller] + ".0"
    return [*found, ("-blockdev", _keys(blockdev)), ("-device", _keys(device))]


def _started(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    return pairs(description.get("command_line") or ())


def _place(description: Mapping[str, Any], layer: Layer, devices: Sequence[Mapping[str, str]]) -> int:
    """Which of the devices of the command line this disk was on; beyond them all where it was on none."""
    told = _told(description, layer)
    drives = {told.get("device"), told.get("node"), layer.node, layer.name} - {None, ""}
    for at, device in enumerate(devices):
        # A filter may stand between device and disk. Then the device's own id is what tells.
        if device.get("drive") in drives or (device.get("id") and device["id"] == _device_id(layer.qdev)):
            return at
    return len(devices)


def _told(description: Mapping[str, Any], layer: Layer) -> Mapping[str, Any]:
    return next((disk for disk in description.get("disks") or () if disk.get("name") == layer.name), {})


def _device_id(qdev: str) -> str:
    """C(vd0) of C(/machine/peripheral/vd0/virtio-backend), or of C(vd0) itself."""
    return qdev.partition("/machine/peripheral/")[2].partition("/")[0] if qdev.startswith("/") else qdev


def _driver(description: Mapping[str, Any], layer: Layer) -> str:
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
    path = _escape(os.path.join(place, "console"))
    return [("-chardev", f"file,id=console,path={path}"), ("-serial", "chardev:console")]


def _agent_channel(place: str) -> list[tuple[str, str]]:
    path = _escape(os.path.join(place, "agent"))
    return [
        ("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
        ("-device", "virtio-serial"),
        ("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


def pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their values; one without a value has an empty one. Names of images are left out."""
    found: list[tuple[str, str]] = []
    free = False
    for argument in arguments:
        if argument.startswith("-"):
            # QEMU takes --object for -object.
            name = "-" + argument.lstrip("-")
            found.append((ALIASES.get(name, name), ""))
            free = True
        elif free:
            found[-1] = (found[-1][0], argument)
            free = False
    return found


def properties(value: str, first: str) -> dict[str, str]:
    """An option's C(key=value) pairs. The first may come without its key, which is C(first); JSON is read as well."""
    if value.startswith("{"):
        try:
            return {key: str(one) for key, one in json.loads(value).items()}
        except ValueError:
            return {}
    found: dict[str, str] = {}
    for number, item in enumerate(ITEM.findall(value)):
        key, equals, text = item.partition("=")
        if not equals:
            key, text = (first, item) if number == 0 else (item, "on")
        found[key] = text.replace(",,", ",")
    return found


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _keys(values: Mapping[str, str]) -> str:
    return ",".join(f"{key}={_escape(value)}" for key, value in values.items())


def _escape(value: str) -> str:
    return value.replace(",", ",,")


# The machine that it runs on


def this_host() -> Host:
    return Host(kvm_works(), len(os.sched_getaffinity(0)))


def kvm_works() -> bool:
    """Whether this process may use KVM, and the kernel answers."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, KVM_GET_API_VERSION) == KVM_API_VERSION
    except OSError:
        return False
    finally:
        os.close(fd)


def find_qemu(wanted: str = "") -> str:
    """The path of QEMU; Refused where there is none."""
    machine = os.uname().machine
    architecture = {"i686": "i386", "ppc64le": "ppc64", "armv7l": "arm"}.get(machine, machine)
    # Red Hat has it under a name of its own.
    names = [wanted] if wanted else [f"qemu-system-{architecture}", "/usr/libexec/qemu-kvm"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise Refused("qemu", f"{names[0]} is not installed on this machine; depth boot needs it")
    return found


# Directories


@contextlib.contextmanager
def place_for(tmpdir: str) -> Iterator[str]:
    """A directory for one throwaway VM, which goes with what is in it."""
    me = Process.of(os.getpid())
    owner = f"{me.pid}-{me.start}" if me else "0-0"
    # Nobody can tell in another pid namespace whether this one has ended.
    owner += f"-{spaces()[PROCESSES]}"
    path = tempfile.mkdtemp(prefix=f"{PREFIX}{owner}-", dir=tmpdir)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def clear_places(tmpdir: str) -> None:
    """Remove what modules have left that were killed: their QEMU died with them."""
    for path in glob.glob(os.path.join(glob.escape(tmpdir), PREFIX + "*")):
        owner = re.match(PREFIX + r"(\d+)-(\d+)-(\d+)-", os.path.basename(path))
        # Somebody else may have made something that looks like ours; of what is not ours, nothing can be removed.
        if (
            owner
            and owner.group(3) == spaces()[PROCESSES]
            and not Process(int(owner.group(1)), int(owner.group(2))).alive
        ):
            shutil.rmtree(path, ignore_errors=True)


def copy_flash(description: Mapping[str, Any], layers: Sequence[Layer], place: str) -> dict[str, str]:
    """Copies of the flash chips that the backup does not have, as far as they are on this machine, by name."""
    copies: dict[str, str] = {}
    for disk in flash_chips(description):
        known = any(layer.name == disk["name"] for layer in layers)
        if not known and os.path.isfile(disk["file"]):
            copies[disk["name"]] = os.path.join(place, f"flash{len(copies)}")
            shutil.copyfile(disk["file"], copies[disk["name"]])
    return copies


# Its life


async def watch(arguments: Sequence[str], place: str, wish: Wish) -> Ending:
    """Start it and wait for a sign of life. QEMU is gone when this returns, however it returns."""
    log = os.open(os.path.join(place, "log"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *bound(arguments, NICENESS), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    finally:
        os.close(log)
    # Nobody listens there where the agent is no sign of life.
    answer = asyncio.ensure_future(_answer(os.path.join(place, "agent")))
    try:
        return await _wait(process, answer, place, wish)
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), END_TIMEOUT)


async def _answer(path: str) -> None:
    """Return once the agent has answered."""
    while True:
        with contextlib.suppress(AgentError):
            async with Agent(path):
                return
        await asyncio.sleep(INTERVAL)


async def _wait(process: asyncio.subprocess.Process, answer: asyncio.Future[None], place: str, wish: Wish) -> Ending:
    deadline = time.monotonic() + wish.timeout
    while True:
        # Asked first: what it said at its very end is read below.
        ended = process.returncode
        console = _read(os.path.join(place, "console"))
        if wish.pattern and re.search(wish.pattern, console, re.MULTILINE):
            return Ending()
        if answer.done():
            answer.result()
            return Ending()
        tail = tuple(console.splitlines()[-TAIL:])
        if ended is not None:
            return _early_end(ended, _read(os.path.join(place, "log")), tail)
        if free_bytes(place) < ROOM:
            said = f"{place} has only {human(ROOM)} left: the guest was stopped; give a tmpdir with more room"
            return Ending(said, tail, guilty=False)
        if time.monotonic() >= deadline:
            return Ending(_silence(wish, tail), tail)
        await asyncio.sleep(INTERVAL)


def _early_end(status: int, log: str, tail: tuple[str, ...]) -> Ending:
    if status == 0:
        return Ending("the guest switched off or restarted before it gave a sign of life; its console tells more", tail)
    reason = "; ".join(log.splitlines()[-3:]) or f"status {status}"
    said = f"QEMU ended before the guest gave a sign of life: {reason}; give boot_options that fit this machine"
    return Ending(said, tail, guilty=False)


def _silence(wish: Wish, tail: tuple[str, ...]) -> str:
    signs = ["its agent's answer"] if wish.agent else []
    signs += [f"{wish.pattern!r} on its console"] if wish.pattern else []
    hint = "its console tells more" if tail else "its console said nothing (does the guest use the serial console?)"
    return (
        f"the guest gave no sign of life ({' or '.join(signs)}) within {wish.timeout:g} s: {hint}. A slow one needs a"
        " longer boot_timeout, one that misses something boot_options"
    )


def _read(path: str) -> str:
    """The end of a text that the guest or QEMU writes, without what is for terminals only."""
    try:
        with open(path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            source.seek(max(0, size - CONSOLE_LIMIT))
            content = source.read(CONSOLE_LIMIT)
    except FileNotFoundError:
        return ""
    return NOISE.sub("", content.decode("utf-8", "replace").replace("\r\n", "\n"))
