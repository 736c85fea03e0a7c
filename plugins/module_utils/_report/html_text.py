# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write names, times, sizes and whole documents as HTML."""

from __future__ import annotations

from html import escape

from .._common.formats import human, parse_time
from .._common.printable import printable
from .html_style import STYLE

LEAST_SIZE, LEAST_TIME = 1 << 20, 1.0
"""Bytes and seconds from which on a rate says something: below, the start of a copy takes most of its time."""


def document(title: str, content: str) -> str:
    """Return a whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a name ever slip through, it still cannot run or fetch anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{content}</main>\n</body>\n</html>\n"
    )


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
    """Return bytes per second; nothing where too little was copied to say how quick that is."""
    return f"{human(int(size / seconds))}/s" if size >= LEAST_SIZE and seconds >= LEAST_TIME else ""


def label(kind: str, html: str) -> str:
    """Return a word in the colour of its kind: good, warn or bad."""
    return f'<span class="word {kind}">{html}</span>'
