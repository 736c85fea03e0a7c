# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Choose among VMs by their names."""

from __future__ import annotations

import fnmatch
import glob
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern stands for. A name may have the signs of a pattern in it."""
    return [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]


def is_among(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the patterns stands for a name."""
    return any(matching(pattern, (name,)) for pattern in patterns)


def selection_argument_spec() -> dict[str, Any]:
    """Return the options that choose VMs. Their documentation is in C(doc_fragments/selection.py)."""
    names = {"type": "list", "elements": "str"}
    return {"names": names, "exclude_names": names}


@dataclass(frozen=True)
class Selection:
    """Which VMs are meant, by patterns of their names. All of them where C(names) is None."""

    names: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()

    @classmethod
    def of(cls, params: dict[str, Any]) -> Selection:
        """Return what the options names and exclude_names of a module say."""
        names = params["names"]
        return cls(None if names is None else tuple(names), tuple(params["exclude_names"] or ()))

    def takes(self, name: str) -> bool:
        """Tell whether a VM is meant."""
        return (self.names is None or is_among(name, self.names)) and not is_among(name, self.excluded)

    def unknown(self, known: Sequence[str]) -> list[str]:
        """Return the names and patterns that stand for none of these VMs."""
        return [pattern for pattern in dict.fromkeys(self.names or ()) if not matching(pattern, known)]

    def spelled_out(self, known: Callable[[], Sequence[str]]) -> list[str]:
        """Return the names that are meant. A pattern stays as it is if it stands for none of the VMs in C(known)."""
        if self.names is None:
            return [name for name in known() if self.takes(name)]
        names = dict.fromkeys(
            name
            for pattern in self.names
            for name in (glob.has_magic(pattern) and matching(pattern, known())) or (pattern,)
        )
        return [name for name in names if not is_among(name, self.excluded)]


EVERYTHING = Selection()
