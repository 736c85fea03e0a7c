# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell hypervisors from each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache


def machine_id() -> str:
    """Return the identity of this hypervisor (machine-id(5))."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii") as source:
                found = source.read().strip()
        except FileNotFoundError:
            continue
        # It is empty in images that are to be cloned, until their first boot.
        if found:
            return found
    return os.uname().nodename


@dataclass(frozen=True)
class Hypervisor:
    """The machine that makes a set, and its boot: no QEMU outlives that."""

    name: str
    machine_id: str
    boot_id: str

    def is_same(self, other: Hypervisor) -> bool:
        """Return whether both are one machine, maybe booted again.

        Containers on a machine may have a machine-id of their own, but have its boot. Images of machines and of
        containers are cloned with their machine-id, which therefore has to come with the same name.
        """
        if self.boot_id == other.boot_id:
            return True
        return (self.machine_id, self.name) == (other.machine_id, other.name)


@lru_cache(maxsize=None)
def boot_id() -> str:
    """Return the boot of the kernel that runs this process, which is one for all containers of a machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as source:
        return source.read().strip()


def this_hypervisor() -> Hypervisor:
    """Return the machine that this process runs on."""
    return Hypervisor(os.uname().nodename, machine_id(), boot_id())
