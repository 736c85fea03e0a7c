# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Put the backups of all VMs of a fleet into one table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._backup.outcome import UNFINISHED, unfinished
from .._common.formats import amount, counted
from .._common.printable import printable
from .._common.selection import Selection
from .._repository.names import column
from .told import fits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any


SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}

FOUND = {
    "vms": [
        {
            **dict.fromkeys(("name", "newest", "level", "verified"), str),
            **dict.fromkeys(("age", "sets", "bytes"), int),
            "ok": bool,
        }
    ],
    "leftovers": [{"vm": str, "what": str}],
    "totals": {"sets": int},
}
"""What is read of the result of backup_info."""
WORKER = {"running": bool, "pid": int, "id": str, "since": str, "vms": [{"state": str}]}
"""What is read of the result of backup_follow, where a worker is at work."""
NOTHING: dict[str, Any] = {"vms": (), "leftovers": (), "totals": {"sets": 0}}
COLUMNS = ("VM", "newest set", "age", "level", "sets", "size", "verified", "hypervisor")


@dataclass(frozen=True)
class HypervisorStatus:
    """What a hypervisor has found: the VMs that it should back up, and those in its repository.

    C(missing) are those that it should back up and that have no set; C(begun) those of which the repository has no set,
    and something else; C(selection) says which are asked for.
    """

    name: str
    repository: str
    file: str
    expected: tuple[str, ...]
    missing: tuple[str, ...]
    begun: tuple[str, ...]
    selection: Selection
    found: Mapping[str, Any]
    worker: str = ""
    """How far its worker is, where one is at work."""
    odd: tuple[str, ...] = ()
    """What it has told that cannot be used: nothing of that is believed, and the others do not depend on it."""

    @classmethod
    def of(cls, here: Mapping[str, Any]) -> HypervisorStatus:
        """Return what is known of one."""
        found, running, odd = here["found"], here["running"], []
        if not fits(found, FOUND):
            found = NOTHING
            odd.append("backup_info")
        if not fits(running, [{"monitor": str}]) or not all(isinstance(vm.get("name", ""), str) for vm in running):
            running = ()
            odd.append("vm_info")
        worker = here.get("worker") or {}
        if worker.get("running") and not fits(worker, WORKER):
            odd.append("backup_follow")
            worker = {}
        expected = expected_vms(here["vms"], here["sockets"], running)
        there = {vm["name"] for vm in found["vms"]}
        mine = there - _of_others(found["vms"], here["vms"], running)
        selection = Selection(tuple(here["names"]) or None, tuple(here.get("exclude_names", ())))
        missing = [name for name in expected if name not in mine and selection.takes(name)]
        begun = {left["vm"] for left in found["leftovers"]} - there
        return cls(
            name=here["name"],
            repository=here["repository"],
            file=here["file"],
            expected=tuple(expected),
            missing=tuple(missing),
            begun=tuple(sorted(begun, key=str.lower)),
            selection=selection,
            found=found,
            worker=_worker(worker) if worker.get("running") else "",
            odd=tuple(odd),
        )

    @property
    def known(self) -> set[str]:
        """Return the VMs that it knows of."""
        return {*(vm["name"] for vm in self.found["vms"]), *self.expected, *self.begun}

    def shares(self, other: HypervisorStatus) -> bool:
        """Tell whether two have the same repository."""
        return self is other or bool(self.file and self.file == other.file)


@dataclass(frozen=True)
class StatusRow:
    """A VM in a repository, and the hypervisors that have it."""

    vm: Mapping[str, Any]
    bad: bool
    hypervisors: tuple[str, ...]
    leader: str

    @property
    def cells(self) -> tuple[str, ...]:
        vm = self.vm
        return (
            vm["name"],
            vm["newest"],
            _age(vm["age"]),
            vm["level"],
            str(vm["sets"]),
            amount(vm["bytes"]),
            (vm["verified"] or "no") if vm["ok"] else "NOT GOOD",
            ", ".join(self.hypervisors) or f"({self.leader})",
        )


def expected_vms(
    listed: Iterable[Mapping[str, Any]], sockets: Iterable[str], running: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return the VMs that a hypervisor should back up; one that does not answer is called after its monitor."""
    named = {_address(vm["monitor"]): vm["name"] for vm in listed if "name" in vm}
    others = [vm for vm in running if vm["monitor"] not in named and not vm.get("excluded")]
    answering = [vm["monitor"] for vm in running]
    exact = [_address(path) for path in sockets if not re.search(r"[*?[]", path)]
    silent = [vm["monitor"] for vm in others if "name" not in vm] + [one for one in exact if one not in answering]
    names = [vm["name"] for vm in listed if "name" in vm] + [vm["name"] for vm in others if "name" in vm]
    return list(dict.fromkeys([*names, *map(_stem, silent)]))


def _of_others(
    found: Iterable[Mapping[str, Any]], listed: Iterable[Mapping[str, Any]], running: Iterable[Mapping[str, Any]]
) -> set[str]:
    """Return the names whose newest set is that of another VM: the VM of this name here has none of its own."""
    named = {_address(vm["monitor"]): vm["name"] for vm in listed if "name" in vm}
    uuids = {named.get(vm["monitor"], vm.get("name")): str(vm.get("uuid") or "").lower() for vm in running}
    pairs = ((vm["name"], str(vm.get("uuid") or "").lower(), uuids.get(vm["name"], "")) for vm in found)
    return {name for name, of_set, of_vm in pairs if of_set and of_vm and of_set != of_vm}


def _workers(fleet: Iterable[HypervisorStatus]) -> list[str]:
    """Return a line for each worker. Two names of one machine have the same one."""
    first: dict[str, str] = {}
    for one in fleet:
        first.setdefault(one.worker, one.name)
    return [f"{name} {worker}" for worker, name in first.items() if worker]


def _worker(found: Mapping[str, Any]) -> str:
    """Return how far a worker is."""
    states = [vm["state"] for vm in found["vms"]]
    done = len(states) - sum(state in UNFINISHED for state in states)
    counts = {str(state): states.count(state) for state in UNFINISHED}
    so_far = f"{done} of {counted(len(states), 'VM')} done{unfinished(counts)}"
    return f"makes set {found['id']} since {found['since']} (process {found['pid']}): {so_far}"


def _address(monitor: str) -> str:
    """Return a monitor's address as vm_info tells it."""
    return f"unix:{monitor}" if monitor.startswith("/") else monitor


def _stem(monitor: str) -> str:
    """Return what a backup calls a VM of which only its monitor is known."""
    if monitor.startswith("libvirt:"):
        return monitor[len("libvirt:") :]
    return monitor if monitor.startswith("tcp:") else re.sub(r"[.][^.]*$", "", monitor.rpartition("/")[2])


def fleet_status(heres: Sequence[Mapping[str, Any]], max_age: str = "", silent: Sequence[str] = ()) -> dict[str, Any]:
    """Return the table of all VMs, those that have no good set of this age, and the names that nobody knows."""
    fleet = [HypervisorStatus.of(here) for here in heres]
    oldest = int(max_age[:-1]) * SECONDS[max_age[-1]] if max_age else None
    leaders = [one for place, one in enumerate(fleet) if not any(one.shares(other) for other in fleet[:place])]
    rows = [row for one in leaders for row in _rows(one, fleet, oldest)]
    known = {name for one in fleet for name in one.known}
    unknown = sorted({name for one in fleet for name in one.selection.unknown(sorted(known))}, key=str.lower)
    missing = [(name, one.name) for one in fleet for name in sorted(one.missing, key=str.lower)]
    missing += [(name, f"({one.name})") for one in leaders for name in _begun(one, fleet)]
    missing += [(name, "") for name in unknown]
    lines = [
        _headline(fleet, leaders, rows, len(missing), max_age),
        *_table(missing, rows),
        *(f"{left['vm']}: {left['what']}" for one in leaders for left in one.found["leftovers"]),
        *_workers(fleet),
        *(f"! {name} could not be asked" for name in silent),
        *(f"! the answer of {what} about {one.name} cannot be used" for one in fleet for what in one.odd),
    ]
    bad = {one.name: _bad_of(one, fleet, any(one is leader for leader in leaders), oldest) for one in fleet}
    there = sorted(known, key=str.lower)
    return {"text": [printable(line) for line in lines], "bad": bad, "unknown": unknown, "known": there}


def _is_bad(vm: Mapping[str, Any], oldest: int | None) -> bool:
    return not vm["ok"] or (oldest is not None and vm["age"] > oldest)


def _rows(leader: HypervisorStatus, fleet: Iterable[HypervisorStatus], oldest: int | None) -> list[StatusRow]:
    """Return the VMs in a repository. It may be that of several hypervisors, of which this is the first."""
    owners: dict[str, list[str]] = {}
    for one in fleet:
        for name in set(one.expected).difference(one.missing) if one.shares(leader) else ():
            owners.setdefault(name, []).append(one.name)
    return [
        StatusRow(vm, _is_bad(vm, oldest), tuple(owners.get(vm["name"], ())), leader.name) for vm in leader.found["vms"]
    ]


def _begun(leader: HypervisorStatus, fleet: Iterable[HypervisorStatus]) -> list[str]:
    """Return the VMs of which a repository has something, but no set, and that no hypervisor should back up."""
    return [name for name in leader.begun if not any(one.shares(leader) and name in one.expected for one in fleet)]


def _bad_of(one: HypervisorStatus, fleet: Sequence[HypervisorStatus], leads: bool, oldest: int | None) -> list[str]:
    """Return the VMs without a good set that are a hypervisor's matter."""
    bad = [vm["name"] for vm in one.found["vms"] if _is_bad(vm, oldest)]
    elsewhere = {name for other in fleet if other is not one and one.shares(other) for name in other.expected}
    mine = [name for name in bad if (name not in elsewhere if leads else name in one.expected)]
    begun = _begun(one, fleet) if leads else []
    return sorted({*one.missing, *begun, *mine}, key=str.lower)


def _headline(
    fleet: Sequence[HypervisorStatus],
    leaders: Sequence[HypervisorStatus],
    rows: Sequence[StatusRow],
    missing: int,
    max_age: str,
) -> str:
    places = ", ".join(dict.fromkeys(one.repository for one in fleet))
    sets = sum(one.found["totals"]["sets"] for one in leaders)
    size = amount(sum(row.vm["bytes"] for row in rows))
    limit = f" that is at most {max_age} old" if max_age else ""
    bad = sum(row.bad for row in rows) + missing
    return f"{places}: {counted(sets, 'set')} of {counted(len(rows), 'VM')}, {size}; without a good set{limit}: {bad}"


def _table(missing: Iterable[tuple[str, str]], rows: Sequence[StatusRow]) -> list[str]:
    """Return the lines of the table: VMs without any set, those without a good one, oldest first, and the others."""
    bad = sorted((row for row in rows if row.bad), key=lambda row: row.vm["age"], reverse=True)
    good = sorted((row for row in rows if not row.bad), key=lambda row: row.vm["name"].lower())
    lines: list[tuple[str, tuple[str, ...]]] = [("", COLUMNS)]
    lines += [("!", (name, "none", "", "", "0", "", "", hypervisor)) for name, hypervisor in missing]
    lines += [("!" if row.bad else "", row.cells) for row in (*bad, *good)]
    width = max(8, column(cells[0] for _mark, cells in lines))
    id_width = max(10, column(row.vm["newest"] for row in rows))
    form = f"{{:1}} {{:{width}}}  {{:{id_width}}}  {{:>6}}  {{:12}}  {{:>4}}  {{:>10}}  {{:9}}  {{}}"
    return [form.format(mark, *cells) for mark, cells in lines]


def _age(seconds: int) -> str:
    if seconds < 90 * 60:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 2 * 86400 else f"{seconds // 86400} d"
