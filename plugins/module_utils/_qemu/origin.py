# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether the QEMU of an attempt has ended, as far as this process can see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._host.process import PATHS, PORTS, PROCESSES, Process, shared
from .connection import parse_address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import Vm


@dataclass(frozen=True)
class Origin:
    """The VM, the monitor and the QEMU process of an attempt, as they were called in the name spaces C(spaces)."""

    identity: str
    monitor: str
    process: tuple[int, ...] = ()
    spaces: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_from_here(self) -> bool:
        """Return whether the attempt was begun in the name spaces of this process."""
        return all(shared(kind, self.spaces) for kind in (PROCESSES, PATHS, PORTS))

    @property
    def knows_process(self) -> bool:
        """Return whether its process id means the same process here."""
        return bool(self.process) and shared(PROCESSES, self.spaces)

    def is_other_process(self, vm: Vm) -> bool:
        """Return whether the QEMU that answers is certainly not the one of the attempt."""
        if vm.process is None or not self.knows_process:
            return False
        return (vm.process.pid, vm.process.start) != self.process

    def has_ended(self, vm: Vm | None, off: bool, has_traces: bool) -> bool | None:
        """Return whether the QEMU of an attempt on this machine, since its last boot, has ended; None: nobody can tell.

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
        """Return whether what answers is the same VM: a job that it does not have is gone then."""
        if vm.identity != self.identity:
            return False
        if not self.spaces:
            return True
        # Without a uuid, VMs of two containers can have the same name.
        return self.monitor in ("", vm.monitor) and (bool(vm.uuid) or self._shares_address())

    def _shares_address(self) -> bool:
        """Return whether the address of its monitor means the same here."""
        is_path = not self.monitor or bool(parse_address(self.monitor).path)
        return shared(PATHS if is_path else PORTS, self.spaces)
