# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A file that is handed over to QEMU and does not arrive there.

Security modules do that, for which `make confined` has other kernels; so does a full table of open files.
"""

from __future__ import annotations

import itertools
import os
import resource
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import assert_good, backup, fail_backup

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("room", [0, 1])
def test_reason_is_told_and_nothing_stays(room: int, vms: Vms, target: Path) -> None:
    """Where there is room for one file, the first of the pair arrives: it is taken back."""
    disk = vms.disk()
    vm = vms.start(disk)
    used = {int(fd) for fd in os.listdir(f"/proc/{vm.pid}/fd")}
    free = (fd for fd in itertools.count() if fd not in used)
    before = resource.prlimit(vm.pid, resource.RLIMIT_NOFILE)
    # One is for the connection.
    limit = [next(free) for _dummy in range(2 + room)][-1]
    resource.prlimit(vm.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    found = fail_backup(vm, target)
    assert found["msg"].startswith(f"QEMU did not receive the open file {target}.partial: ")
    assert "Max open files" in found["msg"]
    assert not list(target.parent.iterdir())
    resource.prlimit(vm.pid, resource.RLIMIT_NOFILE, before)
    backup(vm, target)
    assert_good(target, disk.path)
