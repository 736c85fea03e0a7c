# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Draw the last runs as charts, with their numbers in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.formats import counted, human
from .html_text import label, moment, span, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .run import Run


BARS = 30
"""How many runs the charts show."""
NAMED = 3
"""Runs up to which each bar has its id below it."""
SIZES = tuple(steps * 1024**power for power in range(6) for steps in (1, 2, 4, 10, 20, 40, 100, 200, 400))
"""Where the axis of sizes may end, in bytes: half of each is a round number, too."""
MINUTE, HOUR = 60, 3600
SPANS = (
    *(1, 2, 4, 10, 20, 40),
    *(steps * MINUTE for steps in (1, 2, 4, 10, 20, 40)),
    *(steps * HOUR for steps in (1, 2, 4, 8, 12, 24, 48, 96, 192, 400)),
)
"""Where the axis of times may end, in seconds."""


def charts(runs: Sequence[Run], this: str) -> str:
    """Return the charts of the last runs, and their numbers; nothing for one run. C(this) is the id of the report."""
    shown = runs[-BARS:]
    if len(shown) < 2:
        return ""
    drawn = _chart("Copy time", shown, lambda run: run.seconds, span, SPANS, _tick_of_time, this)
    drawn += _chart("Backup size", shown, lambda run: run.bytes, _size, SIZES, _tick_of_size, this)
    marks = ["A line below a bar marks this run."] if any(run.id == this for run in shown) else []
    marks += ["A red bar marks a run with failures."] if any(run.bad for run in shown) else []
    return (
        f"<h2>The last {len(shown)} runs</h2>\n"
        + (f'<div class="charts">{drawn}</div>\n<p class="soft legend">{" ".join(marks)}</p>\n' if drawn else "")
        + f"<details><summary><b>The numbers of these runs</b></summary>{table(reversed(shown))}</details>\n"
    )


def table(runs: Iterable[Run]) -> str:
    """Return the numbers of runs as a table; each id leads to the page of its run."""
    rows = "".join(
        f'<tr><td><a href="{text(run.id)}.html">{text(run.id)}</a></td><td>{moment(run.began)}</td>'
        f'<td class="r">{run.vms}</td><td class="r">{label("bad", str(run.bad)) if run.bad else 0}</td>'
        f'<td class="r">{span(run.seconds) if run.seconds else ""}</td>'
        f'<td class="r">{human(run.bytes) if run.bytes else ""}</td></tr>'
        for run in runs
    )
    return (
        '<table class="runs"><thead><tr><th>Run</th><th>Started</th><th class="r">VMs</th><th class="r">Failed</th>'
        f'<th class="r">Copy time</th><th class="r">Backup size</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _chart(
    title: str,
    runs: Sequence[Run],
    value: Callable[[Run], float],
    said: Callable[[float], str],
    ends: Sequence[int],
    tick: Callable[[float], str],
    this: str,
) -> str:
    """Return one bar for each run, over the whole width; nothing where there is nothing to compare."""
    most = max(map(value, runs))
    if not most:
        return ""
    top = next((end for end in ends if end >= most), most)
    bars = []
    for run in runs:
        kind = ("bad " if run.bad else "") + ("now" if run.id == this else "")
        failed = f", {run.bad} failed" if run.bad else ""
        bars.append(
            f'<a href="{text(run.id)}.html" class="{kind}" title="{text(run.id)}: {said(value(run))}{failed}">'
            f'<i style="height:{100 * value(run) / top:.1f}%"></i></a>'
        )
    now = next((f"<span>this run: {said(value(run))}</span>" for run in runs if run.id == this), "")
    # Only some runs have their ids below the bars: there is no room for thirty.
    ids = [run.id for run in runs]
    named = ids if len(ids) <= NAMED else [ids[0], ids[len(ids) // 2] if len(ids) > 6 else "", ids[-1]]
    return (
        f'<figure class="card"><figcaption>{title}{now}</figcaption>'
        f'<div class="plot"><div class="axis"><span>{tick(top)}</span><span>{tick(top / 2)}</span><span>0</span></div>'
        f'<div class="bars" role="group" aria-label="{title} of {counted(len(runs), "run")}, in numbers below">'
        f'{"".join(bars)}</div></div><div class="ids{"" if named is ids else " some"}">'
        f"{''.join(f'<span>{text(one)}</span>' for one in named)}</div></figure>"
    )


def _tick_of_time(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:g} s"
    return f"{seconds / MINUTE:g} min" if seconds < HOUR else f"{seconds / HOUR:g} h"


def _size(size: float) -> str:
    return human(int(size))


def _tick_of_size(size: float) -> str:
    return _size(size).replace(".0 ", " ")
