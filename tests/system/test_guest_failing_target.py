# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real Linux that is stopped, since its backup's target was full for a moment while nobody looked: it goes on."""

from __future__ import annotations

import contextlib
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import SLOW, backup, release
from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest, file_system
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

pytestmark = pytest.mark.slow


@pytest.fixture
def mount(storage: Storage) -> FileSystem:
    """A file system that cannot reserve space."""
    return storage.mount("ext2", 256 * MIB)


@pytest.fixture
def guest(directory: Path, mount: FileSystem) -> Iterator[Guest]:
    """A guest that writes; it ends before the file system is unmounted."""
    assert mount
    (directory / "vm").mkdir()
    with Guest(directory / "vm") as guest:
        yield guest


@contextlib.contextmanager
def goes_on(guest: Guest, mount: FileSystem) -> Iterator[None]:
    """The guest is stopped by a moment without space; after what is done then, it writes again."""
    mount.fill()
    wait_until(lambda: guest.status == "io-error", "the guest's stop")
    mount.clear()
    yield
    assert guest.status == "running"
    rounds = guest.rounds
    wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")


@pytest.mark.thorough
@pytest.mark.parametrize("ended", [False, True], ids=["while it is copied", "after its end"])
def test_image(guest: Guest, mount: FileSystem, directory: Path, ended: bool) -> None:
    target = mount.path / "system.qcow2"
    options = {"device": "system"}
    backup(guest, target, state="started", speed=SLOW, **options)
    with goes_on(guest, mount):
        if ended:
            release(guest)
            wait_until(lambda: guest.job["status"] == "concluded", "the end of the job")
            backup(guest, target, **options)
        else:
            result = run_module("drive_backup", {"monitor": str(guest.monitor), "target": str(target), **options})
            assert result["failed"], result
    assert target.exists() is ended
    assert not leftovers(guest, mount.path)
    if ended:
        file_system(target, directory / "copy.raw")


@pytest.mark.parametrize("ended", [False, True], ids=["while it is copied", "after its end"])
def test_set(guest: Guest, mount: FileSystem, directory: Path, ended: bool) -> None:
    sets = Sets(mount.path / "repository")
    plan = sets.plan(guest, speed="64K")["plan"]
    succeed("backup_set", {"plan": plan, "state": "started", "unattended": True})
    with goes_on(guest, mount):
        if ended:
            release(guest)
            wait_until(lambda: all(job["status"] == "concluded" for job in guest.block_jobs), "the end of the jobs")
            succeed("backup_set", {"plan": plan})
        else:
            result = run_module("backup_set", {"plan": plan})
            assert result["failed"], result
    if ended:
        file_system(sets.images("guest")["system"], directory / "copy.raw")
    else:
        sets.assert_absent("guest")
