# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe what is asked of a restore."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.words import Word
from .._host import files
from .._repository.annotations import PARTIAL

if TYPE_CHECKING:
    from typing import Any

    from .._repository.documents import DiskImage, Manifest
    from .._repository.repository import Repository


class RestoreMethod(Word):
    """How a disk is brought back."""

    COPY = "copy"
    OVERLAY = "overlay"
    """As a thin image on top of the set."""


METHODS = (RestoreMethod.COPY, RestoreMethod.OVERLAY)
FORMATS = ("qcow2", "raw")
RECEIPT = ".restored.json"


@dataclass(frozen=True)
class DiskRestore:
    """One disk to be brought back: the images that it is made of, newest first, and where it goes."""

    disk: str
    steps: tuple[tuple[Manifest, DiskImage], ...]
    target: str
    format: str
    method: str

    @property
    def image(self) -> DiskImage:
        return self.steps[0][1]

    @property
    def manifest(self) -> Manifest:
        return self.steps[0][0]

    @property
    def block_device(self) -> bool:
        return files.is_block_device(self.target)

    @property
    def receipt(self) -> str:
        return self.target + RECEIPT

    @property
    def partial(self) -> str:
        return self.target + PARTIAL

    def result(self, changed: bool, size: int) -> dict[str, Any]:
        return {
            "disk": self.disk,
            "target": self.target,
            "format": self.format,
            "method": self.method,
            "virtual_size": self.image.virtual_size,
            "bytes": size,
            "chain": [manifest.id for manifest, _image in self.steps],
            "changed": changed,
        }


@dataclass(frozen=True)
class RestoreOptions:
    """What is asked for. C(checksum) takes the checksums of all images of the chains first."""

    overwrite: bool = False
    checksum: bool = True
    check_mode: bool = False


def size_of(piece: DiskRestore) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(piece.target).st_blocks * 512 if not piece.block_device else piece.image.virtual_size
    return 0


def image_path(repository: Repository, piece: DiskRestore) -> str:
    return os.path.join(repository.set_path(piece.manifest.vm.name, piece.manifest.id), piece.image.image)
