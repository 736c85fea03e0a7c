# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The guest agent's channel is found, whatever it is called and wherever it is plugged in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.agent_channel import find_agent
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor, refusal

CHARDEVS = [
    {"frontend-open": False, "filename": "disconnected:unix:/run/web01.qga,server=on", "label": "qga0"},
    {"frontend-open": True, "filename": "unix:/run/db01.qga,server=on", "label": "qga1"},
    {"frontend-open": True, "filename": "pty:/dev/pts/3", "label": "pty0"},
]


def port(name: str, chardev: str) -> dict[str, str]:
    return {"name": name, "chardev": chardev}


def look(peripheral: Any, anonymous: Any, chardevs: Any = None) -> dict[str, Any] | None:
    """Find the agent of a VM with these ports; one without properties is another device, None no container."""
    containers = {"/machine/peripheral": peripheral, "/machine/peripheral-anon": anonymous}
    found = {f"{path}/{name}": port for path, ports in containers.items() for name, port in (ports or {}).items()}

    def entries(arguments: dict[str, Any]) -> list[dict[str, str]]:
        ports = containers[arguments["path"]]
        if ports is None:
            raise refusal("Path not found", "qom-list")
        kinds = {name: "virtserialport" if port else "virtio-serial-pci" for name, port in ports.items()}
        return [{"name": "type", "type": "string"}] + [
            {"name": name, "type": f"child<{kind}>"} for name, kind in kinds.items()
        ]

    fake = FakeMonitor(
        {
            "qom-list": entries,
            "qom-get": lambda arguments: found[arguments["path"]][arguments["property"]],
            "query-chardev": CHARDEVS if chardevs is None else chardevs,
        }
    )
    return asyncio.run(find_agent(monitor(fake)))


AGENT = "org.qemu.guest_agent.0"
SPICE = {"spice": port("com.redhat.spice.0", "pty0"), "serial": {}}


@pytest.mark.parametrize(
    ("peripheral", "anonymous", "expected"),
    [
        ({"ga": port(AGENT, "qga0")}, {}, ("/run/web01.qga", False)),
        ({"ga": port(AGENT, "qga1")}, {}, ("/run/db01.qga", True)),
        (SPICE, {"device[1]": port(AGENT, "qga1")}, ("/run/db01.qga", True)),
        (None, {"device[1]": port(AGENT, "qga1")}, ("/run/db01.qga", True)),
        ({"ga": port(AGENT, "pty0")}, {}, ("", True)),
        ({"ga": port(AGENT, "gone")}, {}, ("", False)),
    ],
    ids=["not connected", "connected", "port without id", "no ports with ids", "no socket", "no such chardev"],
)
def test_channel_is_found(peripheral: Any, anonymous: Any, expected: tuple[str, bool]) -> None:
    assert look(peripheral, anonymous) == dict(zip(("socket", "connected"), expected, strict=True))


@pytest.mark.parametrize(
    ("peripheral", "anonymous"), [(SPICE, {}), (None, None)], ids=["other ports", "no devices at all"]
)
def test_vm_without_channel(peripheral: Any, anonymous: Any) -> None:
    assert look(peripheral, anonymous, AssertionError("nobody needs to know")) is None
