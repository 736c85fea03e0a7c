# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the reports of runs, and make of them what is known of each VM."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from enum import IntEnum
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, in_words
from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import (
    DocumentError,
    Fields,
    Maybe,
    Said,
    Several,
    Text,
    Time,
    Whole,
    load,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import age_of, parse_time
from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable
from ansible_collections.vmfleet.backup.plugins.module_utils._host.texts import check_directory, read_file
from ansible_collections.vmfleet.backup.plugins.module_utils._report.record import (
    FLEET,
    LARGEST_REPORT,
    HypervisorState,
    parse_report,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._report.status import ABSENT
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import vm_directory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from typing import Any

RUNS = 30
"""Reports that are read, the newest first: a hypervisor that tells nothing in so many runs is not in use any more."""

FACTS = Fields(
    name=Text("a name", least=1),
    hypervisor=Text("a name", least=1),
    hypervisor_error=Said(),
    repository=Text(),
    run=Text(),
    state=Text("a state", pattern="[a-z]{1,32}"),
    error=Said(),
    reason=Said(),
    damage=Said(),
    newest=Text(),
    started=Time(empty=True),
    level=Text(),
    consistency=Text(),
    bytes=Whole(),
    chain=Whole(),
    verified=Text(),
    verified_at=Time(empty=True),
    age=Maybe(Whole()),
)
"""What is known of a VM. Without a good set, C(newest) is empty. A cache may hold something else."""
ALL_FACTS = Several(FACTS, most=FLEET, plain=True)
NO_SET: dict[str, Any] = {
    "id": "",
    "started": "",
    "level": "",
    "consistency": "",
    "bytes": 0,
    "chain": 0,
    "verified": "",
}


def read_reports(directory: str, trust_others: bool) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the newest reports in a directory, the last run first, and why others are left out."""
    if not os.path.isabs(directory):
        raise Refused("report_dir", f"{directory!r} is no absolute path")
    try:
        check_directory(directory, trust_others)
        found = [
            (entry.stat(follow_symlinks=False).st_mtime_ns, entry.path)
            for entry in os.scandir(directory)
            if entry.name.endswith(".json") and not entry.name.startswith(".")
        ]
    except OSError as error:
        raise Refused("report_dir", f"{directory} cannot be read: {error.strerror}") from error
    except Refused as refused:
        raise Refused("report_dir", str(refused).partition(": ")[2]) from refused
    reports, left_out = [], []
    for _time, path in sorted(found, reverse=True)[:RUNS]:
        try:
            reports.append(parse_report(load(read_file(path, LARGEST_REPORT))))
        except (BackupError, DocumentError, OSError) as error:
            reason = in_words(error) if isinstance(error, OSError) else str(error)
            left_out.append(printable(f"{path} is left out: it is no report that can be used: {reason}"))
    if not reports:
        told = f": {left_out[0]}" if left_out else ""
        raise Refused(
            "report_dir",
            f"there is no report of a run in {directory}{told}. The backup writes them where vm_backup_report_dir says",
        )
    return sorted(reports, key=lambda report: str(report["written"]), reverse=True), left_out


class Standing(IntEnum):
    """How far a report can be relied on for a VM. The least comes first."""

    CURRENT = 0
    """It was in the last run of its hypervisor."""
    ABSENT = 1
    """It was not, but has sets there."""
    EARLIER = 2
    """Its hypervisor has told of it in an earlier run only: it was not among those that the last one was for."""


def vm_facts(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is known of each VM of a fleet. C(reports) begin with the last run."""
    found: dict[str, list[tuple[Standing, dict[str, Any]]]] = {}
    errors: dict[str, str] = {}
    heard: set[str] = set()
    told: set[tuple[str, str]] = set()
    for report in reports:
        for one in report["hypervisors"]:
            name, state = one["name"], one["state"]
            if state != HypervisorState.WAITING:
                errors.setdefault(name, one["error"])
            for vm in one["vms"]:
                if (name, vm["name"]) not in told:
                    standing = Standing.ABSENT if vm["state"] == ABSENT else Standing.CURRENT
                    standing = Standing.EARLIER if name in heard else standing
                    found.setdefault(vm["name"], []).append((standing, _facts(report, one, vm)))
                    told.add((name, vm["name"]))
            if one["vms"] or state == HypervisorState.REPORTED:
                heard.add(name)
    chosen = [facts for mentions in found.values() for facts in _choose(mentions)]
    return [{**facts, "hypervisor_error": errors.get(facts["hypervisor"], "")} for facts in chosen]


def _choose(mentions: Sequence[tuple[Standing, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what counts of what is told of the VMs of one name: a VM that has moved is told of by two hypervisors."""
    best = min(standing for standing, _facts in mentions)
    facts = [facts for standing, facts in mentions if standing == best]
    return facts if best == Standing.CURRENT else [max(facts, key=lambda one: str(one["started"]))]


def _facts(report: Mapping[str, Any], hypervisor: Mapping[str, Any], vm: Mapping[str, Any]) -> dict[str, Any]:
    last = vm["last"] or NO_SET
    found = {
        "name": vm["name"],
        "hypervisor": hypervisor["name"],
        "hypervisor_error": "",
        "repository": hypervisor["repository"],
        "run": report["id"],
        **{field: vm[field] for field in ("state", "error", "reason", "damage", "verified_at")},
        "newest": last["id"],
        **{field: last[field] for field in NO_SET if field != "id"},
        "age": None,
    }
    # Ansible takes no words of our own, though they are texts.
    return {field: str(value) if isinstance(value, str) else value for field, value in found.items()}


def with_age(facts: Mapping[str, Any], now: datetime | None = None) -> dict[str, Any]:
    """Add the seconds since the newest good set was begun: a cache may be older than it."""
    if not facts["started"]:
        return {**facts, "age": None}
    return {**facts, "age": age_of(parse_time(facts["started"]), now or datetime.now(timezone.utc))}


def host_names(vms: Sequence[Mapping[str, Any]], taken: Collection[str]) -> list[str]:
    """Return what the host of each VM is called: as the VM's directory in a repository, in which nothing is odd.

    Where that does not tell VMs apart, or is C(taken) by something else, the hypervisor's name follows it.
    """
    plain = [vm_directory(vm["name"]) for vm in vms]
    count: dict[str, int] = {}
    for name in plain:
        count[name] = count.get(name, 0) + 1
    reserved = {*taken, *(vm["hypervisor"] for vm in vms)}
    return [
        name if count[name] == 1 and name not in reserved else f"{name}@{vm_directory(vm['hypervisor'])}"
        for name, vm in zip(plain, vms)
    ]
