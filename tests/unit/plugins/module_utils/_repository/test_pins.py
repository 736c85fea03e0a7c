# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is pinned on a set counts for as long as it may be there."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import machine_id
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import pins
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Pin
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.pins import PARTIAL, is_read, reader

if TYPE_CHECKING:
    from pathlib import Path

PIN = Pin("s1", "vda", "/look/vda.qcow2", "hv1", "machine", "2026-11-22T01:00:00Z")


def test_a_pin_of_this_machine_ends_with_its_file_and_that_of_another_never(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    pin = replace(PIN, path=str(path), machine_id=machine_id())
    assert not is_read(pin)
    assert is_read(replace(pin, machine_id="another"))
    # It grows, under another name.
    partial = path.with_name(path.name + PARTIAL)
    partial.touch()
    assert is_read(pin)
    partial.rename(path)
    assert is_read(pin)
    path.unlink()
    path.symlink_to("nowhere")
    assert is_read(pin)


@pytest.mark.parametrize("error", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_pin_whose_file_cannot_be_looked_up_stays(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(_path: str) -> None:
        raise OSError(error, os.strerror(error))

    pin = replace(PIN, machine_id=machine_id())
    monkeypatch.setattr(os, "lstat", refuse)
    assert is_read(pin)


def test_a_pin_below_what_cannot_be_entered(tmp_path: Path) -> None:
    loop, file = tmp_path / "loop", tmp_path / "file"
    loop.symlink_to(loop)
    file.touch()
    pin = replace(PIN, machine_id=machine_id())
    assert is_read(replace(pin, path=str(loop / "vda.qcow2")))
    # Below a file there is nothing, for certain.
    assert not is_read(replace(pin, path=str(file / "vda.qcow2")))


def test_a_pin_whose_file_system_hangs_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, ended = [], threading.Event()

    def hang(path: str) -> None:
        asked.append(path)
        ended.wait(5)
        raise FileNotFoundError(path)

    pin = replace(PIN, path=str(tmp_path / "vda.qcow2"), machine_id=machine_id())
    monkeypatch.setattr(pins, "TIMEOUT", 0.1)
    monkeypatch.setattr(os, "lstat", hang)
    try:
        # The second one is at the same place, which is not waited for again.
        for one in (pin, replace(pin, path=str(tmp_path / "vdb.qcow2"))):
            assert reader(one).startswith(f"{one.path} on hv1 reads it, or did: the file system that it is on does not")
    finally:
        ended.set()
    assert len(asked) == 1
