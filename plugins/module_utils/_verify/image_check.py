# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the images of a set: their checksums, and with qemu-img their structure and what they read as."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .._common.errors import BackupError, ToolError, in_words
from .._qemu import image_commands, qemu_img
from .._qemu.image_chain import Layer, open_chain
from .._repository.annotations import Depth
from .._repository.images import check_all, layers
from .model import REMEDY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .model import ImageKey, SetCheck, SetImage
    from .run import VerifyRun


async def check_checksums(run: VerifyRun, check: SetCheck) -> None:
    """Compare the images with the checksums in the manifests, and what they say of themselves with the manifests."""
    images = check.images()
    errors = await asyncio.gather(*(_check_checksum(run, one) for one in images.values()))
    check.fail_images(Depth.CHECKSUM, {key: error for key, error in zip(images, errors) if error})
    layers = _layers(run, check)
    strange = {key: _check_header(layer) for key, layer in layers.items()}
    check.fail_images(Depth.CHECKSUM, {key: error for key, error in strange.items() if error})


def _layers(run: VerifyRun, check: SetCheck) -> dict[ImageKey, Layer]:
    """Return what the images of all good chains have to say of themselves, each once."""
    return {
        (manifest.id, image.name): Layer(*layer)
        for steps in check.chains.values()
        for (manifest, image), layer in zip(steps, layers(run.repository, steps))
    }


async def _check_checksum(run: VerifyRun, one: SetImage) -> str:
    async with run.processors:
        errors = await check_all(run.repository, [one])
    return "".join(f"{error}; {REMEDY}" for error in errors.values())


def _check_header(layer: Layer) -> str:
    """Return what is wrong with the header of an image; empty where nothing is."""
    try:
        with open_chain([layer]):
            return ""
    except (BackupError, OSError) as error:
        return f"{in_words(error)}; {REMEDY}"


async def check_images(run: VerifyRun, check: SetCheck) -> None:
    """Check each image alone, and then read each disk whole."""
    found = _layers(run, check)
    errors = await asyncio.gather(*(_check_image(run, layer) for layer in found.values()))
    check.fail_images(Depth.IMAGE, {key: error for key, error in zip(found, errors) if error})
    disks = list(check.chains)
    unreadable = await asyncio.gather(*(_read_disk(run, check.chains[disk]) for disk in disks))
    for disk, error in zip(disks, unreadable):
        if error:
            check.fail(disk, Depth.IMAGE, error)


async def _check_image(run: VerifyRun, layer: Layer) -> str:
    """Return what is wrong with one image, the others left aside."""
    try:
        async with run.processors:
            with open_chain([layer]) as image:
                # The QEMU that has made a published image may still have it open: all commands ignore locks (-U).
                command = ["qemu-img", "check", "-q", "-U", "--", image.name]
                await qemu_img.run_long(command, image.fds)
    except ToolError as error:
        return f"image {layer.path} is damaged: {error}; {REMEDY}"
    except (BackupError, OSError) as error:
        return f"{in_words(error)}; {REMEDY}"
    return ""


async def _read_disk(run: VerifyRun, steps: Sequence[SetImage]) -> str:
    """Read a disk with all images that it is made of, as a restore does."""
    try:
        async with run.processors:
            with open_chain(layers(run.repository, steps)) as chain:
                command = image_commands.read_command(chain.name, steps[0][1].virtual_size)
                await qemu_img.run_long(command, chain.fds)
    except ToolError as error:
        path = run.repository.set_image_path(*steps[0])
        return f"image {path} cannot be read whole: {error}; {REMEDY}"
    except (BackupError, OSError) as error:
        return f"{in_words(error)}; {REMEDY}"
    return ""
