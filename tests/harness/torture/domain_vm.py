# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A domain of libvirt, looked at as the torture looks at a QEMU of its own.

The guest's writes go through a second monitor. So does what the torture asks: each call of virsh would take as long as
a hundred of these.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import typing as t
from pathlib import Path
from xml.etree import ElementTree

from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

MONITOR = f"/var/lib/libvirt/qemu/{NAME}.qmp"
SECOND_MONITOR = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{MONITOR},server=on,wait=off'/></qemu:commandline>"
)


class DomainVm:
    """The one domain, running or shut off."""

    def __init__(self, libvirt: Libvirt) -> None:
        self.libvirt = libvirt
        self.domain = Domain(libvirt, NAME)
        self.monitor = f"libvirt:{NAME}"
        self._disks: tuple[Disk, ...] = ()
        self._devices: dict[str, str] = {}

    def forget(self) -> None:
        """Ask libvirt anew what disks there are."""
        self._disks = ()

    @property
    def pid(self) -> int:
        """The process id that QEMU has inside."""
        return self.domain.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        with contextlib.suppress(FileNotFoundError):
            return self.libvirt.seen_here(f"/proc/{self.pid}").exists()
        return False

    answers = alive

    @property
    def storage_daemon(self) -> Path | None:
        """The directory of the process that copies the disks of the domain while it is off."""
        return next(self.libvirt.seen_here("/run/vmfleet-locks").glob("off-*"), None)

    @property
    def copied(self) -> bool:
        """Whether the storage daemon runs."""
        place = self.storage_daemon
        with contextlib.suppress(OSError):
            return bool(place) and self.libvirt.seen_here(f"/proc/{(place / 'pid').read_text().strip()}").exists()
        return False

    @property
    def qmp(self) -> DomainVm:
        """What has the disks open."""
        return self

    def execute(self, command: str, **arguments: t.Any) -> t.Any:
        """Ask QEMU, or while the domain is off the storage daemon."""
        daemon = self.storage_daemon
        path = self.libvirt.seen_here(MONITOR) if self.alive or not daemon else daemon / "qmp"
        with contextlib.closing(Qmp(path)) as qmp:
            return qmp.execute(command, **arguments)

    @property
    def block_jobs(self) -> list[dict[str, t.Any]]:
        """The block jobs."""
        if not self.alive and not self.copied:
            return []
        found: list[dict[str, t.Any]] = self.execute("query-block-jobs")
        return found

    @property
    def fdsets(self) -> list[dict[str, t.Any]]:
        """The fd sets."""
        found: list[dict[str, t.Any]] = self.execute("query-fdsets")
        return found

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The disks: their ids are their targets, and a node is a path while the domain is off."""
        if not self._disks:
            self._disks = tuple(self._read_disks())
        return self._disks

    def _read_disks(self) -> t.Iterator[Disk]:
        xml = self.domain.xml()
        if "Managed save:   yes" in self.domain.virsh("dominfo"):
            # It goes on with these disks.
            xml = ElementTree.fromstring(self.domain.virsh("managedsave-dumpxml"))
        runs = xml.get("id") is not None
        nodes = {node["node-name"] for node in self.execute("query-named-block-nodes", flat=True)} if runs else set()
        for element in xml.iterfind("devices/disk"):
            target, source, driver = (element.find(name).attrib for name in ("target", "source", "driver"))
            node = source["file"]
            if runs:
                self._devices[target["dev"]] = element.find("alias").attrib["name"]
                # libvirt 12.9 makes no format node for a raw image.
                names = [f"libvirt-{source['index']}-{layer}" for layer in ("format", "storage")]
                node, *_others = (name for name in names if name in nodes)
            yield Disk(Path(source["file"]), id=target["dev"], node=node, format=driver["type"])

    def disk(self, name: str) -> Disk:
        """Return a disk by its target."""
        return next(disk for disk in self.disks if disk.id == name)

    def layers(self, disk: Disk) -> list[Path]:
        """Return the images that a disk is made of, from the top on."""
        told = qemu_img("info", "-U", "--backing-chain", "--output=json", "-f", disk.format, disk.path or "")
        return [Path(image["filename"]) for image in json.loads(told)]

    def io(self, name: str, command: str) -> str:
        """Do as the guest would, or as an admin while the domain is off; returns what qemu-io says."""
        disk = self.disk(name)
        if not self.alive:
            words = ["qemu-io", "-f", disk.format, "-c", command, str(disk.path)]
            return subprocess.run(words, capture_output=True, text=True, check=True).stdout
        log = self.libvirt.seen_here(f"/var/log/libvirt/qemu/{NAME}.log")
        start = log.stat().st_size
        alias = self._devices[name]
        [device] = [entry["qdev"] for entry in self.execute("query-block") if alias in entry["qdev"].split("/")]
        error = self.execute("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
        assert not error, error
        if command == "flush":
            return ""
        # It comes by way of virtlogd.
        with log.open("rb") as file:
            file.seek(start)
            said = b""

            def finished() -> str:
                nonlocal said
                said += file.read()
                found = re.search(rb"^(wrote|discard) \d+/\d+ .*$|^.*failed.*$", said, re.MULTILINE)
                return found[0].decode() if found else ""

            return wait_until(finished, f"the end of {command}")

    def write(self, name: str, pattern: int, offset: int, length: int) -> None:
        """A write that has to succeed."""
        said = self.io(name, f"write -P {pattern} {offset} {length}")
        assert said.startswith(f"wrote {length}/{length}"), said

    def freeze(self, disk: Disk, copy: Path) -> Path:
        """A flat copy of a disk as the guest sees it now."""
        if self.alive:
            # QEMU keeps metadata in memory: without a flush, a reader of the file sees an older disk.
            self.io(disk.name, "flush")
        qemu_img("convert", "-U", "-f", disk.format, "-O", "qcow2", disk.path or "", copy)
        return copy
