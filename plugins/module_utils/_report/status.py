# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Return the status of a VM's backups: the set of a run, and the newest good one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._backup.outcome import STATES
from .._common.errors import Refused
from .._host.process import machine_id
from .._repository.catalog import read_catalog
from .._repository.chain import walk

if TYPE_CHECKING:
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Manifest
    from .._repository.repository import Repository


ABSENT = "absent"
"""The state of a VM that has sets, and was not in the run."""
RUN_FIELDS: dict[str, Any] = {
    "changed": False,
    "error": "",
    "reason": "",
    "warnings": [],
    "consistency_reason": "",
    "frozen_ms": 0,
    "path": "",
}
"""What a run says of a VM, with the values where it says nothing."""
SET_FIELDS: dict[str, Any] = {"set": None, "last": None, "damage": "", "verified_at": ""}
"""What the repository says of a VM, with the values where it says nothing."""


def status_from_result(result: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a VM from its run alone."""
    run = {field: result.get(field, blank) for field, blank in RUN_FIELDS.items()}
    is_odd = any(not isinstance(run[field], (type(blank), tuple)) for field, blank in RUN_FIELDS.items())
    if is_odd or not isinstance(result.get("name"), str) or result.get("state") not in STATES:
        raise Refused("results", f"{result!r} is no result of backup_set")
    return {"name": result["name"], "state": result["state"], **run, **SET_FIELDS}


def status_of_absent(name: str) -> dict[str, Any]:
    """Return what is known of a VM that was not in the run."""
    return {"name": name, "state": ABSENT, **RUN_FIELDS, **SET_FIELDS}


def status_from_repository(repository: Repository, name: str, set_id: str, identity: str = "") -> dict[str, Any]:
    """Return what is known of a VM from its sets: C(set) is the one of this id, C(last) the newest that is good.

    With an C(identity), those of another VM that has had its name do not count.
    """
    catalog = read_catalog(repository, name)
    sets = [one for one in catalog.records.sets if identity in ("", one.vm.identity)]
    damage = {**catalog.failed_sets, **catalog.broken_sets}
    # It may be the newest one.
    unread = next((catalog.records.odd[one] for one in sorted(catalog.records.unread, reverse=True)), "")
    this = next((one for one in sets if one.id == set_id), None)
    last = next((one for one in reversed(sets) if one.id not in damage), None)
    verifications = [catalog.annotations.verification(one) for one in sets]
    return {
        "set": _describe(catalog, this) if this else None,
        "last": _describe(catalog, last) if last else None,
        "damage": (damage.get(sets[-1].id, "") if sets else "") or unread,
        "verified_at": max((one.when for one in verifications if one and one.ok), default=""),
    }


def made_here(repository: Repository, name: str) -> bool:
    """Return whether this machine made the newest set of a VM: the VM may run on another hypervisor by now.

    One that has no set yet, and only what was left by those that failed, is not the matter of another one.
    """
    sets = repository.records(name).sets
    if not sets:
        return repository.has(name)
    maker = sets[-1].hypervisor
    return maker is not None and maker.machine_id == machine_id()


def _describe(catalog: VmCatalog, manifest: Manifest) -> dict[str, Any]:
    verification = catalog.annotations.verification(manifest)
    return {
        "id": manifest.id,
        "started": manifest.started,
        "duration": manifest.duration,
        "bytes": manifest.bytes,
        "level": manifest.level,
        "consistency": manifest.consistency,
        "chain": max(len(walk(catalog.records.sets, manifest, disk.name)[0]) for disk in manifest.disks),
        "verified": verification.depth if verification and verification.ok else "",
    }
