# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""List the runs of a directory of reports, and lead from one to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .html_charts import table
from .html_text import document, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .run import Run


LIST = "_runs.html"
"""The page of all runs. No id of a run can be like it."""


def runs_page(runs: Sequence[Run], older: Sequence[str]) -> str:
    """Return the page of all runs: C(runs) are the newest, oldest first; C(older) the ids of those before."""
    links = "".join(f'<li><a href="{text(one)}.html">{text(one)}</a></li>' for one in older)
    return document(
        "Backup runs",
        '<header>\n<p class="kicker">Backup of virtual machines</p>\n<h1>Backup runs</h1>\n'
        '<p class="soft">The newest run is at the top.</p></header>\n'
        f'<div class="card list">{table(reversed(runs))}</div>\n'
        + (f'<h2>Older runs</h2>\n<ul class="card older">{links}</ul>\n' if links else ""),
    )


def navigation(runs: Sequence[Run], this: str) -> str:
    """Return links to the runs before and after this one, and to all; nothing where there is no other run."""
    ids = [run.id for run in runs]
    if len(ids) < 2:
        return ""
    place = ids.index(this) if this in ids else len(ids)
    before = ids[place - 1] if place else ""
    after = ids[place + 1] if place + 1 < len(ids) else ""
    return (
        "<nav>"
        + (f'<a href="{text(before)}.html" title="{text(before)}">&larr; Previous run</a>' if before else "")
        + f'<a href="{LIST}">All runs</a>'
        + (f'<a href="{text(after)}.html" title="{text(after)}">Next run &rarr;</a>' if after else "")
        + "</nav>\n"
    )
