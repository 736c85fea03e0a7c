# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lay out the lines of a table or a report for a terminal."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BAD = re.compile(r"(?:failed|cancelled|fail|FAILED|NOT GOOD|!)(?= |\Z)")
"""What a line begins with that tells of a failure."""
WARNING = re.compile(r"Warning: ")
UNIT = re.compile(r"(\d) (?=(?:B|Bytes|[KMGT]iB|ms|s|min|h|d|%)(?![\w]))")
"""The blank between a number and its unit: no line ends there."""
LEAST = 24
"""Characters that the last column of a line keeps, however narrow the terminal is."""


class Line(NamedTuple):
    """A line as it is shown. C(tone) is C(bad), C(warning) or empty."""

    text: str
    tone: str = ""


def lay_out(lines: Iterable[str], width: int) -> Iterator[Line]:
    """Yield the lines, none longer than C(width) characters; 0 leaves them as they are.

    What does not fit goes on below the last column of its line; whole columns go on below the second one where the last
    one would be too narrow. A line that begins with a blank belongs to the one before, and has its tone.
    """
    tone = ""
    for line in lines:
        if not line.startswith(" "):
            tone = "bad" if BAD.match(line) else "warning" if WARNING.match(line) else ""
        for part in _wrap(line, width):
            yield Line(part, tone)


def _wrap(line: str, width: int) -> list[str]:
    if not width or len(line) <= width:
        return [line]
    column = max([match.end() for match in re.finditer(r"^ +| {2,}", line)], default=4)
    gaps = list(re.finditer(r"(?<=\S) {2,}", line))
    last = max((gap for gap in gaps if gap.start() <= width), key=re.Match.start, default=None)
    if last and column > width - LEAST:
        head, tail = line[: last.start()], re.sub(" {2,}", "  ", line[last.end() :])
        indent = min(gaps[0].end(), max(width - LEAST, 0))
        return [head, *_fill(tail, width, indent)]
    # Only what is in the last column may be broken: the blanks before it make up the table.
    indent = min(column, max(width - LEAST, 0))
    found = _fill(line[indent:], width, indent)
    return [line[:indent] + found[0][indent:], *found[1:]] if found else [line.rstrip()]


def _fill(text: str, width: int, indent: int) -> list[str]:
    """Return lines of words, below a column."""
    found = textwrap.wrap(UNIT.sub("\\1\u00a0", text), width - indent, break_on_hyphens=False, break_long_words=False)
    return [" " * indent + line.replace("\u00a0", " ") for line in found]
