# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the image that a backup is written to, reserve its space, and open it for QEMU, which never makes one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._host.files import AT_ONCE, step
from .._host.preallocate import top_up
from .._host.target_files import open_image
from . import qemu_img

if TYPE_CHECKING:
    from typing import IO, Any

    from .._host.directory import Directory
    from .._host.files import DirectCalls
    from .image_layout import ImageLayout


PAGE = 4096


@dataclass(frozen=True)
class Target:
    """An image that a job will write. C(size) is its virtual size and C(expected) the data to come, in bytes.

    C(fd) is a descriptor of it, where this process has one: by now another file may have its path. C(label) is the
    SELinux context with which a confined QEMU is given it, C(former_label) the one that it has without; both are empty
    where it keeps its own. C(layout) says what stands where in a new image; where there is none, QEMU decides.
    """

    path: str
    format: str
    size: int
    expected: int = 0
    compress: bool = False
    block_device: bool = False
    compression_type: str = "zstd"
    fd: int | None = None
    label: str = ""
    former_label: str = ""
    layout: ImageLayout | None = None

    @property
    def name(self) -> str:
        """Return the name by which this process opens the image."""
        return self.path if self.fd is None else qemu_img.by_descriptor(self.fd)

    @property
    def direct(self) -> bool:
        """Return whether O_DIRECT can work: compressed clusters are unaligned."""
        return not self.compress and qemu_img.is_aligned(self.format, self.size)

    def node(self, filename: str, direct: bool) -> str:
        """Return the C(json:) file name under which QEMU opens the image."""
        return "json:" + json.dumps(self.options(filename, direct))

    def options(self, filename: str, direct: bool) -> dict[str, Any]:
        """Return the options with which QEMU opens the image: nothing probed, no backing file opened.

        What is not said here a target gets from its source: a disk with aio=native would have no buffered target, and
        one with cache=unsafe none that is flushed.
        """
        flags = {"cache": {"direct": direct, "no-flush": False}, "read-only": False, "auto-read-only": False}
        file = {
            "driver": "host_device" if self.block_device else "file",
            "filename": filename,
            "aio": "threads",
            "locking": "auto",
            "discard": "unmap",
            **flags,
        }
        # Clusters that an existing image frees are used again, and so their space stays reserved.
        options: dict[str, Any] = {
            "driver": self.format,
            "file": file,
            "discard": "ignore",
            "detect-zeroes": "on",
            **flags,
        }
        if self.format != "raw":
            options["backing"] = None
        return options


@dataclass(frozen=True)
class Blank:
    """A new image in memory: its length in bytes, and the parts of it that are not zero, each with its offset."""

    length: int
    parts: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, path: str, fd: int) -> Blank:
        """Read a new image, which is open for reading."""
        with step(path, "it was read"), open(os.dup(fd), "rb") as image:
            content = image.read()
        pages = ((offset, content[offset : offset + PAGE]) for offset in range(0, len(content), PAGE))
        return cls(len(content), tuple((offset, page) for offset, page in pages if any(page)))

    def write(self, image: IO[bytes]) -> None:
        """Write this image into an empty file."""
        image.truncate(self.length)
        for offset, part in self.parts:
            image.seek(offset)
            image.write(part)


async def create(
    target: Target,
    backing: tuple[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    made: dict[tuple[str, ...], Blank] | None = None,
    calls: DirectCalls = AT_ONCE,
    directory: Directory | None = None,
) -> int:
    """Make a new image, readable by its owner only, and return a descriptor to read and write it.

    FileExistsError where the path is taken, whatever stands there. C(directory) is the one that the path is in, where
    it is open. C(made) remembers the images made: another one of the same kind is a copy, which spares the run of
    qemu-img. C(calls) is how the target's file system is called.
    """
    options = {"compression_type": target.compression_type} if target.format == "qcow2" and target.compress else None
    kind = tuple(qemu_img.create_command("", target.format, target.size, options, backing))
    blank = Blank(target.size, ()) if target.format == "raw" else (made or {}).get(kind)
    fd: int = await calls.run(_make_file, target.path, target.layout or blank, directory)
    try:
        if not (target.layout or blank):
            # By descriptor: another file may have the path by now.
            name = qemu_img.by_descriptor(fd)
            command = qemu_img.create_command(name, target.format, target.size, options, backing)
            await qemu_img.run(command, pass_fds=(*pass_fds, fd))
            # Images of other formats have identifiers of their own.
            if made is not None and target.format == "qcow2":
                made[kind] = await calls.run(Blank.of, target.path, fd)
    except BaseException:
        calls.close(fd)
        raise
    return fd


def _make_file(path: str, content: Blank | ImageLayout | None, directory: Directory | None = None) -> int:
    """Make a file, write an image into it, and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    with step(path, "it was made"):
        if directory is None:
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        else:
            fd = directory.open(os.path.basename(path), flags)
        try:
            if content:
                with open(fd, "wb", closefd=False) as image:
                    content.write(image)
        except BaseException:
            os.close(fd)
            raise
    return fd


def reserve(target: Target) -> bool:
    """Allocate the bytes that the job is expected to write, without changing the file's size.

    A guest's write fails when the copy of the old data does, whatever on-target-error says: only space that nobody
    else can take keeps a full file system from the guest. False where the file system cannot; BackupError where the
    space is not there.
    """
    return target.block_device or top_up(target.path, target.expected, target.fd)


def open_pair(target: Target, direct: bool) -> tuple[int, int]:
    """Open a target for an fdset: once to read, once to write. Raises OSError where the file system has no O_DIRECT."""
    flags = os.O_DIRECT if direct else 0
    reading = open_image(target.name, os.O_RDONLY | flags)
    try:
        return reading, open_image(target.name, os.O_RDWR | flags)
    except OSError:
        os.close(reading)
        raise
