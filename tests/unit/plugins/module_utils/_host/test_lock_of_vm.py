# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lock of a VM on its hypervisor."""

from __future__ import annotations

import os
import stat
from types import SimpleNamespace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import host_lock_path
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address


@pytest.mark.parametrize(
    ("process", "address", "name"),
    [
        (Process(4711, 99), Address(path="/run/qemu/web01.qmp"), "4711-99.lock"),
        (None, Address(host="127.0.0.1", port=4444), "tcp:127.0.0.1:4444.lock"),
        (None, Address(path="/run/qemu/web01.qmp"), "unix:_run_qemu_web01.qmp.lock"),
    ],
)
@pytest.mark.parametrize(("user", "directory"), [(0, "/run/vmfleet-locks"), (1000, "/tmp/vmfleet-1000")])
def test_lock_of_a_vm(
    process: Process | None, address: Address, name: str, user: int, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SimpleNamespace(st_uid=user, st_mode=stat.S_IFDIR | 0o700)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "lstat", lambda _path: own)
    assert host_lock_path(process, address) == f"{directory}/{name}"
