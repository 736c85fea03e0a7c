# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains of a real libvirt. They need no guest: HMP `qemu-io` stands for the guest's writes."""

from __future__ import annotations

import dataclasses
import json
import signal
import typing as t
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from ansible_collections.vmfleet.backup.tests.harness.images import assert_pattern, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qmp import QmpError

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

FIRMWARE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd"

SCSI = "<controller type='scsi' model='virtio-scsi'/>"
TPM = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>"


@dataclasses.dataclass
class DomainDisk:
    """One disk of a domain."""

    path: Path
    target: str = "vda"
    bus: str = "virtio"
    """`virtio`, `scsi` or `sata`; `target` is to fit."""
    format: str = "qcow2"
    more: str = ""
    """Further elements, such as `<readonly/>`."""

    @property
    def xml(self) -> str:
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{self.format}'/>"
            f"<source file={quoteattr(str(self.path))}/><target dev='{self.target}' bus='{self.bus}'/>{self.more}"
            "</disk>"
        )


def domain_xml(
    name: str,
    *disks: DomainDisk,
    machine: str = "q35",
    uuid: str = "",
    memory: int = 32,
    nvram: bool = False,
    tpm: bool = False,
    os: str = "",
    devices: str = "",
    more: str = "",
) -> str:
    """Return the XML of a domain; `memory` is in MiB, `os`, `devices` and `more` are further elements."""
    if nvram:
        loader = f"<loader readonly='yes' type='pflash'>{FIRMWARE}</loader>"
        os = f"{loader}<nvram template='{VARIABLES}'/>{os}"
    if any(disk.bus == "scsi" for disk in disks):
        devices = SCSI + devices
    return (
        f"<domain type='qemu'><name>{escape(name)}</name>{f'<uuid>{uuid}</uuid>' if uuid else ''}"
        f"<memory unit='MiB'>{memory}</memory>"
        f"<os><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os><features><acpi/></features>"
        "<devices><controller type='usb' model='none'/><memballoon model='none'/>"
        f"{''.join(disk.xml for disk in disks)}{TPM * tpm}{devices}</devices>{more}</domain>"
    )


class Domain:
    """A domain that is defined; `name` is what libvirt knows it by."""

    def __init__(self, libvirt: Libvirt, name: str) -> None:
        self.libvirt = libvirt
        self.name = name

    def virsh(self, command: str, *words: str | Path) -> str:
        """Run a command of virsh on it, which has to succeed; returns what it prints."""
        return self.libvirt.virsh(command, "--domain", self.name, *words)

    def start(self, *options: str) -> None:
        """Start it."""
        self.virsh("start", *options)

    def destroy(self) -> None:
        """End its QEMU in order, without asking the guest."""
        self.virsh("destroy")

    @property
    def state(self) -> str:
        """What libvirt says of it, as in `running` and `shut off`."""
        return self.virsh("domstate")

    @property
    def uuid(self) -> str:
        return self.virsh("domuuid")

    @property
    def pid(self) -> int:
        """The process id that its QEMU has inside."""
        return int(self.libvirt.seen_here(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def kill(self) -> None:
        """SIGKILL for its QEMU, as the OOM killer would."""
        self.libvirt.send_signal(signal.SIGKILL, self.pid)

    def hang(self) -> None:
        """SIGSTOP for its QEMU: nothing is answered any more."""
        self.libvirt.send_signal(signal.SIGSTOP, self.pid)

    def wake(self) -> None:
        """SIGCONT."""
        self.libvirt.send_signal(signal.SIGCONT, self.pid)

    @property
    def log(self) -> str:
        """What its QEMU has said."""
        return self.libvirt.seen_here(f"/var/log/libvirt/qemu/{self.name}.log").read_text(errors="replace")

    @property
    def nvram(self) -> Path:
        """The file of its firmware's variables, as it is seen from outside."""
        return self.libvirt.seen_here(f"/var/lib/libvirt/qemu/nvram/{self.name}_VARS.fd")

    @property
    def tpm(self) -> Path:
        """The directory of its TPM's state, as it is seen from outside."""
        return self.libvirt.seen_here(f"/var/lib/libvirt/swtpm/{self.uuid}/tpm2")

    def xml(self, *options: str) -> ElementTree.Element:
        """Return its XML: the live one where it runs, with `--inactive` the other one."""
        return ElementTree.fromstring(self.virsh("dumpxml", *options))

    def qmp(self, command: str, **arguments: t.Any) -> t.Any:
        """Execute a command of QEMU (underscores in the names of arguments stand for dashes) and return its result."""
        renamed = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, **({"arguments": renamed} if renamed else {})}
        reply = json.loads(self.virsh("qemu-monitor-command", json.dumps(message)))
        if "error" in reply:
            raise QmpError(reply["error"]["desc"])
        return reply["return"]

    def disk(self, target: str) -> ElementTree.Element:
        """Return the live XML of a disk, by its target."""
        [found] = [
            disk for disk in self.xml().findall("devices/disk") if disk.find(f"target[@dev='{target}']") is not None
        ]
        return found

    def image(self, target: str) -> tuple[Path, str]:
        """Return the image that a disk's writes go to now, and its format."""
        disk = self.disk(target)
        source, driver = disk.find("source"), disk.find("driver")
        assert source is not None
        assert driver is not None
        return Path(source.attrib["file"]), driver.attrib["type"]

    def io(self, target: str, command: str) -> None:
        """Do as the guest would; what qemu-io says of it is in the log, a moment later."""
        alias = self.disk(target).find("alias")
        assert alias is not None
        # By the guest's device: through the name of a node it would go round the filter of a running job.
        devices = [
            entry["qdev"] for entry in self.qmp("query-block") if alias.attrib["name"] in entry["qdev"].split("/")
        ]
        [device] = devices
        said = self.qmp("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
        assert not said, said

    def write(self, target: str, pattern: int, offset: int, length: int) -> None:
        """A guest's write that has to succeed."""
        self.io(target, f"write -P {pattern} {offset} {length}")
        self.io(target, "flush")
        assert_pattern(*self.image(target), pattern, offset, length)

    def freeze(self, target: str, copy: Path) -> Path:
        """A flat copy of a disk as the guest sees it now."""
        # QEMU keeps metadata in memory: without a flush, a reader of the file sees an older disk.
        self.io(target, "flush")
        image, fmt = self.image(target)
        qemu_img("convert", "-U", "-f", fmt, "-O", "qcow2", image, copy)
        return copy
