# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report of a run as one page of HTML: a pure function of its data.

The page loads nothing and runs nothing, and everything in it that comes from elsewhere is escaped.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from .._backup.outcome import VmState
from .._common.formats import human, parse_time
from .run import HypervisorState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from .run import Run


FEW = 40
"""Up to how many VMs all hypervisors are unfolded."""
BARS = 30
"""How many runs the charts show."""
BAD = (VmState.FAILED, VmState.CANCELLED)
STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1c1f23;--soft:#5c636b;--line:#e2e3e0;--bar:#5b7fa6;
--good:#1b7340;--bad:#b3261e;--warn:#8a5700;--badbg:#fdf1f0}
@media(prefers-color-scheme:dark){:root{--page:#141618;--card:#1c1f22;--ink:#e7e8e6;--soft:#9ca3aa;--line:#30353a;
--bar:#6f95bf;--good:#66c38a;--bad:#ff8a80;--warn:#e0b060;--badbg:#2a1c1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 12px}
p{margin:0}a{color:inherit}
.soft,.kicker{color:var(--soft)}.kicker{font-size:13px}
.verdict{font-size:18px;margin:10px 0 2px}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.word{font-weight:600}time,li .word,td .word{white-space:nowrap}
.share{display:block;width:100%;height:8px;margin:18px 0 0;border-radius:4px;overflow:hidden}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:20px 0 0;background:var(--line);
border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tiles div{background:var(--card);padding:12px 16px}
.tiles dt{font-size:13px;color:var(--soft)}
.tiles dd{margin:0;white-space:nowrap;word-spacing:-.12em;font-size:21px;font-weight:600;line-height:1.3}
.tiles dd small{word-spacing:0;font-size:13px;font-weight:400;color:var(--soft)}
.card,details{background:var(--card);border:1px solid var(--line);border-radius:8px}
.failures{list-style:none;margin:0;padding:0;border-left:4px solid var(--bad)}
.failures li{padding:12px 16px;border-top:1px solid var(--line)}.failures li:first-child{border-top:0}
.failures p,.note td{overflow-wrap:anywhere;white-space:pre-line}
b,td{unicode-bidi:isolate}
b.name{overflow-wrap:anywhere}
pre{margin:12px 0 0;padding:12px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.charts{display:grid;grid-template-columns:1fr 1fr;gap:16px}
figure{margin:0;padding:14px 16px}
figcaption{display:flex;justify-content:space-between;gap:12px;font-weight:600}
figcaption span{font-weight:400;color:var(--soft);font-size:13px}
figure svg{display:block;width:100%;height:120px;margin:8px 0 4px;border-top:1px dashed var(--line)}
td small{font-size:inherit;color:var(--soft)}
figure .ends{display:flex;justify-content:space-between;gap:12px;font-size:13px;color:var(--soft)}
rect.b{fill:var(--bar)}rect.x{fill:var(--bad)}rect.g{fill:var(--good)}rect.s{fill:var(--soft)}rect.l{fill:var(--line)}
a:hover rect.b{fill:var(--ink)}rect.h{fill:transparent}
details{margin:0 0 8px}
summary{padding:12px 16px;cursor:pointer;display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline}
summary b{flex:1 1 200px;overflow-wrap:anywhere}
summary::before{content:"+";color:var(--soft);width:10px;margin-right:-6px}details[open]>summary::before{content:"\\2212"}
summary::-webkit-details-marker{display:none}
summary span{color:var(--soft);font-size:14px}summary span.num{min-width:80px;text-align:right}
summary .word{font-size:15px;min-width:88px;text-align:right}
summary .good{color:var(--good)}summary .bad{color:var(--bad)}
.about{padding:0 16px 10px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;font-size:14px}
th{font-size:12px;font-weight:500;color:var(--soft);text-align:left;white-space:nowrap}
th,td{padding:7px 8px;border-top:1px solid var(--line);vertical-align:baseline}
th:first-child,td:first-child{padding-left:16px}th:last-child,td:last-child{padding-right:16px}
.r{text-align:right;white-space:nowrap}td:first-child{overflow-wrap:anywhere}
.note td{border-top:0;padding-top:0;font-size:13px}
footer{margin-top:40px;font-size:13px;color:var(--soft)}
@media(max-width:700px){
main{padding:20px 16px 32px}h1{font-size:25px}
.tiles{grid-template-columns:1fr 1fr}.tiles dd{font-size:19px}.charts{grid-template-columns:1fr}
summary{column-gap:12px}summary b{flex-basis:calc(100% - 20px)}summary span.num,summary .word{min-width:0;
text-align:left}.vms small{display:none}.runs td,.runs th{font-size:13px;padding-left:4px;padding-right:4px}
.vms,.vms tbody,.vms tr,.vms td{display:block}.vms thead{display:none}
.vms tr{display:grid;grid-template-columns:minmax(0,11fr) minmax(0,10fr);padding:10px 16px;
border-top:1px solid var(--line);gap:2px 16px}
.vms td{border:0;padding:0!important;text-align:left;display:flex;justify-content:space-between;gap:8px}
.vms td:nth-child(n+3){font-size:13px}.vms td:nth-child(2){justify-content:flex-end}
.vms td:nth-child(n+3)::before{color:var(--soft)}.vms td:empty{display:none}
.vms td:nth-child(3)::before{content:"Level"}.vms td:nth-child(4)::before{content:"Size"}
.vms td:nth-child(5)::before{content:"Time"}.vms td:nth-child(6)::before{content:"Rate"}
.vms td:nth-child(7)::before{content:"Consistency"}.vms td:nth-child(8)::before{content:"Chain"}
.vms td:nth-child(9)::before{content:"Verified"}
.vms tr.note{display:block;border:0;padding-top:0}.vms .note td{display:block}
.runs td:nth-child(2),.runs th:nth-child(2){display:none}}
@media print{body{background:#fff}details,.card,.tiles{break-inside:avoid}}
"""


def page(report: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The page. C(runs) are the last ones with this one, oldest first."""
    parts = [_head(report), _failures(report), _charts(runs, report["id"]), _hypervisors(report), _foot(report)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a name ever slip through, it still cannot run or fetch anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>Backup {text(report['id'])}: {text(_verdict(report['summary'])[0])}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Anything at all, as characters of the page that mean nothing but themselves."""
    # Control characters are no HTML, and half a surrogate pair is no UTF-8.
    return escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)), quote=True)


def span(seconds: float) -> str:
    """C(3 min 05 s)"""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def moment(when: str) -> str:
    return "<time>{}</time>".format(parse_time(when).strftime("%Y-%m-%d %H:%M UTC")) if when else ""


def rate(size: int, seconds: float) -> str:
    return f"{human(int(size / seconds))}/s" if size and seconds else ""


def counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _word(kind: str, said: str) -> str:
    return f'<span class="word {kind}">{said}</span>'


def _verdict(summary: Mapping[str, Any]) -> tuple[str, str]:
    """What there is to know if one reads nothing else, and its colour."""
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
        f'<h1>{text(report["id"])}</h1>\n<p class="verdict">{_word(kind, text(said))}</p>\n'
        f'<p class="soft">{begun} {moment(report["written"])}.'
        + (f" {counted(already, 'set was', 'sets were')} there before this run." if already else "")
        + f'</p>\n{_share(summary)}</header>\n<dl class="tiles">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
        + "</dl>\n"
    )


def _of(part: int, whole: int) -> str:
    return f"{part} <small>of {whole}</small>"


def _of_unit(said: str) -> str:
    """Numbers large, their units small."""
    return re.sub(r"[A-Za-z/]+", r"<small>\g<0></small>", said)


def _share(summary: Mapping[str, Any]) -> str:
    """The VMs as one bar, by what has become of them."""
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
            # One among thousands is still seen.
            width = max(100 * number / summary["vms"], 0.6)
            drawn.append(f'<rect class="{kind}" x="{left:.2f}" width="{width:.2f}" height="8"/>')
            left += width
    return (
        f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>\n'
    )


def _failures(report: Mapping[str, Any]) -> str:
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
        f'<li data-kind="{kind}"><b class="name">{text(name)}</b>{where} {_word("bad", word)}'
        f"<p>{text(error)}</p>{after}</li>"
    )


def _charts(runs: Sequence[Run], this: str) -> str:
    shown = runs[-BARS:]
    if len(shown) < 2:
        return ""
    table = "".join(
        f'<tr><td><a href="{text(run.id)}.html">{text(run.id)}</a></td><td>{moment(run.began)}</td>'
        f'<td class="r">{run.vms}</td><td class="r">{_word("bad", str(run.bad)) if run.bad else 0}</td>'
        f'<td class="r">{span(run.seconds)}</td><td class="r">{human(run.bytes)}</td></tr>'
        for run in reversed(shown)
    )
    return (
        f'<h2>The last {len(shown)} runs</h2>\n<div class="charts">'
        + _chart("Copying time", shown, lambda run: run.seconds, lambda run: span(run.seconds), this)
        + _chart("Size of the sets", shown, lambda run: run.bytes, lambda run: human(run.bytes), this)
        + "</div>\n"
        + (
            '<p class="soft" style="margin-top:8px">A red foot: something failed in that run.</p>\n'
            if any(run.bad for run in shown)
            else ""
        )
        + '<details style="margin-top:12px"><summary><b>In numbers</b></summary><table class="runs"><thead><tr><th>Run'
        '</th><th>Begun</th><th class="r">VMs</th><th class="r">Failed</th><th class="r">Copying</th><th class="r">Size'
        f"</th></tr></thead><tbody>{table}</tbody></table></details>\n"
    )


def _chart(
    title: str, runs: Sequence[Run], value: Callable[[Run], float], said: Callable[[Run], str], this: str
) -> str:
    most = max(runs, key=value)
    highest = value(most) or 1
    # A few bars are no walls.
    width = max(len(runs), 14)
    bars = []
    for number, run in enumerate(runs):
        height = max(100 * value(run) / highest, 1)
        x = 10 * (width - len(runs) + number)
        foot = f'<rect class="x" x="{x + 1.5}" y="106" width="7" height="6"/>' if run.bad else ""
        failed = f", {run.bad} failed" if run.bad else ""
        bars.append(
            f'<a href="{text(run.id)}.html"><title>{text(run.id)}: {said(run)}{failed}</title>'
            f'<rect class="h" x="{x}" y="0" width="10" height="112"/>'
            f'<rect class="b" x="{x + 1.5}" y="{103 - height:.1f}" width="7" height="{height:.1f}"/>{foot}</a>'
        )
    now = next((said(run) for run in runs if run.id == this), "")
    return (
        f'<figure class="card"><figcaption>{title}: {now}<span>at most {said(most)}</span></figcaption>'
        f'<svg viewBox="0 0 {10 * width} 112" preserveAspectRatio="none" role="img" aria-label="{title} of'
        f' {counted(len(runs), "run")}, in numbers below">{"".join(bars)}</svg>'
        f'<div class="ends"><span>{text(runs[0].id)}</span><span>{text(runs[-1].id)}</span>'
        "</div></figure>"
    )


def _hypervisors(report: Mapping[str, Any]) -> str:
    few = sum(len(host["vms"]) for host in report["hypervisors"]) <= FEW
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
        f"<summary><b>{text(host['name'])}</b>{numbers}{_standing(host, vms)}</summary>"
        f'<p class="about">{", ".join(about) or "nothing is known of its VMs"}</p>'
        + (_table(vms) if vms else "")
        + "</details>\n"
    )


def _standing(host: Mapping[str, Any], vms: Sequence[Mapping[str, Any]]) -> str:
    """A hypervisor in a word."""
    bad = sum(vm["state"] in BAD for vm in vms)
    if host["state"] == HypervisorState.UNREACHED:
        return _word("bad", "No result")
    if host["state"] == HypervisorState.WAITING:
        return _word("warn", "Still to come")
    if bad:
        return _word("bad", f"{bad} failed")
    if host["error"]:
        return _word("bad", "Incomplete")
    if _is_bad(host):
        return _word("bad", "Damaged")
    return _word("good", "Good") if vms else _word("warn", "No VMs")


def _table(vms: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(vms, key=lambda vm: (vm["state"] not in BAD, not vm["damage"], vm["name"]))
    return (
        '<table class="vms"><thead><tr><th>VM</th><th>Set</th><th>Level</th><th class="r">Size</th><th class="r">Time'
        '</th><th class="r">Rate</th><th>Consistency</th><th class="r">Chain</th><th>Verified</th></tr></thead><tbody>'
        + "".join(line for vm in ordered for line in _rows(vm))
        + "</tbody></table>"
    )


def _rows(vm: Mapping[str, Any]) -> Iterator[str]:
    found = vm["set"] or {}
    words = {
        VmState.PUBLISHED: ("good", "Published" if vm["changed"] else "Was there"),
        VmState.FAILED: ("bad", "Failed"),
        VmState.CANCELLED: ("bad", "Cancelled"),
    }
    damaged = vm["damage"] and vm["state"] not in BAD
    kind, word = ("bad", "Damaged") if damaged else words.get(vm["state"], ("warn", vm["state"].capitalize()))
    frozen = f"<small>, {vm['frozen_ms']} ms</small>" if found and vm["frozen_ms"] else ""
    cells = [
        f"<td><b>{text(vm['name'])}</b></td>",
        f"<td>{_word(kind, word)}</td>",
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
