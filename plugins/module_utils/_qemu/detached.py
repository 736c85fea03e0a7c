# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Close what libvirt has left open in QEMU of a disk that was detached while it was copied.

libvirt detaches such a disk from the guest, and from its XML. QEMU refuses to close the image because of the job, and
libvirt never tries again: the image would stay open, and locked, for as long as QEMU runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import CommandError
from .domain_disks import abandoned
from .query import inspect_vm

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .model import Vm
    from .monitor import Monitor


async def close_detached(monitor: Monitor, copied: Collection[str]) -> str:
    """Close the images of disks that are not the domain's any more; return why QEMU does not, where that is so.

    C(copied) are the nodes whose jobs have ended. Others are left alone: libvirt may be about to use a node that is in
    no disk of its XML yet.
    """
    if monitor.libvirt is None:
        return ""
    # Only a domain has XML: for others, what reads it need not be loaded, and compiled.
    from .domain import read_domain  # noqa: PLC0415

    if not abandoned(copied, (await read_domain(monitor.libvirt)).xml):
        return ""
    refusal = ""
    for node in _abandoned_nodes(await inspect_vm(monitor), copied):
        try:
            await monitor.execute("blockdev-del", {"node-name": node})
        except CommandError as error:
            refusal = refusal or str(error)
    return refusal


def _abandoned_nodes(vm: Vm, copied: Collection[str]) -> Iterator[str]:
    """Return the nodes of these disks and of all that is below them, in the order in which they can be closed."""
    known = {disk.node: disk for disk in vm.other_nodes}
    gone = abandoned(known, vm.domain.xml) if vm.domain else ()
    for top in (known[node] for node in copied if node in gone):
        for layer in (top.node, *top.layers):
            image, _dash, _kind = layer.rpartition("-")
            yield from (node for node in (f"{image}-format", f"{image}-storage") if node in gone)
