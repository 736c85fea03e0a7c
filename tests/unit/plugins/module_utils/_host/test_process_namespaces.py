# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names of processes, paths and ports mean the same in the same name spaces only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import process
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import (
    PATHS,
    PORTS,
    PROCESSES,
    boot_id,
    shared,
    spaces,
)

ASK = """
import json
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import boot_id
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import spaces
print(json.dumps([boot_id(), spaces()]))
"""


def test_here() -> None:
    assert spaces()[PROCESSES] == str(os.stat("/proc/self/ns/pid").st_ino)
    assert spaces()[PORTS] == str(os.stat("/proc/self/ns/net").st_ino)
    assert spaces()[PATHS].startswith(str(os.stat("/proc/self/ns/mnt").st_ino))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare(1)")
@pytest.mark.parametrize(
    ("options", "others"),
    [
        ([], set()),
        (["--net"], {PORTS}),
        (["--mount"], {PATHS}),
        (["--pid", "--fork", "--mount-proc"], {PATHS, PROCESSES}),
        # It still sees the /proc of the outside, in which its own ids are those of other processes.
        (["--pid", "--fork"], {PROCESSES}),
    ],
)
def test_elsewhere(options: list[str], others: set[str]) -> None:
    command = ["unshare", *options, sys.executable, "-c", ASK]
    boot, there = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert boot == boot_id()
    assert {kind for kind in (PROCESSES, PATHS, PORTS) if not shared(kind, there)} == others
    if options == ["--pid", "--fork"]:
        assert there[PROCESSES] == ""


def test_what_was_recorded_by_the_first_release_means_the_same() -> None:
    assert all(shared(kind, {}) for kind in (PROCESSES, PATHS, PORTS))


def test_nothing_is_shared_with_one_who_does_not_know_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "spaces", lambda: {PROCESSES: ""})
    assert not shared(PROCESSES, {PROCESSES: ""})
    assert not shared(PROCESSES, {})
