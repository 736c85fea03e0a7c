# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write the report of a run as one page of HTML: a pure function of its data.

The page loads nothing and runs nothing. Everything in it that comes from elsewhere is escaped.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .._backup.outcome import BAD, VmState
from .._common.formats import counted, human
from .html_charts import charts
from .html_style import STYLE
from .html_text import label, moment, rate, span, text
from .record import HypervisorState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from .run import Run


MAX_UNFOLDED = 40
"""VMs up to which all hypervisors are unfolded."""


def page(report: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return the page. C(runs) are the last ones with this one, oldest first."""
    parts = [_head(report), _failures(report), charts(runs, report["id"]), _hypervisors(report), _foot(report)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a name ever slip through, it still cannot run or fetch anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>Backup {text(report['id'])}: {text(_verdict(report['summary'])[0])}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _verdict(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the most important thing in one sentence, and its kind."""
    bad = summary[VmState.FAILED] + summary[VmState.CANCELLED]
    said = []
    if bad:
        said.append(f"{bad} of {counted(summary['vms'], 'VM')} {'has' if bad == 1 else 'have'} no set")
    if summary["hypervisors_failed"]:
        said.append(f"{counted(summary['hypervisors_failed'], 'hypervisor')} without a result")
    if summary["damaged"]:
        said.append(f"the newest set of {counted(summary['damaged'], 'VM')} is damaged")
    if said:
        joined = ", ".join(said)
        return joined[0].upper() + joined[1:], "bad"
    if summary["hypervisors_waiting"]:
        return f"{counted(summary['hypervisors_waiting'], 'hypervisor')} still to come", "warn"
    if not summary["vms"]:
        return "There was no VM to back up", "warn"
    if summary[VmState.PUBLISHED] < summary["vms"]:
        rest = summary["vms"] - summary[VmState.PUBLISHED]
        return (
            f"{summary[VmState.PUBLISHED]} of {counted(summary['vms'], 'VM')} have their set, {rest} left out",
            "warn",
        )
    return "The VM has its set" if summary["vms"] == 1 else f"All {summary['vms']} VMs have their set", "good"


def _head(report: Mapping[str, Any]) -> str:
    """Return the verdict and the numbers of the run."""
    summary = report["summary"]
    said, kind = _verdict(summary)
    already = summary[VmState.PUBLISHED] - summary["new"]
    begun = f"Begun {moment(summary['began'])}, written" if summary["began"] else "Written"
    known = summary["hypervisors"] - summary["hypervisors_failed"] - summary["hypervisors_waiting"]
    bad = summary[VmState.FAILED] + summary[VmState.CANCELLED]
    tiles = [
        ("With their set", _of(summary[VmState.PUBLISHED], summary["vms"])),
        ("Failed", f'<span class="bad">{bad}</span>' if bad else "0"),
        ("Hypervisors", _of(known, summary["hypervisors"])),
        ("Size of the sets", _of_unit(human(summary["bytes"]))),
        ("Copying", _of_unit(span(summary["seconds"]))),
        ("Throughput", _of_unit(rate(summary["bytes"], summary["seconds"])) or "&ndash;"),
        ("File systems frozen", _of(summary["frozen"], summary[VmState.PUBLISHED])),
        ("Verified", _of(summary["verified"], summary[VmState.PUBLISHED])),
    ]
    return (
        '<header>\n<p class="kicker">Backup of virtual machines</p>\n'
        f'<h1>{text(report["id"])}</h1>\n<p class="verdict">{label(kind, text(said))}</p>\n'
        f'<p class="soft">{begun} {moment(report["written"])}.'
        + (f" {counted(already, 'set was', 'sets were')} there before this run." if already else "")
        + f'</p>\n{_share(summary)}</header>\n<dl class="tiles">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
        + "</dl>\n"
    )


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


def _failures(report: Mapping[str, Any]) -> str:
    """Return what went wrong, with the command that repeats the run; nothing where all is well."""
    items = []
    for host in report["hypervisors"]:
        if host["error"]:
            word = "No result" if host["state"] == HypervisorState.UNREACHED else "Incomplete"
            items.append(_failure("hypervisor", host["name"], "", word, host["error"], ""))
    for host in report["hypervisors"]:
        for vm in host["vms"]:
            last = (
                f"Last good set: {text(vm['last']['id'])}, begun {moment(vm['last']['started'])}" if vm["last"] else ""
            )
            last = last or "It has no good set."
            if vm["state"] in BAD:
                items.append(_failure("VM", vm["name"], host["name"], vm["state"].capitalize(), vm["error"], last))
            elif vm["damage"]:
                items.append(_failure("VM", vm["name"], host["name"], "Damaged", vm["damage"], last))
    if not items:
        return ""
    again = f"ansible-playbook -i INVENTORY vmfleet.backup.backup -e vm_backup_id={text(report['id'])}"
    return (
        f'<h2>What went wrong</h2>\n<ul class="card failures">{"".join(items)}</ul>\n'
        '<p class="soft" style="margin-top:14px">When the reasons are gone, run it again with the same id.'
        f" Sets that are there stay as they are.</p>\n<pre>{again}</pre>\n"
    )


def _failure(kind: str, name: str, host: str, word: str, error: str, last: str) -> str:
    where = (
        f' <span class="soft">on <bdi>{text(host)}</bdi></span>' if host else ' <span class="soft">(hypervisor)</span>'
    )
    after = f'<p class="soft">{last}</p>' if last else ""
    return (
        f'<li data-kind="{kind}"><b class="name">{text(name)}</b>{where} {label("bad", text(word))}'
        f"<p>{'<br>'.join(map(text, error.splitlines()))}</p>{after}</li>"
    )


def _hypervisors(report: Mapping[str, Any]) -> str:
    """Return all hypervisors with their VMs, first those with something wrong."""
    few = sum(len(host["vms"]) for host in report["hypervisors"]) <= MAX_UNFOLDED
    ordered = sorted(report["hypervisors"], key=lambda host: (not _is_bad(host), host["name"]))
    blocks = "".join(_hypervisor(host, report["id"], few or _is_bad(host)) for host in ordered)
    return f"<h2>Hypervisors</h2>\n{blocks}"


def _is_bad(host: Mapping[str, Any]) -> bool:
    return bool(host["error"] or any(vm["state"] in BAD or vm["damage"] for vm in host["vms"]))


def _hypervisor(host: Mapping[str, Any], set_id: str, unfolded: bool) -> str:
    vms = host["vms"]
    sets = [vm["set"] for vm in vms if vm["state"] == VmState.PUBLISHED and vm["set"]]
    about = [f"repository <bdi>{text(host['repository'])}</bdi>"] if host["repository"] else []
    about += [f"as of {moment(host['written'])}"] if host["written"] else []
    about += [f"set {text(host['id'])}"] if host["id"] not in {"", set_id} else []
    numbers = (
        f'<span class="num">{len(sets)} of {counted(len(vms), "VM")}</span>'
        f'<span class="num">{human(sum(one["bytes"] for one in sets))}</span>'
        if vms
        else ""
    )
    return (
        f"<details{' open' if unfolded and vms else ''}>"
        f"<summary><b>{text(host['name'])}</b>{numbers}{_host_state(host, vms)}</summary>"
        f'<p class="about">{", ".join(about) or "nothing is known of its VMs"}</p>'
        + (_table(vms) if vms else "")
        + "</details>\n"
    )


def _host_state(host: Mapping[str, Any], vms: Sequence[Mapping[str, Any]]) -> str:
    """Return the state of a hypervisor in a word."""
    bad = sum(vm["state"] in BAD for vm in vms)
    if host["state"] == HypervisorState.UNREACHED:
        return label("bad", "No result")
    if host["state"] == HypervisorState.WAITING:
        return label("warn", "Still to come")
    if bad:
        return label("bad", f"{bad} failed")
    if host["error"]:
        return label("bad", "Incomplete")
    if _is_bad(host):
        return label("bad", "Damaged")
    return label("good", "Good") if vms else label("warn", "No VMs")


def _table(vms: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(vms, key=lambda vm: (vm["state"] not in BAD, not vm["damage"], vm["name"]))
    return (
        '<table class="vms"><thead><tr><th>VM</th><th>Set</th><th>Level</th><th class="r">Size</th><th class="r">Time'
        '</th><th class="r">Rate</th><th>Consistency</th><th class="r">Chain</th><th>Verified</th></tr></thead><tbody>'
        + "".join(line for vm in ordered for line in _rows(vm))
        + "</tbody></table>"
    )


def _rows(vm: Mapping[str, Any]) -> Iterator[str]:
    """Yield the row of a VM, and one with its notes where there are any."""
    found = vm["set"] or {}
    words = {
        VmState.PUBLISHED: ("good", "Published" if vm["changed"] else "Was there"),
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
    reason = "" if vm["state"] == VmState.PUBLISHED else vm["reason"]
    notes = [note for note in (vm["damage"], vm["error"], reason, *vm["warnings"]) if note]
    if notes:
        yield '<tr class="note"><td colspan="9" class="soft">{}</td></tr>'.format(
            "<br>".join(text(note) for note in notes)
        )


def _foot(report: Mapping[str, Any]) -> str:
    return f'<footer>The same as data: <a href="{text(report["id"])}.json">{text(report["id"])}.json</a></footer>\n'
