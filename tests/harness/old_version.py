# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The modules of version 0.1.0, as tests/data/written_by_0.1.0 has them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.modules import PACKAGE, module_input

WRITTEN = Path(__file__).parents[1] / "data" / "written_by_0.1.0"
ELSEWHERE = """
set -e
hostname hv2
mount --bind "$1/machine-id" /etc/machine-id
mount --bind "$1/boot-id" /proc/sys/kernel/random/boot_id
shift
exec "$@"
"""
"""Be another machine, for one command."""


class OldVersion:
    """The modules of version 0.1.0, on this machine or on another one."""

    def __init__(self, root: Path, elsewhere: bool = False) -> None:
        shutil.unpack_archive(WRITTEN / "collection.tar.xz", root, filter="tar")
        self._root = root
        self._way: list[str] = []
        if elsewhere:
            (root / "machine-id").write_text("0f1e2d3c4b5a69788796a5b4c3d2e1f0\n")
            (root / "boot-id").write_text("5b0e7a52-3c1d-4e8f-9a6b-7c8d9e0f1a2b\n")
            self._way = ["unshare", "--mount", "--uts", "sh", "-c", ELSEWHERE, "sh", str(root)]

    def run(self, module: str, **arguments: t.Any) -> dict[str, t.Any]:
        """Run a module that has to succeed."""
        done = subprocess.run(
            [*self._way, sys.executable, "-m", f"{PACKAGE}.{module}"],
            input=module_input(arguments),
            capture_output=True,
            text=True,
            cwd=self._root,
            env={**os.environ, "PYTHONPATH": str(self._root)},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, t.Any] = json.loads(done.stdout)
        return result
