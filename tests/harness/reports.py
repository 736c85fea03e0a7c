# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs of a fleet, as data: what the reports are made from."""

from __future__ import annotations

import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import Run, collect
from ansible_collections.vmfleet.backup.plugins.module_utils._report.status import status_from_result

ID = "2026-11-22"
NOW = "2026-11-22T02:45:10Z"
MIB = 1 << 20


def a_set(**fields: t.Any) -> dict[str, t.Any]:
    """A set of the run."""
    return {
        "id": ID,
        "started": f"{ID}T01:30:00Z",
        "duration": 60.0,
        "bytes": 600 * MIB,
        "level": "incremental",
        "consistency": "crash",
        "chain": 3,
        "verified": "",
        **fields,
    }


def a_vm(name: str = "web01", **fields: t.Any) -> dict[str, t.Any]:
    """A VM that has its set."""
    found = {
        **status_from_result({"name": name, "state": "published", "changed": True}),
        "set": a_set(),
        "last": a_set(),
    }
    return {**found, **fields}


def failed(name: str = "db01", error: str = "disk vda: No space left on device", **fields: t.Any) -> dict[str, t.Any]:
    """A VM that has no set of the run, and one of the day before."""
    before = a_set(id="2026-11-21", started="2026-11-21T01:30:00Z")
    return a_vm(name, **{"state": "failed", "changed": False, "error": error, "set": None, "last": before, **fields})


def told(*vms: dict[str, t.Any], **fields: t.Any) -> dict[str, t.Any]:
    """What a hypervisor tells."""
    return {
        "repository": "/srv/backup",
        "id": ID,
        "written": f"{ID}T02:44:00Z",
        "error": "",
        "vms": list(vms),
        **fields,
    }


def report(errors: dict[str, str] | None = None, **hypervisors: dict[str, t.Any]) -> dict[str, t.Any]:
    """The report of a run."""
    return collect(ID, NOW, hypervisors, errors or {}, [], None)


def of_a_fleet(hypervisors: int, vms: int) -> dict[str, t.Any]:
    """The report of a run in which all went well."""
    names = [f"hv{number:03}" for number in range(hypervisors)]
    return report(**{name: told(*(a_vm(f"{name}-vm{number:02}") for number in range(vms))) for name in names})


def runs(number: int, bad: t.Collection[int] = ()) -> list[Run]:
    """The last runs, each larger than the one before."""
    return [
        Run(f"r{one:03}", f"2026-11-{one % 28 + 1:02}T01:30:00Z", 10, int(one in bad), (one + 1) * MIB, one + 1.0)
        for one in range(number)
    ]
