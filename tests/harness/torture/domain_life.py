# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What libvirt does with a domain as a whole, and what comes in between while a set of it is made."""

from __future__ import annotations

import signal
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.torture.trouble import Trouble
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    from collections.abc import Callable

    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.torture.domain_machine import DomainMachine


class DomainLife:
    """A domain in the hands of its owner."""

    def __init__(self, machine: DomainMachine) -> None:
        self.machine = machine
        self.vm = machine.vm
        self._number = 0

    def save(self) -> None:
        """Save its memory into a file, of which libvirt forgets what disks belong to it."""
        if self.vm.alive and self.machine.defined() == {disk.name for disk in self.vm.disks}:
            self._number += 1
            state = self.machine.directory / f"state{self._number}"
            if self.machine.virsh("save", NAME, state):
                self.machine.state, self.machine.asleep = state, True
                self.machine.truth.stale()

    def save_managed(self) -> None:
        """Save its memory to where the next start finds it."""
        if self.vm.alive and self.machine.virsh("managedsave", NAME):
            self.machine.asleep = True
            self.machine.truth.stale()

    def redefine(self) -> None:
        """Undefine it and define it again; as it runs, it goes on without a definition meanwhile."""
        if self.machine.asleep:
            return
        definition = self.vm.domain.virsh("dumpxml", "--inactive")
        self.machine.virsh("undefine", NAME, "--snapshots-metadata")
        if self.vm.alive:
            self.machine.write_much()
        self.machine.virsh("define", "/dev/stdin", stdin=definition)

    def restart_libvirt(self) -> None:
        """libvirtd ends, or is killed, and starts again."""
        how = self.machine.chance.choice([signal.SIGTERM, signal.SIGKILL])
        print(f"    {how.name}")
        self.machine.libvirt.stop_daemon(how)
        self.machine.settle()


class DomainTrouble(Trouble):
    """Sets of a domain that are not made undisturbed."""

    machine: DomainMachine

    def endings(self) -> list[Callable[[ModuleProcess | None], None]]:
        """Return what may become of a set that is made slowly."""
        return [*super().endings(), self._kill_libvirt, self._start_it]

    def _wait(self, process: ModuleProcess) -> None:
        libvirt = self.machine.libvirt
        wait_until(lambda: not process.running or not libvirt.daemon, "the end of the module")
        if not libvirt.daemon:
            # As systemd does. The module waits for that a minute long.
            libvirt.start_daemon()
        super()._wait(process)

    def _kill_libvirt(self, _process: ModuleProcess | None) -> None:
        print("  libvirtd is killed")
        self.machine.libvirt.stop_daemon(signal.SIGKILL)
        self.machine.release()

    def _start_it(self, _process: ModuleProcess | None) -> None:
        print("  it is started")
        self.machine.begin()
        self.machine.release()
