# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether what a set is pinned for is still there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._host.process import machine_id

if TYPE_CHECKING:
    from .annotations import Pin


PARTIAL = ".partial"
"""What the name of a restored disk ends with until it is complete."""


def is_read(pin: Pin) -> bool:
    """Return whether what a pin stands for is still there. Only the machine that it is on can say that it is gone."""
    return pin.machine_id != machine_id() or any(may_be_there(pin.path + end) for end in ("", PARTIAL))


def may_be_there(path: str) -> bool:
    """Return False only where there is certainly nothing. A path that this user may not look up may be there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
