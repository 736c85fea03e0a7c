# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the cancelling of sets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._host import machine
from .._plan import space
from .._plan.model import Action, Plan, Policy, VmPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._host.machine import Hypervisor
    from .._repository.documents import Intent, Manifest
    from .._repository.repository import Repository, VmRecords


def of_names(repository: Repository, names: Iterable[str] | None) -> Plan:
    """A plan for the states cancelled and untracked: what the repository knows of the VMs with these names.

    Without names it is for those whose sets this hypervisor is making.
    """
    policy = Policy()
    here = machine.this_hypervisor()
    if names is None:
        names = sorted(intent.vm.name for intent in repository.intents() if intent.hypervisor.is_same(here))
    vms = tuple(_last_seen(name, repository.shelf(name), here) for name in names)
    return Plan(repository.path, False, "", "", policy, space.space_in(repository, policy), vms)


def _last_seen(name: str, shelf: VmRecords, here: Hypervisor) -> VmPlan:
    """Where the VM's newest set was taken, or is being made; no monitor where that is on another hypervisor."""
    found: list[Manifest | Intent] = [*shelf.sets, *shelf.intents]
    maker = found[-1].hypervisor if found else None
    if maker and maker.is_same(here):
        return VmPlan(name, found[-1].monitor, Action.ATTACH, "", found[-1].vm.identity)
    return VmPlan(name, "", Action.ATTACH, "")
