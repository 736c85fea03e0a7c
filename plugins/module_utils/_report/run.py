# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the report of one run over a fleet, as data: a pure function of what its hypervisors have reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._backup.outcome import VmState
from .._common.fields import DocumentError
from .._common.formats import SCHEMA, parse_time
from .record import RECORD, HypervisorState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from typing import Any


NO_REASON = (
    "it reported nothing: Ansible could not reach it, or it failed before its VMs were read; see the output of the run"
)
BLANK: dict[str, Any] = {"repository": "", "id": "", "written": "", "error": "", "vms": []}
"""Stands for the record of a hypervisor that has reported nothing."""


@dataclass(frozen=True)
class Run:
    """A run in the list of runs. C(began) is when half of its sets were begun, or else when the report was written.

    A few hypervisors whose clocks are wrong do not give the run another place among the others.
    """

    id: str
    began: str
    vms: int
    bad: int
    bytes: int
    seconds: float

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> Run:
        """Return the run of a report, as parse_report() returns it."""
        found = report["summary"]
        vms = (vm for one in report["hypervisors"] for vm in one["vms"])
        starts = sorted(vm["set"]["started"] for vm in vms if vm["state"] == VmState.PUBLISHED and vm["set"])
        return cls(
            report["id"],
            min(starts[len(starts) // 2], report["written"]) if starts else report["written"],
            found["vms"],
            found["failed"] + found["cancelled"] + found["hypervisors_failed"],
            found["bytes"],
            float(found["seconds"]),
        )


def collect(
    set_id: str,
    now: str,
    records: Mapping[str, Mapping[str, Any]],
    errors: Mapping[str, str],
    pending: Collection[str],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the report. C(records) has all hypervisors of the play; C(before) is the report that this one replaces.

    What that says of hypervisors that have reported nothing new is still true: a run may be repeated for some of them.
    """
    earlier = {one["name"]: one for one in before["hypervisors"]} if before else {}
    found = []
    for name, record in records.items():
        blank = {"name": name, "state": HypervisorState.WAITING, **BLANK}
        if record:
            found.append(_with_others({**blank, **_checked(record)}, earlier.get(name), records))
        elif name in pending and not errors.get(name):
            found.append(earlier.get(name, blank))
        else:
            found.append(
                {**earlier.get(name, blank), "state": HypervisorState.UNREACHED, "error": errors.get(name) or NO_REASON}
            )
    found += [one for name, one in earlier.items() if name not in records]
    return {"schema": SCHEMA, "id": set_id, "written": now, "summary": summarize(found), "hypervisors": found}


def _with_others(
    told: dict[str, Any], before: Mapping[str, Any] | None, records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what a hypervisor has told, with the VMs of the report before that nobody has told of now.

    A run may be repeated for some VMs, and what is said of the others is still true.
    """
    if before is None or told["state"] != HypervisorState.REPORTED or told["repository"] != before["repository"]:
        return told
    vms = [vm for record in records.values() for vm in record.get("vms", ()) if isinstance(vm, dict)]
    now = {vm.get("name") for vm in vms}
    return {**told, "vms": [*told["vms"], *(vm for vm in before["vms"] if vm["name"] not in now)]}


def _checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a hypervisor has told, or that it makes no sense: the others' reports do not depend on it."""
    try:
        return {**RECORD.read(record), "state": HypervisorState.REPORTED}
    except DocumentError as error:
        return {"state": HypervisorState.UNREACHED, "error": f"its result cannot be used: {error}"}


def summarize(hypervisors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of all hypervisors together."""
    hypervisors = list(hypervisors)
    vms = [vm for one in hypervisors for vm in one["vms"]]
    published = [vm["set"] for vm in vms if vm["state"] == VmState.PUBLISHED and vm["set"]]
    spans = sorted((parse_time(one["started"]).timestamp(), one["duration"]) for one in published)
    return {
        "hypervisors": len(hypervisors),
        "hypervisors_failed": sum(one["state"] == HypervisorState.UNREACHED for one in hypervisors),
        "hypervisors_waiting": sum(one["state"] == HypervisorState.WAITING for one in hypervisors),
        "vms": len(vms),
        **{
            state: sum(vm["state"] == state for vm in vms)
            for state in (VmState.PUBLISHED, VmState.FAILED, VmState.CANCELLED, VmState.SKIPPED)
        },
        "new": sum(vm["state"] == VmState.PUBLISHED and vm["changed"] for vm in vms),
        "bytes": sum(one["bytes"] for one in published),
        "seconds": round(covered(spans), 3),
        "began": min((one["started"] for one in published), default=""),
        "frozen": sum(one["consistency"] == "filesystem" for one in published),
        "verified": sum(bool(one["verified"]) for one in published),
        "damaged": sum(bool(vm["damage"]) for vm in vms),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time in which at least one copy ran. Pauses between runs do not count. C(spans) are sorted."""
    total, end = 0.0, float("-inf")
    for start, length in spans:
        total += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return total
