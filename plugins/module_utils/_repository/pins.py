# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether what a set is pinned for is still there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._host.mounts import Place, mount_of, place_of
from .._host.process import machine_id
from .._host.threads import wait_within

if TYPE_CHECKING:
    from .annotations import Pin


PARTIAL = ".partial"
"""What the name of a restored disk ends with until it is complete."""
TIMEOUT = 10.0
"""Seconds for one look at an overlay. It takes far less than a millisecond, unless its file system hangs."""
_hanging: set[str] = set()
"""Where looks have hung. A process that looks at pins soon ends, and many pins may be of one place."""


def is_read(pin: Pin) -> bool:
    """Return whether what a pin stands for may be there still."""
    return bool(reader(pin))


def reader(pin: Pin) -> str:
    """Return who reads a set, as its pin says; empty where that is gone.

    Only the machine that it is on can say that, and only where its file system is mounted: a VM may go on with the
    overlay when that is back. One that hangs says nothing.
    """
    reads = f"{pin.path} on {pin.host} reads it"
    if pin.machine_id != machine_id():
        return reads
    place = pin.mount or os.path.dirname(pin.path)
    try:
        if place not in _hanging:
            return wait_within(TIMEOUT, _reader_here, pin, reads)
    except TimeoutError:
        _hanging.add(place)
    return f"{reads}, or did: the file system that it is on does not answer. Bring that back, or unmount it"


def _reader_here(pin: Pin, reads: str) -> str:
    """Return what reader() does of a pin of this machine."""
    if any(may_be_there(pin.path + end) for end in ("", PARTIAL)):
        return reads
    if not pin.mount:
        return ""
    remedy = "or remove the overlay's pin with state: absent if it is gone for good"
    # The path may have led there through a link that is gone: its own place is not what counts.
    if place_of(os.path.join(pin.mount, "overlay")) != Place(pin.mount, pin.file_system):
        return f"{reads}, or did: the file system that it is on is not mounted at {pin.mount}. Mount it, {remedy}"
    over = mount_of(pin.path)
    if over != pin.mount and over.startswith(os.path.join(pin.mount, "")):
        return f"{reads}, or did: what is mounted at {over} may hide it. Unmount that, {remedy}"
    return ""


def is_elsewhere(pin: Pin) -> bool:
    """Return whether the path of a pin is on another file system now than its overlay, which it does not replace."""
    return bool(pin.mount) and place_of(pin.path) != Place(pin.mount, pin.file_system)


def may_be_there(path: str) -> bool:
    """Return False only where there is certainly nothing. A path that this user may not look up may be there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
