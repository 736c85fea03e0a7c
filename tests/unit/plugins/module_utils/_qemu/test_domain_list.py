# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which domains there are, where libvirt does not list them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_list import _ask_one
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.libvirt_connection import NO_DOMAIN

BROKEN_OFF = 38
"""VIR_ERR_SYSTEM_ERROR"""


class LibvirtError(Exception):
    """An error of libvirt's binding."""

    def get_error_code(self) -> int:
        return int(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LibvirtError("Domain not found", NO_DOMAIN), None),
        (
            LibvirtError("Cannot recv data: Connection reset by peer", BROKEN_OFF),
            "libvirt does not find this domain: Cannot recv data: Connection reset by peer",
        ),
    ],
)
def test_only_a_domain_that_has_gone_is_left_out(error: LibvirtError, told: str | None) -> None:
    def look(_name: str) -> None:
        raise error

    connection = SimpleNamespace(lookupByName=look, close=lambda: None)
    library = SimpleNamespace(libvirtError=LibvirtError, open=lambda _uri: connection)
    found = _ask_one(library, "qemu:///system", "web01")
    assert (found.error if found else None) == told
