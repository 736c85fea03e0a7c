# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore to block devices, which have their size and are always there."""

from __future__ import annotations

import os
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, SIZE, Chain, gate
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.restoring import lock_held, one_disk, pins

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


class TestBlockDevices:
    """Volumes, which have their size and are always there."""

    def content(self, chain: Chain, device: Path, directory: Path, set_id: str = "s3") -> bool:
        """Whether a device begins with what a disk held."""
        head = directory / "head.raw"
        with device.open("rb") as source:
            head.write_bytes(source.read(SIZE))
        return identical(chain.copies(set_id)["drive0"], head, other_format="raw")

    @pytest.mark.parametrize("more", [0, MIB])
    def test_all_of_the_disk_and_no_more_is_written(
        self, chain: Chain, storage: Storage, directory: Path, more: int
    ) -> None:
        device = storage.loop(SIZE + more)
        device.write_bytes(b"\xff" * (SIZE + more))
        said = chain.library.restore(disks=one_disk(device), overwrite=True)
        assert (said["restored"][0]["format"], said["restored"][0]["bytes"]) == ("raw", SIZE)
        assert self.content(chain, device, directory)
        with device.open("rb") as source:
            source.seek(SIZE)
            assert source.read() == b"\xff" * more
        assert pins(chain.library) == []
        # Nobody can tell what is there by now.
        assert chain.library.restore(id="s1", disks=one_disk(device), overwrite=True)["changed"]
        assert self.content(chain, device, directory, "s1")

    def test_refused(self, chain: Chain, storage: Storage, vms: Vms) -> None:
        small, right = storage.loop(SIZE - MIB, "small.img"), storage.loop(SIZE, "right.img")
        library = chain.library
        assert "to replace its content, use overwrite: true" in library.fail_restore(disks=one_disk(right))
        assert library.fail_restore(disks=one_disk(small), overwrite=True) == (
            f"target: {small} has {SIZE - MIB} bytes, and disk drive0 needs {SIZE}"
        )
        for options in ({"disks": one_disk(right, format="qcow2")}, {"method": "overlay", "disks": one_disk(right)}):
            said = library.fail_restore(overwrite=True, **options)
            assert said.startswith(("target: ", "format: "))
        file = {"driver": "host_device", "filename": str(right)}
        vms.start(Disk(right, "other", "another", format="raw", file=file))
        assert "is in use by a running VM" in library.fail_restore(disks=one_disk(right), overwrite=True)
        assert right.read_bytes() == bytes(SIZE)

    @pytest.mark.parametrize(("checksum", "is_written"), [(True, False), ("during", True)])
    def test_a_damaged_image(
        self, chain: Chain, storage: Storage, where: Path, *, checksum: bool | str, is_written: bool
    ) -> None:
        device, library = storage.loop(SIZE), chain.library
        damaged = library.images(NAME, "s1")["drive1"]
        with damaged.open("r+b") as file:
            file.seek(damaged.stat().st_size - 1000)
            file.write(b"!")
        disks = one_disk(device) + one_disk(where / "other.qcow2", "drive1")
        # The device's own images are good: it is not to be half a restore either.
        said = library.fail_restore(disks=disks, overwrite=True, checksum=checksum)
        assert f"{damaged} is not what was written" in said
        told = (
            f"Nothing was restored, except {device}: do not use its content" if is_written else "Nothing was restored"
        )
        assert said.endswith(told)
        assert (device.read_bytes() != bytes(SIZE)) == is_written
        assert list(where.iterdir()) == []
        # With all good images the one is as good as the other.
        library.restore(disks=one_disk(device), overwrite=True, checksum=checksum)
        assert self.content(chain, device, where)

    def test_a_mounted_device_is_refused(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        said = chain.library.fail_restore(disks=one_disk(mount.source), overwrite=True)  # type: ignore[arg-type]
        assert said == f"target: {mount.source} is in use (mounted, or part of a volume): Device or resource busy"

    def test_a_read_only_device_is_refused(self, chain: Chain, storage: Storage) -> None:
        device = storage.loop(SIZE)
        subprocess.run(["blockdev", "--setro", device], check=True)
        try:
            assert "is not writable" in chain.library.fail_restore(disks=one_disk(device), overwrite=True)
        finally:
            subprocess.run(["blockdev", "--setrw", device], check=True)
        assert pins(chain.library) == []

    def test_its_set_is_kept_while_it_is_read(
        self,
        chain: Chain,
        storage: Storage,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        start_module: t.Callable[..., ModuleProcess],
    ) -> None:
        library, device = chain.library, storage.loop(SIZE)
        begun, go = gate(directory, monkeypatch)
        given: dict[str, t.Any] = {"id": "s2", "disks": one_disk(device), "overwrite": True}
        module = start_module("backup_restore", library.restoration(**given))
        wait_until(begun.exists, "the copy")
        library.detach("s3")
        said = library.prune(keep_last=1)
        assert [one["reason"] for one in said["kept"] if one["id"] == "s2"] == [
            f"{device} on {os.uname().nodename} reads it"
        ]
        # One that is killed leaves its pin, as the device is there still.
        module.kill()
        go.touch()
        library.prune(keep_last=1)
        assert [pin["path"] for pin in pins(library)] == [str(device)]
        absent: dict[str, t.Any] = {"state": "absent", "disks": one_disk(device)}
        before = device.read_bytes()
        said = library.restore(**absent)
        assert (said["removed"], said["independent"], pins(library)) == ([], [str(device)], [])
        assert not library.restore(**absent)["changed"]
        assert (device.is_block_device(), device.read_bytes()) == (True, before)
        # A restore to it takes it away as well.
        library.restore(**given)
        assert pins(library) == []
        assert self.content(chain, device, directory, "s2")

    def test_one_that_is_in_use_by_now_is_not_written_to(
        self, chain: Chain, storage: Storage, vms: Vms, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        device = storage.loop(SIZE)
        lock = chain.library.path / NAME / ".lock"
        with lock_held(chain.library):
            module = start_module(
                "backup_restore",
                chain.library.restoration(checksum=False, disks=one_disk(device), overwrite=True),
            )
            # What it has inherited is closed before its event loop begins.
            wait_until(lambda: {lock, Path("anon_inode:[eventpoll]")} <= module.open_files, "the restore")
            file = {"driver": "host_device", "filename": str(device)}
            vms.start(Disk(device, "other", "another", format="raw", file=file))
        assert f"{device} is in use by a running VM" in module.result()["msg"]
        assert device.read_bytes() == bytes(SIZE)
        assert pins(chain.library) == []

    def test_by_a_link(self, chain: Chain, storage: Storage, directory: Path) -> None:
        link = directory / "volume"
        link.symlink_to(storage.loop(SIZE))
        chain.library.restore(disks=one_disk(link), overwrite=True)
        assert link.is_symlink()
        assert self.content(chain, link, directory)
