# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write the report of a run as one page of HTML: a pure function of its data.

The page loads nothing and runs nothing. Everything in it that comes from elsewhere is escaped.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from .._backup.outcome import BAD, MANY, VmState
from .._common.formats import counted, human
from .html_charts import charts
from .html_failures import failures
from .html_runs import navigation
from .html_text import document, label, moment, rate, span, text
from .record import HypervisorState

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence
    from typing import Any

    from .run import Run


MAX_UNFOLDED = 40
"""VMs up to which all hypervisors are unfolded."""


def page(report: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return the page. C(runs) are the last ones with this one, oldest first."""
    this = report["id"]
    parts = [_head(report, runs), failures(report), charts(runs, this), _hypervisors(report), _foot(report)]
    return document(f"Backup {this}: {_verdict(report['summary'])[0]}", "".join(parts))


def _verdict(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the most important thing in one sentence, and its kind."""
    bad = summary[VmState.FAILED] + summary[VmState.CANCELLED]
    said = []
    if bad:
        said.append(f"{bad} of {counted(summary['vms'], 'VM')} not backed up")
    if summary["hypervisors_failed"]:
        said.append(f"{counted(summary['hypervisors_failed'], 'hypervisor')} without a result")
    if summary["damaged"]:
        said.append(f"the newest set of {counted(summary['damaged'], 'VM')} is damaged")
    if said:
        joined = ", ".join(said)
        return joined[0].upper() + joined[1:], "bad"
    if summary["hypervisors_waiting"]:
        waiting = summary["hypervisors_waiting"]
        return f"{counted(waiting, 'hypervisor')} {'has' if waiting == 1 else 'have'} not reported yet", "warn"
    if not summary["vms"]:
        return "There was no VM to back up", "warn"
    if summary[VmState.PUBLISHED] < summary["vms"]:
        skipped = summary[VmState.SKIPPED]
        rest = summary["vms"] - summary[VmState.PUBLISHED] - skipped
        so_far = f"{summary[VmState.PUBLISHED]} of {counted(summary['vms'], 'VM')} backed up"
        others = ((skipped, "skipped"), (rest, "not finished"))
        return ", ".join([so_far, *(f"{number} {state}" for number, state in others if number)]), "warn"
    return "The VM is backed up" if summary["vms"] == 1 else f"All {summary['vms']} VMs are backed up", "good"


def _head(report: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return the verdict and the numbers of the run."""
    summary = report["summary"]
    said, kind = _verdict(summary)
    already = summary[VmState.PUBLISHED] - summary["new"]
    started = f"Started {moment(summary['began'])}, written" if summary["began"] else "Written"
    return (
        f'<header>\n<div class="top"><p class="kicker">Backup of virtual machines</p>\n{navigation(runs, report["id"])}'
        f'</div><h1>{text(report["id"])}</h1>\n<p class="verdict">{label(kind, text(said))}</p>\n'
        f'<p class="soft">{started} {moment(report["written"])}.'
        + (f" {counted(already, 'set')} existed before this run." if already else "")
        + f"</p>\n{_share(summary)}</header>\n{_tiles(summary)}"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    """Return the numbers of the run, without those that would say nothing."""
    total, known = summary["hypervisors"], summary["hypervisors"]
    known -= summary["hypervisors_failed"] + summary["hypervisors_waiting"]
    bad = summary[VmState.FAILED] + summary[VmState.CANCELLED]
    published = summary[VmState.PUBLISHED]
    tiles = [
        ("Backed up", _of(published, summary["vms"]) if summary["vms"] else ""),
        ("Failed", (f'<span class="bad">{bad}</span>' if bad else "0") if summary["vms"] else ""),
        ("Hypervisors", _of(known, total) if total > 1 or known < total else ""),
        ("Backup size", _of_unit(human(summary["bytes"])) if summary["bytes"] else ""),
        ("Copy time", _of_unit(span(summary["seconds"])) if summary["seconds"] else ""),
        ("Copy speed", _of_unit(rate(summary["bytes"], summary["seconds"]))),
        ("File systems frozen", _of(summary["frozen"], published) if summary["frozen"] else ""),
        ("Verified", _of(summary["verified"], published) if summary["verified"] else ""),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles if value)
    # Rows of nearly the same length: 6 are two rows of 3, and 7 one of 4 and one of 3.
    number = shown.count("<dt>")
    columns = number if number <= 5 else (number + 1) // 2
    return f'<dl class="tiles" style="--columns:{columns}">{shown}</dl>\n' if shown else ""


def _of(part: int, whole: int) -> str:
    return f"{part} <small>of {whole}</small>"


def _of_unit(said: str) -> str:
    """Return a size or a time with small units."""
    return re.sub(r"[A-Za-z/]+", r"<small>\g<0></small>", said)


def _share(summary: Mapping[str, Any]) -> str:
    """Return the VMs as one bar, by their states."""
    parts = [
        ("x", summary[VmState.FAILED] + summary[VmState.CANCELLED]),
        ("g", summary[VmState.PUBLISHED]),
        ("s", summary[VmState.SKIPPED]),
    ]
    if not summary["vms"]:
        return ""
    drawn, left = ['<rect class="l" width="100" height="8"/>'], 0.0
    for kind, number in parts:
        if number:
            # One VM among thousands is still visible.
            width = max(100 * number / summary["vms"], 0.6)
            drawn.append(f'<rect class="{kind}" x="{left:.2f}" width="{width:.2f}" height="8"/>')
            left += width
    return (
        f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>\n'
    )


def _hypervisors(report: Mapping[str, Any]) -> str:
    """Return all hypervisors with their VMs, first those with something wrong."""
    few = sum(len(host["vms"]) for host in report["hypervisors"]) <= MAX_UNFOLDED
    ordered = sorted(report["hypervisors"], key=lambda host: (not _is_bad(host), host["name"]))
    blocks = "".join(_hypervisor(host, report["id"], few or _is_bad(host)) for host in ordered)
    return f"<h2>Hypervisors</h2>\n{blocks}" if blocks else ""


def _is_bad(host: Mapping[str, Any]) -> bool:
    return bool(host["error"] or any(vm["state"] in BAD or vm["damage"] for vm in host["vms"]))


def _hypervisor(host: Mapping[str, Any], set_id: str, unfolded: bool) -> str:
    vms = host["vms"]
    sets = [vm["set"] for vm in vms if vm["state"] == VmState.PUBLISHED and vm["set"]]
    size = sum(one["bytes"] for one in sets)
    about = [f"repository <bdi>{text(host['repository'])}</bdi>"] if host["repository"] else []
    about += [f"as of {moment(host['written'])}"] if host["written"] else []
    about += [f"set {text(host['id'])}"] if host["id"] not in {"", set_id} else []
    numbers = (
        f'<span class="num">{len(sets)} of {counted(len(vms), "VM")}</span>'
        f'<span class="num">{human(size) if size else ""}</span>'
        if vms
        else ""
    )
    return (
        f"<details{' open' if unfolded and vms else ''}>"
        f"<summary><b>{text(host['name'])}</b>{numbers}{_host_state(host, vms)}</summary>"
        f'<p class="about">{", ".join(about) or "it has reported nothing of its VMs"}</p>'
        + (_table(vms) if vms else "")
        + "</details>\n"
    )


def _host_state(host: Mapping[str, Any], vms: Sequence[Mapping[str, Any]]) -> str:
    """Return the state of a hypervisor in a word."""
    bad = sum(vm["state"] in BAD for vm in vms)
    if host["state"] == HypervisorState.UNREACHED:
        return label("bad", "No result")
    if host["state"] == HypervisorState.WAITING:
        return label("warn", "Not reported yet")
    if bad:
        return label("bad", f"{bad} failed")
    if host["error"]:
        return label("bad", "Incomplete")
    if _is_bad(host):
        return label("bad", "Damaged")
    return label("good", "Good") if vms else label("warn", "No VMs")


def _table(vms: Sequence[Mapping[str, Any]]) -> str:
    """Return the VMs of a hypervisor. What concerns many of them is said once, above them."""
    ordered = sorted(vms, key=lambda vm: (vm["state"] not in BAD, not vm["damage"], vm["name"]))
    counts = Counter(note for vm in vms for note in set(_notes(vm)))
    many = {note: count for note, count in counts.items() if count >= MANY}
    said = "".join(f"<li>{count} of {len(vms)} VMs: {text(note)}</li>" for note, count in many.items())
    return (
        (f'<ul class="warnings">{said}</ul>' if said else "")
        + f'<table class="{" ".join(["vms", *_without(vms)])}"><thead><tr><th>VM</th><th>Result</th><th>Level</th>'
        '<th class="r">Size</th><th class="r">Time</th><th class="r">Speed</th><th>Consistency</th>'
        '<th class="r">Images</th><th>Verified</th></tr></thead><tbody>'
        + "".join(line for vm in ordered for line in _rows(vm, many))
        + "</tbody></table>"
    )


def _without(vms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the names of the columns that would say nothing of any VM."""
    sets = [vm["set"] for vm in vms if vm["set"]]
    if not any(rate(one["bytes"], one["duration"]) for one in sets):
        yield "no-speed"
    if all(one["chain"] == 1 for one in sets):
        yield "no-images"
    if not any(one["verified"] for one in sets):
        yield "no-verified"
    if not sets:
        yield "no-set"


def _rows(vm: Mapping[str, Any], said: Container[str]) -> Iterator[str]:
    """Yield the row of a VM, and one with its notes where there are any that are not said elsewhere on the page."""
    found = vm["set"] or {}
    words = {
        VmState.PUBLISHED: ("good", "Backed up" if vm["changed"] else "Existed before"),
        VmState.FAILED: ("bad", "Failed"),
        VmState.CANCELLED: ("bad", "Cancelled"),
    }
    damaged = vm["damage"] and vm["state"] not in BAD
    kind, word = ("bad", "Damaged") if damaged else words.get(vm["state"], ("warn", text(vm["state"].capitalize())))
    frozen = f"<small>, {text(vm['frozen_ms'])} ms</small>" if found and vm["frozen_ms"] else ""
    cells = [
        f"<td><b>{text(vm['name'])}</b></td>",
        f"<td>{label(kind, word)}</td>",
        f"<td>{text(found.get('level', ''))}</td>",
        f'<td class="r">{human(found["bytes"]) if found else ""}</td>',
        f'<td class="r">{span(found["duration"]) if found else ""}</td>',
        f'<td class="r">{rate(found["bytes"], found["duration"]) if found else ""}</td>',
        f"<td>{text(found.get('consistency', ''))}{frozen}</td>",
        f'<td class="r">{text(found.get("chain", ""))}</td>',
        f"<td>{text(found['verified'] or 'no') if found else ''}</td>",
    ]
    yield f"<tr>{''.join(cells)}</tr>"
    notes = [note for note in _notes(vm) if note not in said]
    if notes:
        yield '<tr class="note"><td colspan="9" class="soft">{}</td></tr>'.format(
            "<br>".join(text(note) for note in notes)
        )


def _notes(vm: Mapping[str, Any]) -> list[str]:
    """Return what is to be said of a VM beside what went wrong."""
    says_why = vm["state"] != VmState.PUBLISHED and (vm["error"] or vm["state"] not in BAD)
    return [*([vm["reason"]] if says_why and vm["reason"] else []), *vm["warnings"]]


def _foot(report: Mapping[str, Any]) -> str:
    return f'<footer>The same as data: <a href="{text(report["id"])}.json">{text(report["id"])}.json</a></footer>\n'
