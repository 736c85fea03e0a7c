# SPDX-License-Identifier: GPL-3.0-or-later

"""Make texts of guests, monitors and documents fit to be shown: they hide nothing, and steer no terminal or page.

What automation compares, such as a name, stays as it is; what people read passes here: errors where they are raised,
results, warnings, pages and metrics where they leave.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


ODD = re.compile(
    # Control characters; what turns the direction of writing; other ends of lines; what has no width; what is no text.
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
IN_LINES = frozenset({"msg", "headline", "diff", "warnings"})
"""Members of a result that may have several lines."""
FOR_PEOPLE = frozenset(
    {"text", "error", "errors", "reason", "broken", "what", "damage", "consistency_reason", "console"}
)
"""Members of a result that people read, each text of which is one line."""


def printable(text: str) -> str:
    r"""Return a text as one line in which all characters can be seen: others become escapes, such as C(\x1b)."""
    return ODD.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """Return a text of several lines in which all characters can be seen."""
    return "\n".join(map(printable, text.split("\n")))


MADE = {**dict.fromkeys(FOR_PEOPLE, printable), **dict.fromkeys(IN_LINES, printable_lines)}
NESTED = (dict, list, tuple)


def printable_result(found: Any) -> Any:
    """Return the result of a module with what people read in it made printable."""
    if isinstance(found, dict):
        # Of thousands of sets, nearly all members stay as they are: a call for each takes longer than to read the sets.
        changed = {
            name: _texts(value, MADE[name]) if name in MADE else printable_result(value)
            for name, value in found.items()
            if value and (name in MADE or isinstance(value, NESTED))
        }
        return {**found, **changed} if changed else found
    return [printable_result(one) if isinstance(one, NESTED) else one for one in found]


def _texts(found: Any, make: Any) -> Any:
    if isinstance(found, str):
        return make(found)
    if isinstance(found, dict):
        return {name: _texts(value, make) for name, value in found.items()}
    return [_texts(one, make) for one in found] if isinstance(found, (list, tuple)) else found
