# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Where this process stands: its machine's boot and its name spaces, and what can be judged from there.

A container has process ids, paths and ports of its own. What was begun in one of them and is gone on with in another
can be alive, and its process id, its socket or its port mean something else here, or nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Process, parse_address, proc_is_ours

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Vm

PROCESSES = "processes"
PATHS = "paths"
PORTS = "ports"


@lru_cache(maxsize=None)
def boot_id() -> str:
    """The boot of the kernel that runs this process: containers and what is outside of them have one."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as source:
        return source.read().strip()


@lru_cache(maxsize=None)
def spaces() -> dict[str, str]:
    """Within what this process's ids, paths and ports mean what they mean; empty where that cannot be told."""
    root = os.stat("/")
    mounts = _space("mnt")
    return {
        # With somebody else's /proc in view, an id that the kernel tells us is another process's there.
        PROCESSES: _space("pid") if proc_is_ours() else "",
        PATHS: f"{mounts}:{root.st_dev}:{root.st_ino}" if mounts else "",
        PORTS: _space("net"),
    }


def _space(kind: str) -> str:
    try:
        return str(os.stat(f"/proc/self/ns/{kind}").st_ino)
    except OSError:
        return ""


def shared(kind: str, recorded: Mapping[str, str]) -> bool:
    """Whether a name of this kind means here what it meant where it was written down.

    Version 0.1.0 did not say where that was: it knew of one place only.
    """
    here = spaces()[kind]
    return bool(here) and recorded.get(kind, here) == here


@dataclass(frozen=True)
class Origin:
    """Of which VM an attempt was begun, at which monitor, and by whom it is called so. C(process) is its QEMU."""

    identity: str
    monitor: str
    process: tuple[int, ...] = ()
    spaces: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_from_here(self) -> bool:
        """Whether it was begun where this process stands."""
        return all(shared(kind, self.spaces) for kind in (PROCESSES, PATHS, PORTS))

    @property
    def knows_process(self) -> bool:
        """Whether its process id means something here."""
        return bool(self.process) and shared(PROCESSES, self.spaces)

    def is_other_process(self, vm: Vm) -> bool:
        """Whether the QEMU that answers is seen not to be the one of the attempt."""
        if vm.process is None or not self.knows_process:
            return False
        return (vm.process.pid, vm.process.start) != self.process

    def has_ended(self, vm: Vm | None, off: bool, has_traces: bool) -> bool | None:
        """Whether the QEMU of an attempt has ended, on this machine since it was booted last; None: nobody can tell.

        C(vm) is what answers at its monitor now, C(off) says that nobody is there, and C(has_traces) that what answers
        has a job of this attempt.
        """
        if has_traces:
            return False
        if self.knows_process:
            return not Process(*self.process).alive
        if vm is not None:
            return False if self._is_succeeded_by(vm) else None
        if not off:
            return False
        return True if self._shares_address() else None

    def _is_succeeded_by(self, vm: Vm) -> bool:
        """Whether what answers is the same VM, so that a job that it does not have is gone."""
        if vm.identity != self.identity:
            return False
        if not self.spaces:
            return True
        # Without a uuid two VMs can be called the same, in one container each.
        return self.monitor in ("", vm.monitor) and (bool(vm.uuid) or self._shares_address())

    def _shares_address(self) -> bool:
        is_path = not self.monitor or bool(parse_address(self.monitor).path)
        return shared(PATHS if is_path else PORTS, self.spaces)
