# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the image files of published sets, and compare their checksums with the manifests."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .._host.checksum import Stopped, sha256
from .._host.directory import WrongEntry
from .._host.files import step
from .names import vm_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .._host.pace import Pace
    from .documents import DiskImage, Manifest
    from .repository import Repository


def layers(
    repository: Repository, steps: Sequence[tuple[Manifest, DiskImage]]
) -> list[tuple[tuple[str, ...], int, str | None]]:
    """Return of each image of a chain where it is, the size of its disk, and what its header has to name."""
    names = [f"../{manifest.id}/{image.image}" for manifest, image in steps[1:]]
    return [
        ((repository.path, vm_directory(manifest.vm.name), manifest.id, image.image), image.virtual_size, name)
        for (manifest, image), name in zip(steps, [*names, None])
    ]


async def check_all(
    repository: Repository,
    images: Iterable[tuple[Manifest, DiskImage]],
    paces: Mapping[tuple[str, str], Pace] | None = None,
) -> dict[tuple[str, str], str]:
    """Return what is wrong with these images, by set id and disk. Each processor reads one at a time.

    C(paces) has, by the same, those that another process reads at this moment. An image that was made without a
    checksum cannot be checked, and counts as good.
    """
    loop = asyncio.get_running_loop()
    checked = [(manifest, image) for manifest, image in images if image.sha256]
    stop = threading.Event()

    def check(manifest: Manifest, image: DiskImage) -> str:
        return _check(repository, manifest, image, (paces or {}).get((manifest.id, image.name)), stop)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            found = await asyncio.gather(*(loop.run_in_executor(pool, check, *one) for one in checked))
        finally:
            # The pool waits for its threads, and nobody waits for what they would find.
            stop.set()
    return {(manifest.id, image.name): error for (manifest, image), error in zip(checked, found) if error}


def _check(
    repository: Repository, manifest: Manifest, image: DiskImage, pace: Pace | None, stop: threading.Event
) -> str:
    """Return what is wrong with one image; empty where nothing is."""
    path = repository.set_image_path(manifest, image)
    try:
        with step(path, "its checksum was taken"), repository.opened(manifest.vm.name, manifest.id) as place:
            fd = place.open(image.image)
        try:
            found = sha256(path, fd, pace, stop)
        finally:
            os.close(fd)
    except Stopped:
        return ""
    except WrongEntry as error:
        return str(error)
    except OSError as error:
        return f"image {path} cannot be read: {error.strerror}"
    if found != image.sha256:
        return f"image {path} is not what was written: its SHA-256 is {found}, and was {image.sha256}"
    return ""
