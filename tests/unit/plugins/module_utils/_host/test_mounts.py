# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The place of a path among what is mounted; tests/integration/test_backup_prune_unmounted.py mounts and unmounts."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import mounts
from ansible_collections.vmfleet.backup.plugins.module_utils._host.mounts import Place, place_of

if TYPE_CHECKING:
    from pathlib import Path


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


def test_a_link_of_udev_to_a_device_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, device in (("a", "/dev/no-such"), ("b", "/dev/zero"), ("c", "/dev/null")):
        (tmp_path / name).symlink_to(device)
    monkeypatch.setattr(mounts, "BY_UUID", str(tmp_path))
    assert mounts._uuid("/dev/null") == "c"
    assert mounts._uuid("/dev/full") == mounts._uuid("/dev/no-such") == ""


def test_btrfs_is_known_by_its_uuid_whatever_its_subvolume_and_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uuid, name, number in (("u1", "sda", "8:0"), ("u2", "null", "1:3"), ("u2", "zero", "1:5")):
        device = tmp_path / "sys" / uuid / "devices" / name
        device.mkdir(parents=True)
        (device / "dev").write_text(f"{number}\n")
    monkeypatch.setattr(mounts, "BTRFS", str(tmp_path / "sys"))
    ids = iter(range(9))
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: os.statvfs_result((0,) * 10 + (next(ids),)))
    for device, uuid in (("/dev/null", "u2"), ("/dev/zero", "u2"), ("/dev/full", ""), ("/dev/no-such", "")):
        monkeypatch.setattr(mounts, "_mount_of", lambda _fd, device=device: ("/srv", "btrfs", device))
        assert place_of("/srv/file") == Place("/srv", uuid)


@pytest.mark.parametrize(
    ("word", "text"),
    [(b"/mnt/a\\040b\\134c", "/mnt/a b\\c"), (b"/mnt/\xc3\xa4\\012", "/mnt/\u00e4\n"), (b"nfs4", "nfs4")],
)
def test_escapes(word: bytes, text: str) -> None:
    assert mounts._text(word) == text
