# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the backups of a VM stand, as the repository tells it: the set of a run, and the newest good one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._backup.outcome import STATES
from .._common.errors import Refused
from .._host.machine import machine_id
from .._repository.catalog import read_catalog
from .._repository.chain import walk

if TYPE_CHECKING:
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Manifest
    from .._repository.repository import Repository


ABSENT = "absent"
"""What a VM is that has sets and was in no plan."""
OF_A_RUN: dict[str, Any] = {
    "changed": False,
    "error": "",
    "reason": "",
    "warnings": [],
    "consistency_reason": "",
    "frozen_ms": 0,
    "path": "",
}
"""What a run tells of a VM, and what stands for it where it tells nothing."""
OF_ITS_SETS: dict[str, Any] = {"set": None, "last": None, "damage": "", "verified_at": ""}
"""What the repository tells of a VM, if it does."""


def status_from_result(result: dict[str, Any]) -> dict[str, Any]:
    """What is known of a VM from its run alone."""
    if not isinstance(result.get("name"), str) or result.get("state") not in STATES:
        raise Refused("results", f"{result!r} is no result of backup_set")
    told = {field: result.get(field, blank) for field, blank in OF_A_RUN.items()}
    return {"name": result["name"], "state": result["state"], **told, **OF_ITS_SETS}


def status_of_absent(name: str) -> dict[str, Any]:
    """What is known of a VM that was not in the run."""
    return {"name": name, "state": ABSENT, **OF_A_RUN, **OF_ITS_SETS}


def status_from_repository(repository: Repository, name: str, set_id: str) -> dict[str, Any]:
    """What is known of a VM from its sets: C(set) is the one of this id, C(last) the newest that is good."""
    held = read_catalog(repository, name)
    sets = held.shelf.sets
    damage = {**held.failed_sets, **held.broken_sets}
    this = held.shelf.published(set_id)
    last = next((one for one in reversed(sets) if one.id not in damage), None)
    looks = [held.marks.verification(one) for one in sets]
    return {
        "set": _describe(held, this) if this else None,
        "last": _describe(held, last) if last else None,
        "damage": damage.get(sets[-1].id, "") if sets else "",
        "verified_at": max((look.when for look in looks if look and look.ok), default=""),
    }


def made_here(repository: Repository, name: str) -> bool:
    """Whether a VM's newest set was made by this machine: a VM that has moved on is the matter of another one."""
    sets = repository.shelf(name).sets
    maker = sets[-1].hypervisor if sets else None
    return maker is not None and maker.machine_id == machine_id()


def _describe(held: VmCatalog, manifest: Manifest) -> dict[str, Any]:
    look = held.marks.verification(manifest)
    return {
        "id": manifest.id,
        "started": manifest.started,
        "duration": manifest.duration,
        "bytes": manifest.bytes,
        "level": manifest.level,
        "consistency": manifest.consistency,
        "chain": max(len(walk(held.shelf.sets, manifest, disk.name)[0]) for disk in manifest.disks),
        "verified": look.depth if look and look.ok else "",
    }
