# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask libvirt, before files get their names, whether a domain relies on what stands there to stay as it is.

No lock tells that: a domain that is off has none, be it saved or not.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, warn_once
from .._qemu.address import LIBVIRT, parse_address
from . import libvirt_host
from .libvirt_host import LibvirtHost
from .owners import refuse_kept

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from .._repository.documents import Manifest


def guard_of(manifest: Manifest, libvirt_uri: str) -> Callable[[Sequence[str]], Awaitable[None]] | None:
    """Return what refuses to restore to such targets; None for a set of a VM that was no domain.

    Where libvirt does not answer, and files are replaced, there is a warning: disks are restored on machines that have
    none, too. It is not asked again then.
    """
    if not manifest.monitor.startswith(LIBVIRT):
        return None
    address = parse_address(manifest.monitor, "libvirt_uri", libvirt_uri)

    silent = ""

    async def guard(targets: Sequence[str]) -> None:
        nonlocal silent
        try:
            if silent:
                raise BackupError(silent)
            domains = await libvirt_host.ask(address, "the look at its domains", LibvirtHost.known_domains)
        except Refused:
            raise
        except BackupError as error:
            silent = str(error)
            if any(map(os.path.lexists, targets)):
                warn_once(
                    "guard", f"nobody knows whether a domain relies on the files that are replaced: libvirt: {error}"
                )
            return
        await refuse_kept(domains, targets)

    return guard
