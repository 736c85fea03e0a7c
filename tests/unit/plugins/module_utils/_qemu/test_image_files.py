# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A look at the file of a disk whose VM is off."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_files, qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.disk_file import DiskFile


def test_file_system_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_img, "TIMEOUT", 0.01)
    back = threading.Event()
    disk = DiskFile("vda", "/mnt/a.qcow2", "qcow2")
    told = r"disk vda: /mnt/a.qcow2 cannot be looked at: its file system has not answered within 0.01 s"
    with pytest.raises(BackupError, match=told):
        asyncio.run(image_files.ask(disk, lambda _path: back.wait(), disk.file))
    back.set()
