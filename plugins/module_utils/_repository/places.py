# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep what is no part of a repository out of repositories."""

from __future__ import annotations

import os

from .._common.errors import Refused
from .names import REPOSITORY_FILE


def refuse_inside(option: str, path: str) -> None:
    """Refuse a place inside of a repository: what stands there would count as a VM, or go with one."""
    place = os.path.realpath(path)
    while not os.path.lexists(os.path.join(place, REPOSITORY_FILE)):
        above = os.path.dirname(place)
        if above == place:
            return
        place = above
    raise Refused(option, f"{path} is inside of the repository {place}; name a place outside of repositories")
