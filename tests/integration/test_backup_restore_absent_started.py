# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore with state=absent, while somebody starts a VM on an overlay."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._restore import overlays as overlays_module
from ansible_collections.vmfleet.backup.tests.harness.moments import Moment
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.library import Chain
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


def test_a_vm_that_is_started_while_another_overlay_is_removed(
    chain: Chain,
    where: Path,
    vms: Vms,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_module: Callable[..., ModuleProcess],
) -> None:
    library = chain.library
    look: dict[str, t.Any] = {"id": "s2", "method": "overlay", "directory": str(where)}
    library.restore(**look)
    second = where / "drive1.qcow2"
    # The first one is gone, and its pin goes: that may wait for the VM's lock, for two minutes at most.
    Moment(monkeypatch, directory, overlays_module, "remove_pins")
    module = start_module("backup_restore", library.restoration(**look, state="absent"))
    wait_until((directory / "reached").exists, "the first overlay")
    vm = vms.start(Disk(second, "look", "looked-at"))
    (directory / "over").touch()
    told = module.result()
    assert "is in use by a running VM" in told.get("msg", ""), told
    assert second.exists()
    vm.quit()
