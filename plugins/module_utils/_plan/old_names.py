# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find what a VM was called before whose first set under its name is planned: there it may have sets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .._repository.vm_names import names_by_identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .._qemu.model import Vm
    from .._repository.access import AsyncRepository
    from .model import Request


class OldNames:
    """The names under which a repository has sets, by whose they are. It is looked through once, and when needed."""

    def __init__(self, repository: AsyncRepository) -> None:
        self._repository = repository
        self._turn = asyncio.Lock()
        self._names: Mapping[str, Sequence[str]] | None = None

    async def warnings(self, vm: Vm, request: Request) -> list[str]:
        """Return what is to be known of a VM that has no set under its name yet."""
        if not vm.uuid:
            # It is known by its name.
            return []
        async with self._turn:
            if self._names is None:
                self._names = await self._repository.run_long(names_by_identity)
        return list(_told(self._names.get(vm.identity, ()), vm, request))


def _told(names: Sequence[str], vm: Vm, request: Request) -> Iterator[str]:
    for name in names:
        if name != request.name:
            yield (
                f"this VM (uuid {vm.uuid}) has older sets under the name {name}, and its sets under this name begin"
                f" with full images. To continue the older sets, list the VM as name: {name}, monitor:"
                f" {request.monitor}. Otherwise remove them when nobody needs them any more"
            )
