# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write names, times and sizes as HTML."""

from __future__ import annotations

from html import escape

from .._common.formats import human, parse_time
from .._common.printable import printable


def text(value: object) -> str:
    """Return anything at all as text of the page, never as markup."""
    return escape(printable(str(value)), quote=True)


def span(seconds: float) -> str:
    """Return a length of time such as C(3 min 05 s)."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def moment(when: str) -> str:
    """Return a time as HTML; nothing where there is none."""
    return "<time>{}</time>".format(parse_time(when).strftime("%Y-%m-%d %H:%M UTC")) if when else ""


def rate(size: int, seconds: float) -> str:
    """Return bytes per second; nothing where they mean nothing."""
    return f"{human(int(size / seconds))}/s" if size and seconds else ""


def label(kind: str, html: str) -> str:
    """Return a word in the colour of its kind: good, warn or bad."""
    return f'<span class="word {kind}">{html}</span>'
