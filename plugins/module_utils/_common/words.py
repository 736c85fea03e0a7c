# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the words of a closed list in one place."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


class Word(str, Enum):
    """A word of a closed list. It stands in documents, results and messages as its value."""

    @classmethod
    def read(cls, text: Any) -> Any:
        """Return the word that a document says; what is none, as from a later release, is returned as it is."""
        try:
            return cls(text)
        except ValueError:
            return text

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


def read_words(found: dict[str, Any], **words: type[Word]) -> None:
    """Replace the words of closed lists in what was read by their members."""
    for name, kind in words.items():
        if name in found:
            found[name] = kind.read(found[name])
