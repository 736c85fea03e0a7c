# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The tiny real Linux of guest.py as a domain of libvirt, which holds the channel to its agent."""

from __future__ import annotations

import json
import shutil
import typing as t
from xml.sax.saxutils import escape

from ansible_collections.vmfleet.backup.tests.harness.guest import (
    MEMORY,
    START_PATIENCE,
    Console,
    built,
    command_line,
    lay_disks,
)
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain, DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

TARGETS = ("vda", "vdb")
AGENT = "org.qemu.guest_agent.0"


class LinuxDomain(Domain):
    """A domain that is defined, and in which that Linux runs when it is on. Its console is in `directory`."""

    def __init__(
        self, libvirt: Libvirt, directory: Path, *, name: str = "guest", writer: bool = True, agent: bool = True
    ) -> None:
        super().__init__(libvirt, name)
        self._writer = writer
        self._agent = agent
        self._console = Console(directory / "console")

    def start(self, *options: str) -> None:
        """Start it, and wait for the guest, its first writes and its agent."""
        # What another one has said, whose disks these were.
        self._console.path.unlink(missing_ok=True)
        super().start(*options)
        wait_until(self._ready, "the guest's start", START_PATIENCE)

    def _ready(self) -> bool:
        assert self.state == "running", f"the guest did not start: {self.console}"
        return self._console.ready(self._writer) and self.connected == self._agent

    @property
    def console(self) -> str:
        """What the guest has said on its console."""
        return self._console.text

    @property
    def rounds(self) -> int:
        """How many rounds of writing on both disks are finished."""
        return self._console.rounds

    @property
    def connected(self) -> bool:
        """Whether the guest's agent has opened its end of the channel."""
        target = self.xml().find(f"devices/channel/target[@name='{AGENT}']")
        assert target is not None
        return target.get("state") == "connected"

    def agent(self, command: str, **arguments: t.Any) -> t.Any:
        """Ask the guest's agent, past libvirt's own functions; returns its answer."""
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        return json.loads(self.virsh("qemu-agent-command", json.dumps(message)))["return"]


class GuestDomain(LinuxDomain):
    """One whose disks are `system.qcow2` (vda) and `data.qcow2` (vdb) in `directory`: old ones, or fresh ones."""

    def __init__(
        self, libvirt: Libvirt, directory: Path, *, name: str = "guest", writer: bool = True, agent: bool = True
    ) -> None:
        super().__init__(libvirt, directory, name=name, writer=writer, agent=agent)
        # libvirt gives them to the user whom QEMU runs as.
        for file in ("vmlinuz", "initrd.img"):
            shutil.copy(built() / file, directory / file)
        disks = [DomainDisk(path, target) for path, target in zip(lay_disks(directory), TARGETS, strict=True)]
        boot = (
            f"<kernel>{directory}/vmlinuz</kernel><initrd>{directory}/initrd.img</initrd>"
            f"<cmdline>{escape(command_line(writer=writer, agent=agent))}</cmdline>"
        )
        devices = (
            f"<serial type='file'><source path='{self._console.path}'/></serial>"
            f"<channel type='unix'><target type='virtio' name='{AGENT}'/></channel>"
        )
        libvirt.define(name, *disks, memory=MEMORY, os=boot, devices=devices)
