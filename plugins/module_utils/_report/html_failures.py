# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""List what went wrong in a run, each reason once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._backup.outcome import BAD
from .._common.formats import counted
from .html_text import label, moment, text
from .record import HypervisorState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any


MAX_NAMED = 6
"""VMs of one reason up to which all are named at once; more are folded."""


@dataclass(frozen=True)
class FailureEntry:
    """What went wrong for a VM, or for a hypervisor where C(host) is empty. C(last) is the newest good set."""

    name: str
    host: str
    word: str
    error: str
    last: Mapping[str, Any] | None = None

    @property
    def reason(self) -> tuple[bool, str, str]:
        """Return what is the same for all that failed for one reason: their errors may differ by their names only."""
        name = re.compile(rf"(?<![\w.-]){re.escape(self.name)}(?![\w-])")
        return bool(self.host), self.word, name.sub("\0", self.error) if self.name else self.error


def failures(report: Mapping[str, Any]) -> str:
    """Return what went wrong, with the command that repeats the run; nothing where all is well."""
    groups: dict[tuple[bool, str, str], list[FailureEntry]] = {}
    for failure in _failures(report["hypervisors"]):
        groups.setdefault(failure.reason, []).append(failure)
    if not groups:
        return ""
    # The hypervisors first, then what hits most VMs.
    ordered = sorted(groups.values(), key=lambda group: (bool(group[0].host), -len(group)))
    again = f"ansible-playbook -i INVENTORY vmfleet.backup.backup -e vm_backup_id={text(report['id'])}"
    return (
        f'<h2>What went wrong</h2>\n<ul class="card failures">{"".join(map(_group, ordered))}</ul>\n'
        '<p class="soft" style="margin-top:14px">Remove the reasons, then run the backup again with the same id.'
        f" The run keeps the sets that exist.</p>\n<pre>{again}</pre>\n"
    )


def _failures(hypervisors: Sequence[Mapping[str, Any]]) -> Iterator[FailureEntry]:
    for host in hypervisors:
        if host["error"]:
            word = "No result" if host["state"] == HypervisorState.UNREACHED else "Incomplete"
            yield FailureEntry(host["name"], "", word, host["error"])
    for host in hypervisors:
        for vm in host["vms"]:
            if vm["state"] in BAD:
                yield FailureEntry(
                    vm["name"], host["name"], vm["state"].capitalize(), vm["error"] or vm["reason"], vm["last"]
                )
            elif vm["damage"]:
                yield FailureEntry(vm["name"], host["name"], "Damaged", vm["damage"], vm["last"])


def _group(group: Sequence[FailureEntry]) -> str:
    """Return one reason, with all that failed for it."""
    first = group[0]
    error = "<br>".join(map(text, first.error.splitlines()))
    if len(group) == 1:
        last = f'<p class="soft">{_last(first)}</p>' if first.host else ""
        return f"<li>{_name(first)} {label('bad', text(first.word))}<p>{error}</p>{last}</li>"
    hosts = {one.host for one in group}
    if first.host:
        where = f"on <bdi>{text(first.host)}</bdi>" if len(hosts) == 1 else f"on {len(hosts)} hypervisors"
        head = f'<b class="name">{counted(len(group), "VM")}</b> <span class="soft">{where}</span>'
    else:
        head = f'<b class="name">{counted(len(group), "hypervisor")}</b>'
    if any(one.error != first.error for one in group):
        error = f'<span class="soft">For example, of <bdi>{text(first.name)}</bdi>:</span> {error}'
    names = "".join(f"<li>{_name(one)}{f', {_last(one, False)}' if one.host else ''}</li>" for one in group)
    listed = f'<ul class="names">{names}</ul>'
    if len(group) > MAX_NAMED:
        listed = f'<details class="plain"><summary>All {len(group)} names</summary>{listed}</details>'
    return f"<li>{head} {label('bad', text(first.word))}<p>{error}</p>{_lasts(group)}{listed}</li>"


def _name(failure: FailureEntry) -> str:
    where = f"on <bdi>{text(failure.host)}</bdi>" if failure.host else "(hypervisor)"
    return f'<b class="name">{text(failure.name)}</b> <span class="soft">{where}</span>'


def _last(failure: FailureEntry, sentence: bool = True) -> str:
    """Return which is the newest good set of a VM."""
    if not failure.last:
        return "It has no good set." if sentence else '<span class="bad">no good set</span>'
    found = f"{text(failure.last['id'])}, started {moment(failure.last['started'])}"
    return f"Last good set: {found}" if sentence else f'<span class="soft">last good set {found}</span>'


def _lasts(group: Sequence[FailureEntry]) -> str:
    """Return how many of the VMs have no good set at all; nothing where each has one."""
    without = sum(1 for one in group if one.host and not one.last)
    if not without:
        return ""
    said = "None of them has" if without == len(group) else f"{without} of them {'has' if without == 1 else 'have'}"
    return f'<p class="soft">{said} {"a" if without == len(group) else "no"} good set.</p>'
