# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Addresses of monitors, in all their forms."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.connection import Address, parse_address


@pytest.mark.parametrize(
    ("text", "address", "canonical"),
    [
        ("unix:/run/web01.qmp", Address(path="/run/web01.qmp"), "unix:/run/web01.qmp"),
        ("/run/web 01:x.qmp", Address(path="/run/web 01:x.qmp"), "unix:/run/web 01:x.qmp"),
        ("tcp:127.0.0.1:4444", Address(host="127.0.0.1", port=4444), "tcp:127.0.0.1:4444"),
        ("tcp:hv.example.org:65535", Address(host="hv.example.org", port=65535), "tcp:hv.example.org:65535"),
        ("tcp:[fe80::1]:1", Address(host="fe80::1", port=1), "tcp:[fe80::1]:1"),
    ],
)
def test_forms(text: str, address: Address, canonical: str) -> None:
    assert parse_address(text) == address
    assert str(address) == canonical
    assert parse_address(canonical) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is neither unix:/PATH"),
        ("web01.qmp", "is neither unix:/PATH"),
        ("unix:web01.qmp", "is neither unix:/PATH"),
        ("ssh:host:22", "is neither unix:/PATH"),
        ("tcp:4444", "is not of the form"),
        ("tcp:host:0", "is not of the form"),
        ("tcp:host:65536", "is not of the form"),
        ("tcp:host:qmp", "is not of the form"),
        ("tcp::4444", "is not of the form"),
        ("tcp:fe80::1:4444", "is not of the form"),
        ("tcp:[host]:4444", "is not of the form"),
        ("libvirt:web01", "libvirt addresses are not supported yet"),
        ("libvirt:web01", "Where AppArmor is on, it needs a rule"),
    ],
)
def test_others_are_refused_under_the_options_name(text: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_address(text, "sockets")
    assert str(refused.value).startswith(f"sockets: {text!r}")
    assert reason in str(refused.value)
