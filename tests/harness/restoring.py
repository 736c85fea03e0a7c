# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of backup_restore ask for, and what they look at."""

from __future__ import annotations

import contextlib
import fcntl
import json
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.library import NAME

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.library import Library


def one_disk(target: Path, disk: str = "drive0", **more: t.Any) -> list[dict[str, t.Any]]:
    """Ask for one disk."""
    return [{"name": disk, "target": str(target), **more}]


def pins(library: Library) -> list[dict[str, t.Any]]:
    """Return the notes of what is read of the VM's sets."""
    return [json.loads(path.read_text()) for path in sorted((library.path / NAME).glob(".*.pin-*.json"))]


@contextlib.contextmanager
def lock_held(library: Library) -> t.Iterator[None]:
    """Be another process that has the VM's lock."""
    with (library.path / NAME / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unchanged(library: Library, **options: t.Any) -> None:
    """Assert that the same restore once more has nothing to do."""
    before = snapshot(library.path.parent)
    again = library.restore(**options)
    assert not again["changed"]
    assert not any(disk["changed"] for disk in again["restored"])
    assert snapshot(library.path.parent) == before
