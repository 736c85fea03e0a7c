# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at a VM that is off by the files of its disks, and change the bitmaps that are stored in them.

Nothing here keeps a VM from starting: a look takes no locks, and a change takes milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, ToolError, in_words
from .._host.open_files import users_of
from .._host.threads import within
from . import qemu_img
from .answers import check_answer
from .disk_file import QCOW2
from .image_commands import bitmap_command, info_command
from .image_lock import is_locked
from .model import OFF, Vm
from .query import read_disk
from .stored_bitmaps import read_bitmaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, TypeVar

    from .disk_file import DiskFile
    from .model import Bitmap, Disk

    T = TypeVar("T")


NODE = "off"
"""What the names of the nodes of such disks begin with, in the storage daemon that copies them."""


class InUse(BackupError):
    """A QEMU has a disk open: its VM is not off, or another program is at work on it."""


def node_name(number: int) -> str:
    """Return the name of the node of a VM's disk, by its place in the list."""
    return f"{NODE}{number}"


# To look


async def inspect_files(files: Sequence[DiskFile], name: str, uuid: str, monitor: str) -> Vm:
    """Return a VM that is off, as its files show it. BackupError where they do not, InUse where it is not off.

    Its identity is left open unless it has a C(uuid). C(monitor) is where it listens when it is on.
    """
    found = await asyncio.gather(*(_inspect(number, file) for number, file in enumerate(files)))
    return Vm(
        name=name,
        uuid=uuid,
        identity=uuid,
        status=OFF,
        version="",
        disks=tuple(chain[0] for chain in found),
        other_nodes=tuple(layer for chain in found for layer in chain[1:]),
        empty=(),
        jobs=(),
        fdsets={},
        process=None,
        monitor=monitor,
    )


async def _inspect(number: int, file: DiskFile) -> list[Disk]:
    """Return a disk and the layers that it is made of, top first."""
    try:
        await _check_unused(file)
        command = info_command(file.file, file.format, shared=True, layers=True)
        chain: list[dict[str, Any]] = await qemu_img.run_json(command)
        records = [await _stored(file, layer) for layer in chain]
        is_device = await ask(file, _is_device, file.file)
        # Of an image that is being opened, and of one whose bitmaps are changed, no bitmaps are seen for a moment.
        await _check_unused(file)
    except (OSError, ToolError, ValueError) as error:
        raise BackupError(f"disk {file.name}: {file.file} cannot be looked at: {in_words(error)}") from error
    names = [node_name(number), *(f"{node_name(number)}.{place}" for place in range(1, len(chain)))]
    nodes = [
        {"node-name": name, "drv": layer["format"], "ro": False, "file": layer["filename"], "image": layer}
        for name, layer in zip(names, chain)
    ]
    check_answer("query-named-block-nodes", nodes)
    sizes = [layer.get("actual-size") for layer in chain]
    encrypted = [layer.get("encrypted", False) for layer in chain]
    disks = [
        replace(
            read_disk(
                node,
                node["node-name"] if place else file.name,
                layers=tuple(names[place + 1 :]),
                backing_format=chain[place + 1]["format"] if place + 1 < len(chain) else "",
                layer_size=sizes[place],
                actual_size=None if None in sizes[place:] else sum(sizes[place:]),
                encrypted=any(encrypted[place:]),
                file=node["file"],
            ),
            bitmaps=records[place],
        )
        for place, node in enumerate(nodes)
    ]
    if is_device:
        # Another machine may have it in use, and no lock tells that: its metadata is nothing to write to.
        disks[0] = replace(disks[0], keeps_bitmaps=False, bitmaps=())
    return disks


async def _check_unused(file: DiskFile) -> None:
    if await ask(file, _is_in_use, file.file):
        users = await ask(file, users_of, file.file)
        who = ", ".join(users.names) or "a QEMU that cannot be seen from here"
        raise InUse(f"disk {file.name} ({file.file}) is in use by {who}")


def _is_in_use(path: str) -> bool:
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ValueError("it is neither a file nor a block device")
    return is_locked(path)


def _is_device(path: str) -> bool:
    return stat.S_ISBLK(os.stat(path).st_mode)


async def ask(disk: DiskFile | Disk, look: Callable[[str], T], path: str) -> T:
    """Return what a look at the file of a disk, or of one of its layers, shows.

    BackupError where its file system does not answer: the loop goes on without it.
    """
    try:
        return await within(qemu_img.TIMEOUT, look, path)
    except asyncio.TimeoutError:
        raise BackupError(
            f"disk {disk.name}: {path} cannot be looked at: its file system has not answered within"
            f" {qemu_img.TIMEOUT:g} s"
        ) from None


async def _stored(file: DiskFile, layer: dict[str, Any]) -> tuple[Bitmap, ...]:
    """Return the bitmaps that a layer holds; none where its name does not tell its file."""
    if layer["format"] != QCOW2 or not layer["filename"].startswith("/"):
        return ()
    return await ask(file, _read, layer["filename"])


def _read(path: str) -> tuple[Bitmap, ...]:
    # The path may lead to something else by now: nothing waits for the other end of a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return read_bitmaps(fd)
    finally:
        os.close(fd)


async def options(file: DiskFile, node: str) -> dict[str, Any]:
    """Return the options with which a disk is opened to be copied: to read it only, so that its bitmaps are safe.

    As long as it is open no VM can open it to write: QEMU's lock does not allow that.
    """
    return {
        "node-name": node,
        "driver": file.format,
        "read-only": True,
        "file": {
            "driver": "host_device" if await ask(file, _is_device, file.file) else "file",
            "filename": file.file,
            "read-only": True,
            "locking": "on",
        },
    }


# To change


async def add_bitmap(disk: Disk, name: str) -> None:
    """Store a new bitmap in the image of a disk. It marks what is written from now on."""
    await qemu_img.run(bitmap_command("add", disk.file, disk.driver, name))


async def remove_bitmaps(vm: Vm, bitmaps: Iterable[tuple[str, str]]) -> None:
    """Remove stored bitmaps of a VM's disks, each given as node and name; one that is gone already is none to remove.

    Raises ToolError for one that stays, the disk being in use, after all others have been removed.
    """
    disks = {disk.node: disk for disk in vm.disks}
    refused: ToolError | None = None
    for node, name in bitmaps:
        disk = disks[node]
        try:
            await qemu_img.run(bitmap_command("remove", disk.file, disk.driver, name))
        except ToolError as error:
            if any(bitmap.name == name for bitmap in await ask(disk, _read, disk.file)):
                refused = refused or error
    if refused:
        raise refused
