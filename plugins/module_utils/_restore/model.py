# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe what is asked of a restore, and what it has done."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.formats import Word, human
from .._host import target_files
from .._repository.pins import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from .._repository.documents import DiskImage, Manifest


class RestoreMethod(Word):
    """How a disk is brought back."""

    COPY = "copy"
    OVERLAY = "overlay"
    """As a thin image on top of the set."""


class Checksum(Word):
    """When the checksums of images are compared."""

    TRUE = "true"
    """Before a block device is written, or an overlay made; while an image file is written that has no name yet."""
    FALSE = "false"
    """Never."""
    DURING = "during"
    """While what is not an overlay is written, be it a block device."""


METHODS = tuple(RestoreMethod)
CHECKSUMS = tuple(Checksum)
FORMATS = ("qcow2", "raw")
RECEIPT = ".restored.json"
"""The name of the receipt beside a restored disk ends with this."""


@dataclass(frozen=True)
class DiskRestore:
    """One disk to be restored: the images that it is made of, newest first, and where it goes."""

    name: str
    chain: tuple[tuple[Manifest, DiskImage], ...]
    target: str
    format: str
    method: RestoreMethod

    @property
    def image(self) -> DiskImage:
        return self.chain[0][1]

    @property
    def manifest(self) -> Manifest:
        return self.chain[0][0]

    @property
    def block_device(self) -> bool:
        return target_files.is_block_device(self.target)

    @property
    def overlay(self) -> bool:
        return self.method == RestoreMethod.OVERLAY

    @property
    def receipt(self) -> str:
        return self.target + RECEIPT

    @property
    def partial(self) -> str:
        return self.target + PARTIAL

    @property
    def bytes(self) -> int:
        """The bytes that the target takes up by now."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.target).st_blocks * 512 if not self.block_device else self.image.virtual_size
        return 0

    def result(self, changed: bool) -> dict[str, Any]:
        """Return an entry of the module's return value C(restored)."""
        return {
            "disk": self.name,
            "target": self.target,
            "format": self.format,
            "method": self.method,
            "virtual_size": self.image.virtual_size,
            "bytes": self.bytes,
            "chain": [manifest.id for manifest, _image in self.chain],
            "changed": changed,
        }


@dataclass(frozen=True)
class RestoreOptions:
    """What is asked for."""

    overwrite: bool = False
    checksum: Checksum = Checksum.TRUE
    check_mode: bool = False

    def is_written_early(self, disk: DiskRestore) -> bool:
        """Return whether a disk is written while nobody knows yet if its images are good."""
        return not disk.overlay and (self.checksum == Checksum.DURING or not disk.block_device)


def headline(restored: Sequence[Mapping[str, Any]], check_mode: bool) -> str:
    """Return how many disks of a set were restored by this call."""
    made = sum(disk["changed"] for disk in restored)
    if check_mode:
        return f"{made} of {len(restored)} disks would be restored"
    return f"{made} of {len(restored)} disks were restored just now" if made else "all disks are there already"


def describe(restored: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return where each disk is, for people to read."""
    return [
        "{disk}: {target} ({format}, {size}, {method} of set {sets})".format(
            **disk, size=human(disk["virtual_size"]), sets=" on ".join(disk["chain"])
        )
        for disk in restored
    ]
