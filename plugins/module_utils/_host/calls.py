# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Call a file system directly; C(io_thread) has the same for one that may hang."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")

    T = TypeVar("T")


class DirectCalls:
    """Calls that are made at once, for callers who do nothing else meanwhile."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function), and return what it returns."""
        return function(*args, **kwargs)

    def close(self, fd: int) -> None:
        """Close a file, which on NFS flushes it, after the calls that were made before."""
        os.close(fd)


AT_ONCE = DirectCalls()
