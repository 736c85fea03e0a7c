# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Packs modules as Ansible does before it sends them to a hypervisor: each into one file, with all that it imports."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import typing as t
import zipfile
from pathlib import Path

COLLECTION = "ansible_collections/vmfleet/backup"

REFUSED = "no_such_option"
"""The only argument of each packed module: it starts as ever, and ends when it reads its arguments."""


def pack(root: Path, directory: Path) -> dict[str, Path]:
    """Pack all modules of the collection below `root`; return the file of each in `directory`.

    A process of its own packs them, since Ansible looks for collections once in the life of a process.
    """
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(root), "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(root), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {path.stem: path for path in sorted(directory.glob("*.py"))}


def packed_files(payload: Path) -> list[str]:
    """Return the names of the files in a payload, such as ansible/module_utils/basic.py."""
    archive = max(re.findall(rb"[A-Za-z0-9+/=]+", payload.read_bytes()), key=len)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(archive))) as packed:
        return sorted(packed.namelist())


def _pack(root: Path, directory: Path) -> None:
    from ansible import constants
    from ansible.executor.module_common import modify_module
    from ansible.parsing.dataloader import DataLoader
    from ansible.plugins.loader import init_plugin_loader
    from ansible.template import Templar

    init_plugin_loader()
    for path in sorted((root / COLLECTION / "plugins" / "modules").glob("[a-z]*.py")):
        if "def main(" not in path.read_text():
            # Documentation of an action plugin.
            continue
        built: t.Any = modify_module(
            module_name=path.stem,
            module_path=str(path),
            module_args={REFUSED: True},
            templar=Templar(loader=DataLoader()),
            task_vars={"ansible_python_interpreter": sys.executable},
            module_compression=constants.DEFAULT_MODULE_COMPRESSION,
        )
        # A tuple until ansible-core 2.18, an object since.
        (directory / path.name).write_bytes(built[0] if isinstance(built, tuple) else built.b_module_data)


if __name__ == "__main__":
    _pack(*map(Path, sys.argv[1:]))
