# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lay out the lines of a table or a report for a terminal."""

from __future__ import annotations

import re
import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BAD = re.compile(r"(?:failed|cancelled|fail|FAILED|NOT GOOD|!)(?= |\Z)")
"""What a line begins with that tells of a failure."""
WARNING = re.compile(r"Warning: ")
COMMAND = "ansible-playbook "
"""What a line begins with that people copy: the terminal itself wraps it, and copies it as one line."""
GAP = re.compile(r"(?<=\S) {2,}")
"""What is between two columns of a line."""
UNIT = re.compile(r"(\d) (?=(?:B|Bytes|[KMGT]iB|ms|s|min|h|d|%)(?![\w]))")
"""The blank between a number and its unit: no line ends there."""
LEAST = 24
"""Characters that the last column of a line keeps, however narrow the terminal is."""


class Line(NamedTuple):
    """A line as it is shown. C(tone) is C(bad), C(warning) or empty."""

    text: str
    tone: str = ""


def lay_out(lines: Iterable[str], width: int) -> Iterator[Line]:
    """Yield the lines, none but commands longer than C(width) characters; 0 leaves them as they are.

    What does not fit goes on below the last column of its line; whole columns go on below the second one where the last
    one would be too narrow. A line that begins with a blank belongs to the one before, and has its tone.
    """
    lines, tone = list(lines), ""
    for line, cut in zip(lines, _cuts(lines, width)):
        if not line.startswith(" "):
            tone = "bad" if BAD.match(line) else "warning" if WARNING.match(line) else ""
        for part in _wrap(line, width, cut):
            yield Line(part, tone)


def _cuts(lines: Sequence[str], width: int) -> list[int]:
    """Return where each line is cut between two columns, all rows of a table at the same place; 0 where it is not."""
    cuts: list[int] = []
    for fits, rows in groupby(lines, lambda line: not _cut(line, width)):
        table = list(rows)
        least = 0 if fits else min(_cut(line, width) for line in table)
        cuts += [least if line[least - 2 : least] == "  " else _cut(line, width) for line in table]
    return cuts


def _cut(line: str, width: int) -> int:
    """Return where the columns begin that would not leave room for the words of the last one; 0 where all is well."""
    gaps = [match for match in GAP.finditer(line) if match.start() <= width]
    column = max([match.end() for match in re.finditer(r"^ +| {2,}", line)], default=0)
    return gaps[-1].end() if gaps and 0 < width < len(line) and column > width - LEAST else 0


def _wrap(line: str, width: int, cut: int) -> list[str]:
    if not width or len(line) <= width or line.startswith(COMMAND):
        return [line]
    if cut:
        indent = min(next(GAP.finditer(line)).end(), max(width - LEAST, 0))
        return [line[:cut].rstrip(), *_fill(re.sub(" {2,}", "  ", line[cut:]), width, indent)]
    # Only what is in the last column may be broken: the blanks before it make up the table.
    column = max([match.end() for match in re.finditer(r"^ +| {2,}", line)], default=4)
    indent = min(column, max(width - LEAST, 0))
    found = _fill(line[indent:], width, indent)
    return [line[:indent] + found[0][indent:], *found[1:]] if found else [line.rstrip()]


def _fill(text: str, width: int, indent: int) -> list[str]:
    """Return lines of words, below a column."""
    found = textwrap.wrap(UNIT.sub("\\1\u00a0", text), width - indent, break_on_hyphens=False, break_long_words=False)
    return [" " * indent + line.replace("\u00a0", " ") for line in found]
