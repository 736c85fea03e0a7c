# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make names of VMs, sets and disks safe for the file system: none leads out of a repository, nor others into it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from typing import TYPE_CHECKING

from .._common.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable


ID_PATTERN = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""The id of a set. The names of VMs are plain that look like one."""
PLAIN = re.compile(ID_PATTERN)
DISK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
REPOSITORY_FILE = "vmfleet.json"
"""It stands where the VMs' directories stand."""


def check_set_id(text: str, option: str = "id") -> str:
    """Return the id of a set. Refused where it cannot be the name of a directory on every file system."""
    if not PLAIN.fullmatch(text):
        raise Refused(
            option,
            f"{text!r} is no id of a set: 1 to 64 letters, digits, '.', '_', '-', the first a letter or digit, no '..'",
        )
    return text


def refuse_inside(option: str, path: str) -> None:
    """Refuse a place inside of a repository: what stands there would count as a VM, or go with one."""
    place = os.path.realpath(path)
    while not os.path.lexists(os.path.join(place, REPOSITORY_FILE)):
        above = os.path.dirname(place)
        if above == place:
            return
        place = above
    raise Refused(option, f"{path} is inside of the repository {place}; name a place outside of repositories")


COLUMN = 32
"""The most that a column of names takes: a longer one moves what follows it in its own line, and in no other."""


def column(names: Iterable[str]) -> int:
    """Return the width of the column of these names, where text is printed for people."""
    return min(max(map(len, names), default=0), COLUMN)


@functools.lru_cache(maxsize=1024)
def vm_directory(name: str) -> str:
    """Return the name of a VM's directory: the VM's own where that is safe."""
    if PLAIN.fullmatch(name) and name.casefold() != REPOSITORY_FILE:
        return name
    return _marked(name)


def image_files(names: Iterable[str], suffix: str) -> dict[str, str]:
    """Return the image file of each disk of a VM. No two are the same, even on file systems that ignore case."""
    plain = {name: name if DISK_NAME.match(name) else _marked(name) for name in names}
    folded = [stem.casefold() for stem in plain.values()]
    return {
        name: (stem if folded.count(stem.casefold()) == 1 else f"{stem}-{mark(name)}") + suffix
        for name, stem in plain.items()
    }


def _marked(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", name).lstrip("_-")[:48]
    return "{}-{}".format(cleaned or "x", mark(name))


def mark(name: str) -> str:
    """Return a few digits that tell a name from others."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
