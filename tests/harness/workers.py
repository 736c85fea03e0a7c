# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""End workers without cancelling their sets."""

from __future__ import annotations

import asyncio
import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import worker_end

if t.TYPE_CHECKING:
    from pathlib import Path


def end_worker(repository: Path) -> None:
    """End the worker of the repository at this path, where there is one, as a cancellation does. Copies go on."""

    async def end() -> None:
        worker = await worker_end.find(str(repository))
        if worker:
            await worker_end.end(worker.who, worker.place, str(repository))

    asyncio.run(end())
