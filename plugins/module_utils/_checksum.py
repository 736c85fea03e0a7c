# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Checksums of images, many at a time: hashlib works outside of the interpreter's lock."""

from __future__ import annotations

import asyncio
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._files import step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import DiskImage, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository import Repository

READ_SIZE = 1 << 20


def sha256(path: str) -> str:
    """The checksum of what is on the disk, not of what the page cache remembers, which keeps nothing of it.

    What a hypervisor has in its memory is worth more than a backup that nobody reads again today.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(READ_SIZE))
    with step(path, "its checksum was taken"), open(path, "rb", buffering=0) as image:
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while True:
            count = image.readinto(piece)
            if not count:
                return digest.hexdigest()
            digest.update(piece[:count])
            os.posix_fadvise(image.fileno(), 0, image.tell(), os.POSIX_FADV_DONTNEED)


async def check_all(repository: Repository, images: Iterable[tuple[Manifest, DiskImage]]) -> dict[tuple[str, str], str]:
    """What is wrong with these images, by set id and disk, one for each processor at a time.

    An image that was made without a checksum cannot be checked, and counts as good.
    """
    loop = asyncio.get_running_loop()
    checked = [(manifest, image) for manifest, image in images if image.sha256]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = await asyncio.gather(*(loop.run_in_executor(pool, _check, repository, *one) for one in checked))
    return {(manifest.id, image.name): error for (manifest, image), error in zip(checked, found) if error}


def _check(repository: Repository, manifest: Manifest, image: DiskImage) -> str:
    path = os.path.join(repository.set_path(manifest.vm.name, manifest.id), image.image)
    try:
        found = sha256(path)
    except OSError as error:
        return f"image {path} cannot be read: {error.strerror}"
    if found != image.sha256:
        return f"image {path} is not what was written: its SHA-256 is {found}, and was {image.sha256}"
    return ""
