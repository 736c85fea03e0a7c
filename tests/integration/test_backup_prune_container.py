# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_prune in a container, while a set is restored outside of it."""

from __future__ import annotations

import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.library import Chain, gate
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk

if t.TYPE_CHECKING:
    from collections.abc import Callable

    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


def test_a_prune_in_a_container_while_a_set_is_restored(
    chain: Chain,
    where: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_module: Callable[..., ModuleProcess],
) -> None:
    library = chain.library
    begun, go = gate(directory, monkeypatch)
    module = start_module("backup_restore", library.restoration(id="s2", disks=one_disk(where / "d")))
    wait_until(begun.exists, "the copy")
    library.detach("s3")
    # It has the machine-id of the hypervisor, but not all of its directories, as the documentation says.
    script = f"mount -t tmpfs tmpfs {where} && echo up && exec sleep infinity"
    unshare = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    container = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *unshare, "sh", "-c", script], stdout=subprocess.PIPE
    )
    try:
        assert container.stdout
        assert container.stdout.readline() == b"up\n"
        asked = {"repository": str(library.path), "keep_last": 1}
        [init] = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        said = run_module("backup_prune", asked, inside=NameSpaces(int(init)))
    finally:
        container.kill()
        container.communicate()
        go.touch()
    assert {one["id"] for one in said["kept"]} == {"s3", "s2", "s1"}, said
    assert module.result()["changed"]
