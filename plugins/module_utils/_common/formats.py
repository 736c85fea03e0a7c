# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Take, write and read times, sizes, and the words of closed lists; name the version of what is written."""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


SCHEMA = 1
COLLECTION_VERSION = "0.1.0"
"""The version in galaxy.yml, which does not travel to the hypervisors."""


def boottime() -> float:
    """Return the seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def utc_now(timespec: str = "seconds") -> str:
    """Return the time as it stands in documents; C(timespec) is how exact it is, as in datetime.isoformat()."""
    return datetime.now(timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """Read a time in ISO 8601, which is UTC without a zone. Raises ValueError where it is none."""
    # Python 3.8 does not read a Z.
    found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def age_of(start: datetime, now: datetime) -> int:
    """Return the seconds since a start. One that is more than a day ahead was written by a clock that was wrong.

    Nobody knows how old that is: by so much that it is not taken for new.
    """
    passed = int((now - start).total_seconds())
    return -passed if passed < -86400 else max(0, passed)


SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST = 3650 * 86400
"""Seconds of the longest time that is meant; 0 is for ever."""


def seconds(text: str) -> float:
    """Return a time such as C(90), C(10m) or C(1.5h) in seconds. Raises ValueError where it is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a number of seconds, nor one with s, m, h or d, such as '10m'")
    found = float(match.group(1)) * SECONDS[match.group(2)]
    if found > LONGEST:
        raise ValueError(f"{text[:40]!r} is longer than ten years")
    return found


def human(size: int) -> str:
    """Return a size for people, such as C(33.6 MiB)."""
    if size < 1024:
        return f"{size} B"
    number = size / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def amount(size: int) -> str:
    """Return a size within a sentence: C(33.6 MiB), or C(0 Bytes)."""
    return human(size) if size else "0 Bytes"


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, in the plural where it is not one: C(1 set), C(2 sets)."""
    return f"{number} {one if number == 1 else many or one + 's'}"


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
