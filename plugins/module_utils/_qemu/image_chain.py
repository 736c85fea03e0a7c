# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Open the images of a chain as what their manifests say that they are, whatever their headers say.

QEMU would open each file that a header names, here or in the network. So each layer is given to it by its descriptor,
with its format, and with what it builds on; and an image whose header says anything else is refused before that.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .._common.errors import BackupError
from .._host.directory import Directory
from . import qemu_img
from .qcow2 import read_header
from .qemu_img import CLUSTER, by_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from .qcow2 import Header


FORMAT = "qcow2"
MEASURE_TIMEOUT = 600.0
"""Seconds for measuring a chain: for that the tables of all its images are read. Without it, the sizes of files do."""


class ImageRefused(BackupError):
    """The header of an image says something else than its manifest."""


class Layer(NamedTuple):
    """An image as its manifest has it: C(size) is the disk's, in bytes; C(backing) is what its header has to name.

    C(place) is a directory, the names of those below it, and that of the file: no link is followed from there on.
    """

    place: tuple[str, ...]
    size: int
    backing: str | None

    @property
    def path(self) -> str:
        return os.path.join(*self.place)


@dataclass(frozen=True)
class Chain:
    """The open images that a disk is made of, the top one first: their descriptors, and the sizes of their clusters."""

    fds: tuple[int, ...]
    clusters: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the C(json:) name by which a command reads all of it that was given the descriptors.

        The tables of all layers are read a cluster at a time, and not the 4 KiB at a time that are good for a guest:
        QEMU gives a backup of a large disk all of its tables, however little is on the disk.
        """
        node: dict[str, Any] | None = None
        for fd, cluster in zip(reversed(self.fds), reversed(self.clusters)):
            tables = {"l2-cache-entry-size": min(cluster, CLUSTER)}
            node = {
                "driver": FORMAT,
                "file": {"driver": "file", "filename": by_descriptor(fd)},
                **tables,
                "backing": node,
            }
        return "json:" + json.dumps(node)

    async def copy_bytes(self, size: int) -> int:
        """Return the most that a qcow2 copy takes of all this; C(size) is the disk's, in bytes.

        C(qemu-img measure) counts the tables of a disk that is full, 10 GiB for one of 64 TiB: a copy has those only
        that tell of data, in the worst case one for each cluster.
        """
        command = qemu_img.measure_command(self.name, "", FORMAT)
        measured = await qemu_img.run_json(command, MEASURE_TIMEOUT, self.fds)
        tables = int(measured["fully-allocated"]) - -(-size // CLUSTER) * CLUSTER
        data = int(measured["required"]) - tables
        needed = data + data // 1024 + (size >> 26) + 8 * CLUSTER
        return data + min(tables, needed)


@contextlib.contextmanager
def open_chain(layers: Iterable[tuple[tuple[str, ...], int, str | None]]) -> Iterator[Chain]:
    """Open images, each given as a Layer, the top one first; the last one is taken to build on nothing.

    ImageRefused where a header says something else.
    """
    _raise_limit()
    with contextlib.ExitStack() as stack:
        opened = [_open(stack, Layer(*layer)) for layer in layers]
        yield Chain(tuple(fd for fd, _cluster in opened), tuple(cluster for _fd, cluster in opened))


def checked_image(fd: int, path: str, size: int) -> Chain:
    """Return an open image that builds on nothing. ImageRefused where its header says something else."""
    return Chain((fd,), (_check(fd, Layer((path,), size, None)),))


def _raise_limit() -> None:
    """Let this process have as many files open as it may: several chains are, each of hundreds of images."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open(stack: contextlib.ExitStack, layer: Layer) -> tuple[int, int]:
    """Return the descriptor of an image, and the size of its clusters."""
    *places, name = layer.place
    with Directory.at(*places) as directory:
        fd = directory.open(name)
    stack.callback(os.close, fd)
    return fd, _check(fd, layer)


def _check(fd: int, layer: Layer) -> int:
    """Return the size of an image's clusters. ImageRefused where its header says something else than its manifest."""
    try:
        header = read_header(fd)
    except ValueError as error:
        raise ImageRefused(f"image {layer.path} is damaged: {error}") from error
    reason = _strange(header, layer)
    if reason:
        raise ImageRefused(f"image {layer.path} is that of another disk or set, or was changed: {reason}")
    return 1 << header.cluster_bits


def _strange(header: Header, layer: Layer) -> str:
    """Return what a header says that the manifest does not; empty where the two fit."""
    if header.encrypted:
        return "it is encrypted, and images of a set never are"
    if header.data_file is not None:
        return f"its data is in another file ({_told(header.data_file)}), and images of a set never have one"
    if header.size != layer.size:
        return f"it has {header.size} bytes, and the disk had {layer.size}"
    if header.backing != layer.backing:
        return f"it builds on {_told(header.backing)}, but must build on {_told(layer.backing)}"
    if header.backing and header.backing_format not in (None, FORMAT):
        return f"it builds on {_told(header.backing)} as {header.backing_format!r}, but must do so as {FORMAT}"
    return ""


def _told(name: str | None) -> str:
    """Return a name for people to read, whatever it is made of."""
    return repr(name) if name else "nothing"
