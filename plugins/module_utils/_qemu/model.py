# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe a VM as QEMU shows it: its disks, bitmaps and jobs."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .._common.device_names import lasting_names, qdev_id
from .._common.errors import Refused
from .._common.formats import Word

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .._host.process import Process
    from .domain_disks import Domain


NO_UUID = "00000000-0000-0000-0000-000000000000"
ENDED = frozenset({"concluded", "null"})
"""Job states in which a job does nothing any more."""
SETTLING = frozenset({"waiting", "pending", "aborting"})
"""Job states in which a job copies nothing any more: it waits for the others of its transaction, or goes back."""
CANCELLED = "Operation canceled"
"""QEMU's words for a cancelled job."""
IO_ERROR = "io-error"
"""QEMU's status of a VM that was stopped because a read or a write of its guest failed."""
OFF = "off"
"""Our word for the status of a VM that has no QEMU."""
TARGET_NODES = "vmf."
"""What the names of all nodes begin with that backups of this collection write to."""
TARGET_NODE = re.compile(re.escape(TARGET_NODES) + r"(db|[0-9a-f]{8})\.[0-9a-f]{12}(\.\d+)?")
LIBVIRT_NODE = re.compile(r"libvirt-([0-9]{1,9})-(?:format|storage|filter)")
"""The nodes that libvirt makes of the images of disks. The number is the index of the image in the domain's XML."""
TEMPORARY = re.compile(r"/vl\.[A-Za-z0-9]{6}(?:\"|$)")
"""The file that QEMU makes for a temporary disk, in /var/tmp or in TMPDIR (block.c, create_tmp_file)."""
IN_THE_CLEAR = "is encrypted at rest, and its copy is not: whoever can read the copy can read the disk"


class EncryptedSource(Word):
    """What to do about a disk that is encrypted at rest, and whose copy will not be."""

    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap of a disk. C(count) and C(granularity) are bytes."""

    name: str
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool

    @property
    def unusable(self) -> str:
        """Return why an increment cannot be made from this bitmap; empty where it can."""
        if self.inconsistent:
            return "is inconsistent: QEMU was not shut down cleanly"
        if self.busy:
            return "is in use by another operation"
        if not self.recording:
            return "is disabled: it has missed writes"
        return ""


@dataclass(frozen=True)
class Disk:
    """A block node that can be backed up. Sizes are bytes, None where QEMU cannot tell.

    C(layer_size) is what the top image holds, C(actual_size) what it holds together with its backing files.
    C(filters) are the nodes between the device and C(node), such as a throttle. C(layers) are the nodes of its backing
    files, top first, without filters between them. C(stable_name) is false of a name that another disk can have after a
    restart of QEMU. C(keeps_bitmaps) tells whether a bitmap can be stored in the image. C(encrypted) says that it or a
    layer below is, C(snapshots) how many internal ones it holds. C(file) is where it stands, C(data_file) where its
    data are if elsewhere; both as QEMU names them. No name has a secret in it. C(shared) is true where libvirt lets
    other VMs write to it.
    """

    name: str
    node: str
    driver: str
    filters: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    device: str = ""
    qdev: str = ""
    filename: str = ""
    backing_file: str = ""
    backing_format: str = ""
    virtual_size: int = 0
    layer_size: int | None = None
    actual_size: int | None = None
    read_only: bool = False
    removable: bool = False
    stable_name: bool = True
    keeps_bitmaps: bool = False
    encrypted: bool = False
    snapshots: int = 0
    file: str = ""
    data_file: str = ""
    shared: bool = False
    bitmaps: tuple[Bitmap, ...] = ()

    @property
    def aliases(self) -> tuple[str, ...]:
        """Return every name that a user may call this disk by."""
        found = [self.device, qdev_id(self.qdev), self.qdev, *self.filters, self.node, self.name]
        return tuple(dict.fromkeys(name for name in found if name))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names by which sets may know this disk, its own first."""
        return lasting_names(self.name, self.qdev)

    @property
    def qemu_name(self) -> str:
        """Return its name where QEMU itself is asked, which may not be that which libvirt has for it."""
        return self.device or qdev_id(self.qdev) or self.name

    def shares_file(self, other: Disk) -> bool:
        """Return whether another disk is on the same file."""
        return bool(self.file) and plain_path(self.file) == plain_path(other.file) and self.node != other.node

    def bitmap(self, name: str) -> Bitmap | None:
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclass(frozen=True)
class Job:
    """A block job, as query-block-jobs and query-jobs show it together. C(offset), C(len) bytes; C(speed) bytes/s."""

    id: str
    type: str
    status: str
    offset: int = 0
    len: int = 0
    speed: int = 0
    paused: bool = False
    busy: bool = False
    io_status: str = "ok"
    error: str = ""

    @property
    def ended(self) -> bool:
        """Return whether it does nothing any more."""
        return self.status in ENDED

    @property
    def copied(self) -> bool:
        """Return whether nothing is left for it to copy: it has ended, or is about to."""
        return self.ended or self.status in SETTLING

    @property
    def failure(self) -> str:
        """Why it ended badly, in QEMU's words; empty while it runs, and where it has ended well."""
        if not self.ended:
            return ""
        return self.error or ("" if self.status == "concluded" else f"its job ended as {self.status}")

    @property
    def failure_in_words(self) -> str:
        """Why it ended badly, for a message: no backup of this collection cancels a job that it still wants."""
        return "cancelled from outside" if self.failure == CANCELLED else self.failure

    @property
    def in_error(self) -> bool:
        """Whether an error has ended it, or has met it on its way."""
        return bool(self.error) or self.io_status != "ok"

    @property
    def percent(self) -> float:
        """Return how much of its work is done."""
        if self.len == 0:
            return 100.0 if self.ended and not self.error else 0.0
        return round(100.0 * self.offset / self.len, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return this job as a return value of a module."""
        return {**asdict(self), "percent": self.percent}


@dataclass(frozen=True)
class Vm:
    """One QEMU process. C(identity) is its uuid, or machine-id:name where it has none."""

    name: str
    uuid: str
    identity: str
    status: str
    version: str
    disks: tuple[Disk, ...]
    other_nodes: tuple[Disk, ...] = field(repr=False)
    empty: tuple[str, ...]
    jobs: tuple[Job, ...]
    fdsets: dict[int, tuple[str, ...]]
    process: Process | None
    monitor: str = ""
    """The address at which it was asked."""
    files: tuple[str, ...] = field(default=(), repr=False)
    """Paths of all image files that this VM has open, backing files included."""
    target_nodes: tuple[str, ...] = field(default=(), repr=False)
    """The nodes that backups of this collection write to, or have written to. None of them is a disk."""
    domain: Domain | None = field(default=None, repr=False)
    """The domain of libvirt that this VM was reached as."""
    daemon: str = ""
    """The attempt for which a storage daemon has the disks of a VM open that is off; empty where none has."""

    @property
    def is_off(self) -> bool:
        """Return whether there is no QEMU: what is known of the disks comes from their files, or a storage daemon."""
        return self.status == OFF

    def cannot_copy(self, disk: Disk) -> str:
        """Return why QEMU must not be told to copy this disk, or cannot be; empty where it may.

        QEMU hands the mark "temporary" of such a disk on to whatever it opens for it, and deletes the file of that name
        (7.2 to 11.1). A file that was handed over open has no name that it could delete.
        """
        if self.is_off and not disk.node:
            return (
                f"disk {disk.name} of VM {self.name} ({disk.driver} {disk.filename}) cannot be copied while the VM is"
                " off. Only qcow2 and raw images that the VM writes to can be copied then: start the VM"
            )
        names = [name for layer in self.chain(disk) for name in (layer.filename, layer.backing_file)]
        if not self.monitor.startswith("tcp:") or not any(TEMPORARY.search(name) for name in names):
            return ""
        return (
            f"disk {disk.name} of VM {self.name} is temporary (-snapshot, snapshot=on). QEMU deletes the copy of such"
            " a disk if it opened the copy by its name, as it must over TCP. Give the VM a monitor on a UNIX socket"
        )

    def chain(self, disk: Disk) -> tuple[Disk, ...]:
        """Return a disk's own node, and the layers that it reads through, from the top to the bottom."""
        return chain_of(disk, (*self.disks, *self.other_nodes))

    def job(self, job_id: str) -> Job | None:
        return next((job for job in self.jobs if job.id == job_id), None)

    def active_jobs(self, besides: Iterable[str] = ()) -> tuple[Job, ...]:
        """Return the jobs that have not ended, except those named."""
        return tuple(job for job in self.jobs if not job.ended and job.id not in set(besides))

    def find_disk(self, name: str) -> Disk | None:
        """Return the disk of this backend name, node name or qdev id; None where there is none."""
        # QEMU itself prefers a backend's name to a node's.
        for disk in self.disks:
            if name and name == disk.device:
                return disk
        return next((disk for disk in (*self.disks, *self.other_nodes) if name in disk.aliases), None)

    def disk(self, name: str, option: str = "device") -> Disk:
        """Return the disk of this backend name, node name or qdev id. Raises Refused with the names there are."""
        found = self.find_disk(name)
        if found:
            return found
        known = "; ".join(" = ".join(disk.aliases) for disk in self.disks) or "none"
        empty = " (without medium: {})".format(", ".join(self.empty)) if self.empty else ""
        raise Refused(option, f"VM {self.name} has no device {name!r}; it has: {known}{empty}")


def chain_of(disk: Disk, nodes: Iterable[Disk]) -> tuple[Disk, ...]:
    """Return a disk's own node and, of C(nodes), the layers that it reads through, from the top to the bottom."""
    by_name = {node.node: node for node in nodes}
    return (disk, *(by_name[name] for name in disk.layers if name in by_name))


def is_disk_on(node: str, qdev: str, disks: Iterable[Disk]) -> bool:
    """Tell whether a device still has its disk on a node, as the C(disks) of its VM are now: with filters between only.

    Where somebody has taken an external snapshot, the guest writes to another node, and this one is a layer below.
    """
    return any((disk.node, disk.qdev) == (node, qdev) for disk in disks)


def moved_nodes(copied: Iterable[tuple[str, str]], before: Iterable[Disk], now: Iterable[Disk]) -> set[str]:
    """Return which nodes of C(copied), each with its qdev, were disks of a VM C(before), and are not these C(now).

    A layer that is named to be copied is none that the guest writes to.
    """
    known, disks = {disk.node for disk in before}, tuple(now)
    return {node for node, qdev in copied if node in known and not is_disk_on(node, qdev, disks)}


def plain_path(file: str) -> str:
    """Return one spelling for each file that QEMU names: a block device has many (C(by-id), C(dm-3), a volume's name).

    Links elsewhere are not followed: whoever looks at a file system that hangs, hangs.
    """
    if not file.startswith("/"):
        return file
    return os.path.realpath(file) if file.startswith("/dev/") else os.path.normpath(file)
