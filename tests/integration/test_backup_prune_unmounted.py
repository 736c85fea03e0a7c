# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_prune while the file systems of overlays are not mounted: the VMs on these may go on when they are back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import mounts
from ansible_collections.vmfleet.backup.plugins.module_utils._host.mounts import Place, place_of
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, assert_pattern, write
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, pins

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

pytestmark = pytest.mark.usefixtures("clean")


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def unmounted(mount: FileSystem) -> t.Iterator[None]:
    """Have a file system of a disk go, and come back."""
    run("umount", mount.path)
    try:
        yield
    finally:
        mount.path.mkdir(exist_ok=True)
        run("mount", "-o", "loop", image_of(mount), mount.path)


@contextlib.contextmanager
def mounted(*what: str | Path) -> t.Iterator[None]:
    """Have a place be another one for a while."""
    run("mount", *what)
    try:
        yield
    finally:
        run("umount", what[-1])


def image_of(mount: FileSystem) -> Path:
    return mount.path.with_name(mount.path.name + ".img")


class Look:
    """A VM that goes on from s2 on an overlay, while s3 needs no other set."""

    def __init__(self, chain: Chain, path: Path) -> None:
        self.chain, self.library, self.path = chain, chain.library, path
        path.parent.mkdir(exist_ok=True)
        self.library.detach("s3")
        self.library.restore(id="s2", method="overlay", disks=one_disk(path))
        write(path, "write -P 0xE1 5M 64k")

    def assert_kept(self, place: Path) -> None:
        self.assert_kept_because(f"the file system that it is on is not mounted at {place}. Mount it")

    def assert_kept_because(self, reason: str) -> None:
        """A prune keeps what it reads, and says why, and what to do."""
        for check in (True, False, False):
            said = self.library.prune(check=check, keep_last=1)
            assert {one["id"]: one["reason"] for one in said["kept"]}["s2"] == (
                f"{self.path} on {os.uname().nodename} reads it, or did: {reason}, or remove the overlay's pin with"
                " state: absent if it is gone for good"
            )
            assert not said["changed"]
        assert self.library.listed() == ["s3", "s2", "s1"]
        assert self.library.info()["leftovers"] == []

    def assert_goes_on(self) -> None:
        assert_pattern(self.path, "qcow2", 0xE1, 5 * MIB, 64 << 10)
        self.path.unlink()
        self.library.restore(id="s2", method="overlay", disks=one_disk(self.path))
        self.chain.assert_restored("s2", {"drive0": self.path})

    def assert_gone(self) -> None:
        """A prune knows that nothing reads the set any more."""
        self.library.prune(keep_last=1)
        assert (self.library.listed(), pins(self.library)) == (["s3"], [])


class TestNotMounted:
    """What cannot be seen may be there."""

    def test_a_file_system_that_comes_back(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        look = Look(chain, mount.path / "vms" / "look")
        with unmounted(mount):
            look.assert_kept(mount.path)
        look.assert_goes_on()
        # As after the machine has started again.
        with unmounted(mount):
            pass
        shutil.rmtree(look.path.parent)
        look.assert_gone()

    def test_one_whose_mount_point_went_with_it(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        look = Look(chain, mount.path / "look")
        with unmounted(mount):
            mount.path.rmdir()
            look.assert_kept(mount.path)
        look.assert_goes_on()

    def test_another_one_at_its_place(self, chain: Chain, storage: Storage) -> None:
        mount, other = storage.mount("ext4", 16 * MIB), storage.mount("ext4", 16 * MIB, "other")
        look = Look(chain, mount.path / "look")
        with unmounted(mount), unmounted(other), mounted("-o", "loop", image_of(other), mount.path):
            look.assert_kept(mount.path)
        look.assert_goes_on()

    def test_a_directory_that_was_bound_there(self, chain: Chain, storage: Storage) -> None:
        """It is on the same file system as what is below it."""
        mount = storage.mount("ext4", 16 * MIB)
        bound = mount.path / "a place"
        bound.mkdir()
        bind = ("--bind", mount.path, bound)
        with mounted(*bind):
            look = Look(chain, bound / "look")
        look.assert_kept(bound)
        with mounted(*bind):
            look.assert_goes_on()

    def test_another_overlay_below_it(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        look = Look(chain, mount.path / "look")
        with unmounted(mount):
            look.library.restore(id="s1", method="overlay", disks=one_disk(look.path))
            assert [pin["id"] for pin in pins(look.library)] == ["s1", "s2"]
            look.path.unlink()
            look.assert_kept(mount.path)
        look.assert_goes_on()

    def test_one_that_is_gone_for_good(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        look = Look(chain, mount.path / "look")
        with unmounted(mount):
            look.assert_kept(mount.path)
            assert look.library.restore(state="absent", directory=str(mount.path))["removed"] == [str(look.path)]
            look.assert_gone()

    def test_one_that_another_file_system_hides(self, chain: Chain, storage: Storage) -> None:
        mount, other = storage.mount("ext4", 16 * MIB), storage.mount("ext4", 16 * MIB, "other")
        look = Look(chain, mount.path / "vms" / "look")
        with mounted("--bind", other.path, look.path.parent):
            look.assert_kept_because(f"what is mounted at {look.path.parent} may hide it. Unmount that")
        look.assert_goes_on()

    def test_one_that_a_file_system_in_memory_hides(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        look = Look(chain, mount.path / "vms" / "look")
        with mounted("-t", "tmpfs", "tmpfs", look.path.parent):
            look.assert_kept_because(f"what is mounted at {look.path.parent} may hide it. Unmount that")
        look.assert_goes_on()


class TestGone:
    """What is certainly not there any more, or of which nobody has written down where it was."""

    def test_the_link_that_its_path_led_through(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        link = mount.path.with_name("link")
        link.symlink_to(mount.path)
        look = Look(chain, link / "look")
        assert pins(look.library)[0]["mount"] == str(mount.path)
        look.path.unlink()
        link.unlink()
        look.assert_gone()

    def test_a_file_system_in_memory(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("tmpfs", 16 * MIB)
        look = Look(chain, mount.path / "look")
        run("umount", mount.path)
        look.assert_gone()
        run("mount", "-t", "tmpfs", "tmpfs", mount.path)

    def test_a_pin_of_version_0_1_0(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        look = Look(chain, mount.path / "look")
        [path] = (look.library.path / NAME).glob(".*.pin-*.json")
        now = json.loads(path.read_text())
        old = {key: value for key, value in now.items() if key not in ("mount", "file_system")}
        path.write_text(json.dumps(old))
        # The same restore again writes down what was missing.
        assert not look.library.restore(id="s2", method="overlay", disks=one_disk(look.path))["changed"]
        assert {**json.loads(path.read_text()), "since": ""} == {**now, "since": ""}
        path.write_text(json.dumps(old))
        with unmounted(mount):
            look.assert_gone()


class TestPlaces:
    """What a file system is known by."""

    def test_its_id_is_the_same_on_another_device(self, storage: Storage) -> None:
        mount, other = storage.mount("ext4", 16 * MIB), storage.mount("ext4", 16 * MIB, "other")
        before = place_of(str(mount.path / "no" / "such" / "file"))
        assert before.mount == str(mount.path)
        assert before.file_system not in ("", place_of(str(other.path / "file")).file_system)
        with unmounted(mount), unmounted(other), mounted("-o", "loop", image_of(mount), other.path):
            assert place_of(str(other.path / "file")) == Place(str(other.path), before.file_system)

    def test_the_uuid_that_udev_tells(self, storage: Storage, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        monkeypatch.setattr(mounts, "FROM_UUID", frozenset())
        monkeypatch.setattr(mounts, "BY_UUID", str(directory / "by-uuid"))
        assert place_of(str(mount.path / "file")) == Place(str(mount.path), "")
        (directory / "by-uuid").mkdir()
        (directory / "by-uuid" / "another").symlink_to("/dev/null")
        (directory / "by-uuid" / "its-own").symlink_to(mount.source)
        assert place_of(str(mount.path / "file")) == Place(str(mount.path), "its-own")
