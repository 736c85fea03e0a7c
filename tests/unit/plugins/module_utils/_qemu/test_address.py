# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Addresses of monitors, in all their forms."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._common.options import check_options
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import DEFAULT_URI, Address, parse_address

DOMAINS = ["web01", "db 01", "a:b", "-rf", "what?x=y#z%41&c", "...", "größe", "libvirt:web01", "x" * 300]
"""Names that libvirt takes."""


@pytest.mark.parametrize(
    ("text", "address", "canonical"),
    [
        ("unix:/run/web01.qmp", Address(path="/run/web01.qmp"), "unix:/run/web01.qmp"),
        ("/run/web 01:x.qmp", Address(path="/run/web 01:x.qmp"), "unix:/run/web 01:x.qmp"),
        ("tcp:127.0.0.1:4444", Address(host="127.0.0.1", port=4444), "tcp:127.0.0.1:4444"),
        ("tcp:hv.example.org:65535", Address(host="hv.example.org", port=65535), "tcp:hv.example.org:65535"),
        ("tcp:[fe80::1]:1", Address(host="fe80::1", port=1), "tcp:[fe80::1]:1"),
        *((f"libvirt:{name}", Address(domain=name, uri=DEFAULT_URI), f"libvirt:{name}") for name in DOMAINS),
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
        ("libvirt:", "names no domain"),
        ("libvirt:.", "names no domain"),
        ("libvirt:..", "names no domain"),
        ("libvirt:a/b", "names no domain"),
        ("libvirt:a\nb", "has control characters"),
        ("libvirt:a\x85b", "has control characters"),
        ("libvirt:a\0b", "has control characters"),
        ("libvirt:a\ud800b", "has a half of a character"),
        ("libvirt:a\udcffb", "is no text in Unicode"),
    ],
)
def test_others_are_refused_under_the_options_name(text: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_address(text, "sockets")
    assert str(refused.value).startswith(f"sockets: {text!r}")
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("address", "stem"),
    [
        ("/run/qemu/web.01.qmp", "web.01"),
        ("/run/qemu/web01", "web01"),
        ("tcp:127.0.0.1:4444", "tcp:127.0.0.1:4444"),
        ("libvirt:web.01", "web.01"),
    ],
)
def test_what_a_vm_without_a_name_is_called(address: str, stem: str) -> None:
    assert parse_address(address).stem == stem


LOCAL = [
    "qemu:///system",
    "qemu:///session",
    "qemu+unix:///system",
    "qemu+unix:///session?socket=/home/u1/.cache/libvirt/libvirt-sock",
    "qemu:///system?mode=legacy",
    "qemu:///system?mode=direct&socket=/run/a%20b",
]
REMOTE = [
    "",
    "qemu",
    "qemu:/system",
    "qemu://hv2/system",
    "qemu://127.0.0.1/system",
    "qemu://root@/system",
    "qemu+tcp:///system",
    "qemu+tls:///system",
    "qemu+ssh://root@hv2/system",
    "qemu+libssh2:///system",
    "qemu+ext:///system?command=/bin/true",
    "qemu:///system?name=qemu%2Btcp://hv2/system",
    "qemu:///system?command=/bin/true",
    "qemu:///system?socket=relative",
    "qemu:///system?socket=/a&name=b",
    "qemu:///system?",
    "qemu:///system#x",
    "qemu:///system\n",
    "qemu:///embed?root=/x",
    "xen:///system",
    "test:///default",
    "qemu:///system,qemu:///session",
    "qemu:///system qemu:///session",
]


@pytest.mark.parametrize("uri", LOCAL)
def test_libvirt_of_this_machine(uri: str) -> None:
    assert parse_address("libvirt:web01", libvirt_uri=uri) == Address(domain="web01", uri=uri)


@pytest.mark.parametrize("uri", REMOTE)
def test_other_libvirts_are_refused_under_the_options_name(uri: str) -> None:
    with pytest.raises(Refused) as refused:
        check_options({"libvirt_uri": {"type": "str"}}, {"libvirt_uri": uri})
    assert refused.value.option == "libvirt_uri"
    if uri:
        with pytest.raises(Refused) as refused:
            parse_address("libvirt:web01", "monitors", uri)
        assert refused.value.option == "libvirt_uri"
        assert "To back up domains of another machine, run the backup on that machine" in str(refused.value)


def test_a_password_is_not_told() -> None:
    with pytest.raises(Refused) as refused:
        parse_address("libvirt:web01", libvirt_uri="qemu+ssh://root:secret@hv2/system")
    assert "secret" not in str(refused.value)


def test_which_libvirt_is_asked_does_not_matter_to_a_socket() -> None:
    assert parse_address("/run/web01.qmp", libvirt_uri="qemu+ssh://hv2/system") == Address(path="/run/web01.qmp")
