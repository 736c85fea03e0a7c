# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a domain would get that is not its own: files of other domains, and the state of a TPM that is none."""

from __future__ import annotations

import asyncio
import base64
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain import DEVICE_VOLUME, LOST_VOLUME, place_of
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import Source
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.tpm import LARGEST, STORE
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import domain, owners
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, qemu_img
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import disk_restore

if TYPE_CHECKING:
    from pathlib import Path

STATE = "tpm2-00.permall"


def refuse(target: Path, path: str = "/srv/a.qcow2", image_format: str = "qcow2") -> None:
    """Refuse a target that is a file of another domain, which has this image."""
    sources = {"db": (Source("file", path, image_format),)}
    asyncio.run(owners.refuse_owned(sources, [disk_restore(str(target))], []))


def test_a_file_that_is_named_need_not_be_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"a\.qcow2 is a file of domain db; restore to another place"):
        refuse(tmp_path / "a.qcow2", f"{tmp_path}/b/../a.qcow2")
    refuse(tmp_path / "a.qcow2", f"{tmp_path}/b.qcow2")


def test_what_a_guest_has_written_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.qcow2").write_bytes(b"")
    monkeypatch.setattr(owners, "_header", lambda _path: pytest.fail("it was read"))
    refuse(tmp_path / "a.qcow2", image_format="raw")


def test_a_file_system_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "_header", lambda _path: threading.Event().wait())
    monkeypatch.setattr(owners, "TIMEOUT", 0.01)
    # Nothing builds on what is not there.
    refuse(tmp_path / "a.qcow2")
    (tmp_path / "a.qcow2").write_bytes(b"")
    with pytest.raises(BackupError, match=r"a file system hangs, so .* could not be checked within 0\.01 s"):
        refuse(tmp_path / "a.qcow2")


def test_what_is_raw_to_one_domain_builds_on_others_to_another_one(tmp_path: Path) -> None:
    base, top = create(tmp_path / "base.qcow2", MIB), tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    raw, chain = Source("file", str(top), "raw"), Source("file", str(top), "qcow2")
    for sources in ({"db": (raw, chain)}, {"web": (raw,), "db": (chain,)}, {"db": (chain,), "web": (raw,)}):
        with pytest.raises(Refused, match=r"base\.qcow2 is a file of domain db; restore to another place"):
            asyncio.run(owners.refuse_owned(sources, [disk_restore(str(base))], []))


def test_a_volume_that_may_be_anywhere(tmp_path: Path) -> None:
    target = str(tmp_path / "a.qcow2")
    told = r"a\.qcow2 exists, and may be a disk of domain db: that is volume v of storage pool p, and libvirt "
    reasons = {
        "volume": r"does not tell where this is\. Start the pool \(virsh pool-start p\), or restore to places",
        LOST_VOLUME: r"has no such pool\. Define the pool, remove the disk from db, or restore to places",
    }
    for kind, reason in reasons.items():
        sources = {"db": (Source("file", "/srv/b.qcow2", "qcow2"), Source(kind, "p/v", "raw"))}
        # It is no file that does not exist yet, or that this restore has made.
        asyncio.run(owners.refuse_owned(sources, [disk_restore(target)], []))
        with pytest.raises(Refused, match=told + reason):
            asyncio.run(owners.refuse_owned(sources, [disk_restore(target)], [target]))
        # What the domain itself has is its own, by whatever name.
        own = (Source("volume", target, "qcow2"), Source("file", f"{tmp_path}/b/../a.qcow2", "qcow2"))
        asyncio.run(owners.refuse_owned(sources, [disk_restore(target)], [target], own))
        with pytest.raises(Refused, match=told):
            asyncio.run(owners.refuse_owned(sources, [disk_restore(target)], [target], own[:1]))


def test_a_volume_that_is_a_block_device_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = [disk_restore(str(tmp_path / name)) for name in ("a.qcow2", "device")]
    targets = [disk.target for disk in disks]
    sources = {"db": (Source(DEVICE_VOLUME, "san/unit:0:0:1", "raw"),)}
    asyncio.run(owners.refuse_owned(sources, disks, targets))
    monkeypatch.setattr(target_files, "is_block_device", lambda path: path == targets[1])
    with pytest.raises(Refused, match=r"/device exists, and may be a disk of domain db: that is volume unit:0:0:1 of"):
        asyncio.run(owners.refuse_owned(sources, disks, targets))
    asyncio.run(owners.refuse_owned(sources, disks, targets, [Source("block", targets[1], "raw")]))


@pytest.mark.parametrize(
    ("pool", "kind", "path"),
    [
        ("<pool type='dir'><target><path>/srv/p</path></target></pool>", "file", "/srv/p/v"),
        ("<pool type='logical'><target><path>/dev/vg</path></target></pool>", "file", "/dev/vg/v"),
        ("<pool type='iscsi'><target><path>/dev/disk/by-path</path></target></pool>", DEVICE_VOLUME, "p/v"),
        ("<pool type='mpath'/>", DEVICE_VOLUME, "p/v"),
        ("<pool type='iscsi-direct'/>", "network", "p/v"),
        ("<pool type='rbd'><source/></pool>", "network", "p/v"),
        ("<pool type='dir'/>", "volume", "p/v"),
        ("<pool", "volume", "p/v"),
        ("", LOST_VOLUME, "p/v"),
        ("no rights", "volume", "p/v"),
    ],
)
def test_where_a_volume_is_of_a_pool_that_is_not_active(pool: str, kind: str, path: str) -> None:
    class Error(Exception):
        """Of libvirt."""

        def get_error_code(self) -> int:
            return int(self.args[0])

    def look_up_volume(_name: str) -> None:
        raise Error(55)

    def look_up_pool(_name: str) -> SimpleNamespace:
        if not pool.startswith("<"):
            raise Error(88 if pool else 49)
        return SimpleNamespace(storageVolLookupByName=look_up_volume, XMLDesc=lambda _flags: pool)

    library = SimpleNamespace(libvirtError=Error)
    found = place_of(library, SimpleNamespace(storagePoolLookupByName=look_up_pool), Source("volume", "p/v", "raw"))
    assert (found.kind, found.path, found.format) == (kind, path, "raw")


def test_the_state_of_a_tpm_has_an_end() -> None:
    address = parse_address("libvirt:web01", "domain_name", "qemu:///system")
    for size in (LARGEST, LARGEST + 1):
        description = {"tpm": {"state": {STATE: base64.b64encode(bytes(size)).decode()}}}
        if size == LARGEST:
            place = f"{STORE.format(UUID, 'tpm2')}/{STATE}"
            assert domain._tpm_files(description, address, UUID) == ({place: bytes(size)}, [])
            continue
        with pytest.raises(
            BackupError, match=f"the state of the TPM has {size} bytes, and the state of a TPM never has so many"
        ):
            domain._tpm_files(description, address, UUID)
