# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold what the checks of one call share."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._repository.repository import Repository
    from .model import VerifyOptions


@dataclass(frozen=True)
class VerifyRun:
    """One call of the module. An image takes one of the processors while it is read."""

    repository: Repository
    options: VerifyOptions
    warnings: list[str] = field(default_factory=list)
    processors: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(len(os.sched_getaffinity(0))))
    boot_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One throwaway VM at a time: it takes as much memory as the real one."""
