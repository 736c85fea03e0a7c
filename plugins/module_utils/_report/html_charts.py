# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Draw the last runs as charts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.formats import counted, human
from .html_text import label, moment, span, text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .run import Run


BARS = 30
"""How many runs the charts show."""


def charts(runs: Sequence[Run], this: str) -> str:
    """Return the charts of the last runs, and their numbers; nothing for one run. C(this) is the id of the report."""
    shown = runs[-BARS:]
    if len(shown) < 2:
        return ""
    table = "".join(
        f'<tr><td><a href="{text(run.id)}.html">{text(run.id)}</a></td><td>{moment(run.began)}</td>'
        f'<td class="r">{run.vms}</td><td class="r">{label("bad", str(run.bad)) if run.bad else 0}</td>'
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
    """Return one bar for each run."""
    most = max(runs, key=value)
    highest = value(most) or 1
    # A few bars do not become wide.
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
