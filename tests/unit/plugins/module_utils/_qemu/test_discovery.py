# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which monitors the options of a module stand for."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address, FoundBy, parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.discovery import Discovery, discover, find_domains
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_list import DomainEntry

if TYPE_CHECKING:
    from pathlib import Path

URI = "qemu:///system"
NAMES = ("db", "web 01", "web02", "web[1]")


@pytest.mark.parametrize(
    ("patterns", "excluded", "chosen", "warnings"),
    [
        (["*"], [], ["db", "web 01", "web02", "web[1]"], []),
        (["web*"], ["*02"], ["web 01", "web[1]"], []),
        # A name is itself, whatever signs it has.
        (["web[1]"], [], ["web[1]"], []),
        (["web[9]*"], [], [], ["domains: no domain matches web[9]*"]),
        (["WEB*", "db"], [], ["db"], ["domains: no domain matches WEB*"]),
        # One that should be there.
        (["mail", "db"], [], ["mail", "db"], []),
        (["db"], ["db", "mail", "m*"], [], [f"exclude_domains: no domain matches {name}" for name in ("mail", "m*")]),
    ],
)
def test_patterns_of_domains(patterns: list[str], excluded: list[str], chosen: list[str], warnings: list[str]) -> None:
    found = Discovery(domains={Address(domain=name, uri=URI): DomainEntry(name) for name in NAMES})
    addresses = list(find_domains(found, patterns, excluded, URI))
    assert addresses == [Address(domain=name, uri=URI) for name in chosen]
    assert found.warnings == warnings


def find(*listed: str, sockets: tuple[str, ...]) -> Discovery:
    options = {"sockets": sockets, "domains": None, "exclude_domains": None, "libvirt_uri": ""}
    return asyncio.run(discover([parse_address(text) for text in listed], options))


def test_sockets(tmp_path: Path) -> None:
    (tmp_path / "b.qmp").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a.qmp"))
        found = find(
            f"{tmp_path}/c.qmp", sockets=(f"{tmp_path}/*.qmp", "/nowhere/*.qmp", f"{tmp_path}/c.qmp", "/d.qmp")
        )
    # A path that is spelled out is meant; and what is listed is listed.
    assert {str(address): way for address, way in found.ways.items()} == {
        f"unix:{tmp_path}/c.qmp": FoundBy.LISTED,
        f"unix:{tmp_path}/a.qmp": FoundBy.SOCKET,
        "unix:/d.qmp": FoundBy.SOCKET,
    }
    assert found.warnings == ["no socket matches /nowhere/*.qmp"]
    with pytest.raises(Refused, match="sockets: 'a' is not an absolute path"):
        find(sockets=("a",))
