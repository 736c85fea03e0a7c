# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Build what a test is about: VMs, disks and jobs as they are read from QEMU; images, sets and intents of a repository.

Each takes what matters to the test, and fills in the rest.
"""

from __future__ import annotations

import os
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.receipt import ReceiptPhase, Record
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import BitmapMode, Sync
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import Directory
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process, machine_id
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Bitmap, Disk, Job, Vm
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.chain import set_level
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    DiskImage,
    Hypervisor,
    Intent,
    Manifest,
    Parent,
    StagedDisk,
    VmName,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.json_file import dump, read_document
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import MANIFEST, Repository

MIB = 1024 * 1024
SIZE = 16 * MIB
IMAGE_BYTES = 1024
"""The size of an image that qcow2() makes."""
UUID = "4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10"
WEB01 = VmName("web01", UUID, UUID)
HERE = Hypervisor("hv1", "machine", "boot")
ELSEWHERE = Hypervisor("hv2", "other", "another boot")
TIME = "2026-11-22T01:00:00Z"
REPOSITORY = "12345678-0b0a-4908-8706-050403020100"


def disk(name: str = "drive0", node: str = "n0", **values: Any) -> Disk:
    """Return a disk of a VM."""
    given: dict[str, Any] = {
        "driver": "qcow2",
        "device": name,
        "filename": "/images/web01.qcow2",
        "virtual_size": SIZE,
        "layer_size": 200704,
        "actual_size": 200704,
        "keeps_bitmaps": True,
        **values,
    }
    return Disk(name=name, node=node, **given)


def bitmap(name: str = "b0", **values: Any) -> Bitmap:
    """Return a dirty bitmap of a disk."""
    given: dict[str, Any] = {
        "count": 131072,
        "granularity": 65536,
        "recording": True,
        "busy": False,
        "persistent": True,
        "inconsistent": False,
        **values,
    }
    return Bitmap(name=name, **given)


def job(job_id: str = "j0", status: str = "running", **values: Any) -> Job:
    """Return a job of a VM."""
    return Job(id=job_id, type="backup", status=status, **values)


def vm(*disks: Disk, **values: Any) -> Vm:
    """Return a VM with these disks, or with one."""
    given: dict[str, Any] = {
        "name": "web01",
        "uuid": UUID,
        "identity": UUID,
        "status": "running",
        "version": "7.2.22",
        "disks": disks or (disk(),),
        "other_nodes": (),
        "empty": (),
        "jobs": (),
        "fdsets": {},
        "process": own_process(),
        **values,
    }
    return Vm(**given)


def own_process() -> Process:
    """Return a process that is alive: this one."""
    found = Process.of(os.getpid())
    assert found
    return found


def dead_process() -> Process:
    """Return a process that has ended: its pid belongs to another one now."""
    return Process(os.getpid(), own_process().start - 1)


def record(**values: Any) -> Record:
    """Return a record of a copy of disk() of vm()."""
    given: dict[str, Any] = {
        "phase": "copying",
        "attempt": "0123456789ab",
        "job": "vmfleet.db.0123456789ab",
        "vm": "web01",
        "identity": UUID,
        "hypervisor": machine_id(),
        "process": (),
        "device": "drive0",
        "sync": "full",
        "bitmap": "",
        "bitmap_mode": "",
        "target": "/b/x.qcow2",
        "format": "qcow2",
        "virtual_size": SIZE,
        "started": "2026-11-22T01:30:00.000Z",
        "guest": "running",
        "reserved": False,
        **values,
    }
    words = {"phase": ReceiptPhase, "sync": Sync, "bitmap_mode": BitmapMode}
    return Record(**{**given, **{name: word(given[name]) for name, word in words.items()}})


def parent(set_id: str = "s1", **values: Any) -> Parent:
    """Return what an increment says of its parent's image in this set, as manifest() makes it."""
    return Parent(**{"id": set_id, "sha256": None, "attempt": f"attempt-{set_id}", **values})


def image(name: str = "vda", below: Parent | str | None = None, **values: Any) -> DiskImage:
    """Return a disk's image in a set: a full one, or an increment on that of the set C(below)."""
    given: dict[str, Any] = {
        "node": f"n-{name}",
        "qdev": "",
        "source": "/src",
        "source_format": "qcow2",
        "virtual_size": SIZE,
        "level": "incremental" if below else "full",
        "reason": "",
        "parent": parent(below) if isinstance(below, str) else below,
        "image": f"{name}.qcow2",
        "format": "qcow2",
        "compression": "none",
        **values,
    }
    return DiskImage(name=name, **given)


def manifest(set_id: str = "s1", *images: DiskImage, **values: Any) -> Manifest:
    """Return the manifest of a set of web01 with these images, or with one."""
    disks = images or (image(),)
    given: dict[str, Any] = {
        "repository": REPOSITORY,
        "vm": WEB01,
        "sequence": 1,
        "level": set_level(disk.level for disk in disks),
        "run": "run",
        "attempt": f"attempt-{set_id}",
        "started": TIME,
        "finished": TIME,
        "duration": 1.0,
        "consistency": "crash",
        "qemu": "7.2.22",
        "disks": disks,
        **values,
    }
    return Manifest(**{"id": set_id, **given})


def job_id(attempt: str = "attempt-s1", number: int = 0) -> str:
    """Return the id of a job of an attempt."""
    return f"vmfleet.{REPOSITORY[:8]}.{attempt}.{number}"


def staged(attempt: str, *disks: DiskImage) -> tuple[StagedDisk, ...]:
    """Return the disks of an intent."""
    return tuple(StagedDisk(disk, job_id(attempt, number), MIB) for number, disk in enumerate(disks))


def intent(set_id: str = "s1", *images: DiskImage, **values: Any) -> Intent:
    """Return the intent of a set of web01 with these images, or with one; their jobs are those of job_id()."""
    disks = images or (image(),)
    given: dict[str, Any] = {
        "run": "run",
        "attempt": f"attempt-{set_id}",
        "vm": WEB01,
        "hypervisor": HERE,
        "monitor": "unix:/web01.qmp",
        "process": (1, 2),
        "level": set_level(disk.level for disk in disks),
        "consistency": "crash",
        "qemu": "7.2.22",
        "guest": "running",
        "started": TIME,
        "begun": 100.0,
        "deadline": None,
        "checksum": True,
        "disks": staged(values.get("attempt", f"attempt-{set_id}"), *disks),
        **values,
    }
    return Intent(**{"id": set_id, **given})


def qcow2(backing: str = "", size: int = SIZE) -> bytes:
    """Return the header of a qcow2 image, as QEMU 7.2 writes it, and nothing else of one."""
    fixed = (
        b"QFI\xfb",
        3,
        512 if backing else 0,
        len(backing),
        16,
        size,
        0,
        1,
        196608,
        65536,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        112,
    )
    head = struct.pack(">4sIQIIQIIQQIIQQQQII", *fixed) + bytes(8)
    if backing:
        head += struct.pack(">II5s3x", 0xE2792ACA, 5, b"qcow2")
    return (head.ljust(512, b"\0") + backing.encode()).ljust(IMAGE_BYTES, b"\0")


def put(repository: Repository, made: Manifest, content: bytes | None = b"abc") -> Path:
    """Put a set into a repository as it is, each image with this content or, for none, its header; return its place."""
    made = replace(made, repository=repository.uuid or made.repository)
    directory = Path(repository.set_path(made.vm.name, made.id))
    directory.mkdir(parents=True)
    for disk in made.disks:
        below = f"../{disk.parent.id}/{disk.image}" if disk.parent else ""
        (directory / disk.image).write_bytes(qcow2(below, disk.virtual_size) if content is None else content)
    write(directory / MANIFEST, asdict(made))
    return directory


def write(path: str | Path, content: dict[str, Any], mode: int = 0o600) -> None:
    """Write a document."""
    with Directory.at(os.path.dirname(path)) as directory:
        directory.write(os.path.basename(path), dump(content), mode)


def read(path: str | Path, kind: Any) -> Any:
    """Read a document."""
    with Directory.at(os.path.dirname(path)) as directory:
        return read_document(directory, os.path.basename(path), kind)


def begin(repository: Repository, of: Intent) -> None:
    """Begin a set, maybe the first of its VM."""
    os.makedirs(repository.directory(of.vm.name), exist_ok=True)
    staging.begin(repository, of)
