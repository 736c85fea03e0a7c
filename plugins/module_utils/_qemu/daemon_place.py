# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell where the storage daemon of a VM that is off belongs, and whether there is one.

This is asked at each look at a VM. All else about such a daemon is in storage_daemon.
"""

from __future__ import annotations

import hashlib
import os

from .._host.lock import lock_directory
from .address import Address

PLACE = "off-"
"""What the names of their directories begin with."""
SOCKET = "qmp"


def place_of(tag: str, name: str) -> str:
    """Return the directory of the storage daemon of one VM and one repository, be it there or not.

    C(tag) is the repository's. Nobody else can write to it, as to the locks beside it.
    """
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(lock_directory(), f"{PLACE}{tag}-{digest[:16]}")


def find(tag: str, name: str) -> Address | None:
    """Return the monitor of the storage daemon of a VM; None where none has been started, or it was ended."""
    address = monitor_in(place_of(tag, name))
    return address if os.path.exists(address.path) else None


def monitor_in(place: str) -> Address:
    """Return the monitor of the storage daemon of a place, be it there or not."""
    return Address(os.path.join(place, SOCKET), daemon=True)
