# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The place of a path among what is mounted; tests/integration/test_backup_prune_unmounted.py mounts and unmounts."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import mounts
from ansible_collections.vmfleet.backup.plugins.module_utils._host.mounts import Place, place_of


def test_what_is_no_device_is_known_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of("/proc/no/such/file") == Place("/proc", "proc")
    # Below a file there is nothing; the directory of the file is what counts.
    assert place_of("/proc/version/file") == Place("/proc", "proc")
    monkeypatch.setattr(mounts, "VOLATILE", frozenset({"proc"}))
    assert place_of("/proc/file") == Place()


def test_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, _flags: int) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    monkeypatch.setattr(os, "open", refuse)
    assert place_of("/proc/file") == Place()


def test_a_mount_that_is_not_seen_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_mount_of", lambda _fd: ("", "", ""))
    assert place_of("/proc/file") == Place()


@pytest.mark.parametrize(
    ("word", "text"),
    [(b"/mnt/a\\040b\\134c", "/mnt/a b\\c"), (b"/mnt/\xc3\xa4\\012", "/mnt/\u00e4\n"), (b"nfs4", "nfs4")],
)
def test_escapes(word: bytes, text: str) -> None:
    assert mounts._text(word) == text
