# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told where libvirt's Python binding is missing; real domains are in the integration tests."""

from __future__ import annotations

import asyncio
import sys
import types

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import MonitorError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor


def refused() -> str:
    async def enter() -> None:
        async with Monitor(parse_address("libvirt:web01")):
            pass

    with pytest.raises(MonitorError) as error:
        asyncio.run(enter())
    return str(error.value)


def test_binding_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    told = refused()
    assert told.startswith(f"libvirt:web01: libvirt's Python binding cannot be imported by {sys.executable}")
    assert "install the package python3-libvirt" in told


def test_binding_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", types.ModuleType("libvirt"))
    monkeypatch.setitem(sys.modules, "libvirt_qemu", types.ModuleType("libvirt_qemu"))
    assert "older than 8.2, and cannot hand open files to QEMU" in refused()
