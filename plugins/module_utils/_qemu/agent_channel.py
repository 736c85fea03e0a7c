# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the channel of a guest agent in QEMU's object tree.

Reference: QEMU 7.2, docs/interop/qemu-ga.rst; virtio-serial port org.qemu.guest_agent.0.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .._common.errors import CommandError

if TYPE_CHECKING:
    from typing import Any

    from .monitor import Monitor


PORT_NAME = "org.qemu.guest_agent.0"
PORT_TYPE = "child<virtserialport>"


async def find_agent(monitor: Monitor) -> dict[str, Any] | None:
    """Return the agent channel's C(socket), and whether an agent has it open; None where there is no channel.

    It is a path, or the address of the domain where libvirt holds it.
    """
    return await monitor.within(_find_agent(monitor))


async def _find_agent(monitor: Monitor) -> dict[str, Any] | None:
    for path in await _ports(monitor):
        name, chardev = await asyncio.gather(
            monitor.execute("qom-get", {"path": path, "property": "name"}),
            monitor.execute("qom-get", {"path": path, "property": "chardev"}),
        )
        if name == PORT_NAME:
            chardevs = {entry["label"]: entry for entry in await monitor.execute("query-chardev")}
            channel = chardevs.get(chardev, {"filename": "", "frontend-open": False})
            place = str(monitor.address) if monitor.address.domain else _socket_path(channel["filename"])
            return {"socket": place, "connected": channel["frontend-open"]}
    return None


async def _ports(monitor: Monitor) -> list[str]:
    found = []
    for container in ("/machine/peripheral", "/machine/peripheral-anon"):
        try:
            entries = await monitor.execute("qom-list", {"path": container})
        except CommandError:
            # A machine without devices has no such container.
            continue
        found += ["{}/{}".format(container, entry["name"]) for entry in entries if entry["type"] == PORT_TYPE]
    return found


def _socket_path(filename: str) -> str:
    """Return C(/run/web01.qga) of C(unix:/run/web01.qga,server=on) or C(disconnected:unix:...)."""
    return filename.partition("unix:")[2].partition(",")[0]
