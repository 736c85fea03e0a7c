# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Refuse what an option of a module cannot mean, before anything is done.

Ansible has seen to it that a value is of its type. What it lets pass are texts that name nothing, paths that depend on
where the module runs, and numbers beyond all measure.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from .errors import Refused
from .formats import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


RATE = (0, (1 << 63) - 1, "bytes per second; 0 sets no limit")
COUNT = (0, 1_000_000, "sets; 0 is no rule")
LIMITS: dict[str, tuple[float, float, str]] = {
    "speed": RATE,
    "bandwidth": RATE,
    "max_vms": (0, 1_000_000, "VMs; 0 sets no limit"),
    "max_chain": (1, 1_000_000, "images; 1 is a full image on its own"),
    "slice": (0, 30 * 86400, "seconds; 0 waits for the end"),
    "nice": (0, 19, "as nice(1) takes it; 0 changes nothing"),
    "cpu_weight": (1, 10_000, "as systemd takes it; leave the option out to change nothing"),
    "wait": (0, 30 * 86400, "seconds"),
    "boot_timeout": (1, 7 * 86400, "seconds"),
    **{f"keep_{each}": COUNT for each in ("last", "hourly", "daily", "weekly", "monthly", "yearly")},
}
"""The least and the most that a number may be, and what it counts, by the name of the option."""
NEEDED = {
    "names": "leave the option out where all VMs are meant",
    "disks": "name at least one disk, or leave the option out",
    "drives": "name at least one drive",
}
"""Lists that are left out where nothing is asked for: an empty one is a mistake in a playbook, most often."""
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
_OF_URI = r"(socket=/[^&;#\s\0-\x1f\x7f-\x9f]+|mode=(auto|direct|legacy))"
LIBVIRT_URI = rf"qemu(\+unix)?:///(system|session)(\?{_OF_URI}([&;]{_OF_URI})*)?"
"""The libvirts of this machine, of all that libvirt can connect to."""
OF_SETS = frozenset({"vm", "names"})
"""Options with names of VMs that have sets. QEMU takes any, and so its sets have to be found by any."""
LONGEST_PATH, LONGEST_NAME = 4095, 255
"""Bytes of a path, and of each name in it (PATH_MAX and NAME_MAX of Linux)."""


def check_options(spec: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Raise Refused for the first option that cannot be meant. C(spec) is the module's argument spec."""
    for name, option in spec.items():
        value = params.get(name)
        if value is not None:
            _check(name, option, value)


def check_path(option: str, path: str) -> str:
    """Return an absolute path that the kernel can take. Refused where it is none."""
    if not path.startswith("/"):
        raise Refused(option, f"{path!r} is not an absolute path")
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise Refused(option, f"{path[:60]!r}... is too long for a path, or a name in it is ({longest} bytes)")
    return path


def check_text(option: str, text: str) -> str:
    """Return a text that can name something. Refused where it is empty, or has characters that no name has."""
    if not text:
        raise Refused(option, "it is empty; give a value, or leave the option out")
    if CONTROL.search(text) and (option not in OF_SETS or "\0" in text):
        raise Refused(option, f"{text!r} has control characters")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise Refused(option, f"{text!r} has a half of a character") from None
    return text


def check_libvirt_uri(option: str, uri: str) -> str:
    """Return how libvirt is connected to. Refused where that is not the one of this machine."""
    if not re.fullmatch(LIBVIRT_URI, uri):
        # Without a user, and without a password.
        shown = re.sub("//[^/]*@", "//", uri)
        raise Refused(
            option,
            f"{shown!r} is no libvirt of this machine; give qemu:///system, qemu:///session, or either with a socket,"
            " as qemu+unix:///session?socket=/PATH. To back up domains of another machine, run the backup on that"
            " machine: a QEMU there cannot use files that are open here",
        )
    return uri


def duration(option: str, text: str) -> float:
    """Return the seconds of an option that is a time, such as C(90), C(10m) or C(1.5h). Refused where it is none."""
    try:
        return seconds(text)
    except ValueError as error:
        raise Refused(option, f"{error}; 0 waits without limit") from None


def _check(name: str, option: Mapping[str, Any], value: Any) -> None:
    kind = option.get("type", "str")
    if name in LIMITS:
        least, most, what = LIMITS[name]
        # Not a number (nan) is not within any limits, either.
        if not least <= value <= most:
            raise Refused(name, f"{value} is not from {least} to {most} {what}")
    elif kind == "list":
        if not value and name in NEEDED:
            raise Refused(name, f"the list is empty; {NEEDED[name]}")
        for each in value:
            _check(name, {**option, "type": option.get("elements", "raw")}, each)
    elif kind == "dict":
        check_options(option.get("options", {}), value)
    elif kind in ("str", "path") and name != "boot_pattern":
        check_text(name, value)
        if name == "libvirt_uri":
            check_libvirt_uri(name, value)
        if kind == "path":
            check_path(name, value)
