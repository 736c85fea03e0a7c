# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sum up a backup run over all hypervisors of a play."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._backup.outcome import BAD, UNFINISHED, VmState, unfinished
from .._common.formats import amount, counted
from .._common.printable import printable
from .told import fits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


DONE = {
    "vms": [{"name": str, "state": str, "error": str, "reason": str}],
    "summary": {"bytes": int},
}
"""What is read of the result of backup_set."""


@dataclass(frozen=True)
class HypervisorNotes:
    """What a hypervisor has noted: its use of the role, what the modules returned, and what went wrong."""

    name: str
    use: Mapping[str, Any]
    done: Mapping[str, Any]
    told: Mapping[str, Any]
    problem: str
    unknown: frozenset[str] | None
    """The names that its plan was asked for and that it has no VM of; None where there is no plan."""

    @classmethod
    def of(cls, name: str, variables: Mapping[str, Any]) -> HypervisorNotes:
        """Return what stands in the variables of a host."""
        use, done, told = (variables.get(f"__vm_backup_{each}") or {} for each in ("use", "done", "told"))
        problem = variables.get("__vm_backup_problem") or (told.get("msg", "") if told.get("unreachable") else "")
        if "vms" in done and not fits(done, DONE):
            # Nothing of it is believed, and the others do not depend on it.
            done, problem = {}, problem or "the result of backup_set for its VMs cannot be used"
        unknown = (variables.get("__vm_backup_planned") or {}).get("unknown")
        return cls(
            name,
            use,
            done,
            told.get("hypervisor") or {},
            problem,
            frozenset(map(str, unknown)) if isinstance(unknown, list) else None,
        )

    @property
    def vms(self) -> Sequence[Mapping[str, Any]]:
        """The results of its VMs."""
        return self.done.get("vms") or ()

    @property
    def answered(self) -> bool:
        """Whether it is known what has become of its VMs."""
        return "vms" in self.done

    @property
    def succeeded(self) -> bool:
        """Whether every VM has its set."""
        return self.answered and "msg" not in self.done and not self.problem


@dataclass(frozen=True)
class FleetRun:
    """A run. C(hosts) are those that it is about; only C(members) took part, the others were lost before."""

    id: str
    hosts: tuple[str, ...]
    members: tuple[HypervisorNotes, ...]

    @property
    def lost(self) -> list[str]:
        """The hosts that were lost before."""
        names = [one.name for one in self.members]
        return [name for name in self.hosts if name not in names]

    @property
    def unknown(self) -> list[str]:
        """The names that no hypervisor has a VM of; none where one of them could not be asked."""
        known = [one.unknown for one in self.members if one.unknown is not None]
        return sorted(frozenset.intersection(*known)) if known and len(known) == len(self.hosts) else []

    @property
    def again(self) -> list[str]:
        """The hosts for which the run is to be repeated."""
        good = [one.name for one in self.members if one.succeeded]
        return [name for name in self.hosts if name not in good]


def fleet_summary(
    hostvars: Mapping[str, Mapping[str, Any]],
    hosts: Sequence[str],
    active: Sequence[str],
    id: str,  # noqa: A002
    use: Mapping[str, Any] | None = None,
    inventories: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the summary of a run, for people and for backup_report."""
    found = [HypervisorNotes.of(name, hostvars[name]) for name in hosts]
    partners = [one.name for one in found if use is None or _takes_part(one, id, use)]
    about = tuple(name for name in hosts if name in partners or name not in active)
    run = FleetRun(id, about, tuple(one for one in found if one.name in partners))
    return {
        "hosts": list(about),
        "unknown": run.unknown,
        "text": describe(run, use is not None, inventories),
        **_for_report(found, run, active),
    }


def _takes_part(one: HypervisorNotes, set_id: str, use: Mapping[str, Any]) -> bool:
    """Tell whether a hypervisor takes part in this use of the role.

    In a batch not all do, in a rescue only those that have failed, and the others' notes may be of another use.
    """
    same = one.use.get("repository") == use["repository"] or one.use.get("number") == use["number"]
    return one.use.get("id") == set_id and same


def _for_report(found: Sequence[HypervisorNotes], run: FleetRun, active: Sequence[str]) -> dict[str, Any]:
    """Return what backup_report takes: what each hypervisor has told, why one has not, and which are still to come."""
    members = {one.name: one for one in run.members}
    # Who has taken part in another use is no matter of this one.
    expected = [one.name for one in found if one.name in run.hosts or "id" not in one.use]
    return {
        "hypervisors": {name: members[name].told if name in members else {} for name in expected},
        "errors": {name: members[name].problem if name in members else "" for name in expected},
        "pending": [name for name in expected if name in active and not (name in members and members[name].answered)],
    }


def describe(run: FleetRun, own: bool, inventories: Sequence[str]) -> list[str]:
    """Return the summary for people, what went wrong last: that is what is seen at the end of a long output."""
    lines = [_headline(run), *(f"FAILED  {name}: it failed before; its error is above" for name in run.lost)]
    for one in run.members:
        if one.problem or not one.answered:
            problem = one.problem or "the state of its VMs is unknown; its error is above"
            lines.append(f"FAILED  {one.name}: {problem}")
        lines += [
            f"FAILED  {one.name}, {printable(vm['name'])}: {printable(vm['error'] or vm['reason'])}"
            for vm in one.vms
            if _is_bad(vm)
        ]
    if run.again:
        lines.append(
            f"Remove the reasons, then run it again with the same options and -e vm_backup_id={run.id}. Sets that"
            " exist are not changed:"
        )
        lines.append(_command(run, own, inventories))
    return [printable(each) for line in lines for each in line.splitlines()]


def _headline(run: FleetRun) -> str:
    vms = [vm for one in run.members for vm in one.vms]
    states = [vm["state"] for vm in vms]
    written = sum(one.done["summary"]["bytes"] for one in run.members if one.answered)
    return (
        f"Backup {run.id} of {counted(len(run.hosts), 'hypervisor')}:"
        f" {states.count(VmState.PUBLISHED)} of {len(vms)} VMs have their set, {sum(map(_is_bad, vms))} failed,"
        f" {states.count(VmState.SKIPPED)} skipped, {amount(written)} written"
        f"{unfinished({state: states.count(state) for state in UNFINISHED})}"
    )


def _is_bad(vm: Mapping[str, Any]) -> bool:
    return vm["state"] in BAD


def _command(run: FleetRun, own: bool, inventories: Sequence[str]) -> str:
    """Return how to repeat the run; C(own) is the playbook of a user, whose name is not known."""
    options = f"-e vm_backup_id={shlex.quote(run.id)} --limit {shlex.quote(','.join(run.again))}"
    if own:
        return f"the playbook of this play, with {options}"
    sources = "".join(f" -i {shlex.quote(source)}" for source in inventories)
    return f"ansible-playbook{sources} vmfleet.backup.backup {options}"
