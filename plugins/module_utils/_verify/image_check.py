# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the images of a set: their checksums, and with qemu-img their structure and what they read as."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from .._common.errors import ToolError
from .._qemu import qemu_img
from .._repository.annotation_documents import Depth
from .._repository.checksums import check_all
from .model import REMEDY

if TYPE_CHECKING:
    from .model import SetCheck, SetImage
    from .run import VerifyRun


MAX_COMPLAINTS = 3
"""Lines of qemu-img check that are told; there may be one for each cluster."""


async def check_checksums(run: VerifyRun, check: SetCheck) -> None:
    """Compare the images with the checksums in the manifests."""
    images = check.images()
    errors = await asyncio.gather(*(_check_checksum(run, one) for one in images.values()))
    check.fail_images(Depth.CHECKSUM, {key: error for key, error in zip(images, errors) if error})


async def _check_checksum(run: VerifyRun, one: SetImage) -> str:
    async with run.processors:
        errors = await check_all(run.repository, [one])
    return "".join(f"{error}; {REMEDY}" for error in errors.values())


async def check_images(run: VerifyRun, check: SetCheck) -> None:
    """Check each image alone, and then read each disk whole."""
    images = check.images()
    errors = await asyncio.gather(*(_check_image(run, one, _expected_backing(check, one)) for one in images.values()))
    check.fail_images(Depth.IMAGE, {key: error for key, error in zip(images, errors) if error})
    disks = list(check.chains)
    unreadable = await asyncio.gather(*(_read_disk(run, check.chains[disk][0]) for disk in disks))
    for disk, error in zip(disks, unreadable):
        if error:
            check.fail(disk, Depth.IMAGE, error)


def _expected_backing(check: SetCheck, one: SetImage) -> str | None:
    """Return the backing file name that an image has to have, None for a full one."""
    image = one[1]
    base = check.catalog.records.published(image.parent.id) if image.parent else None
    below = base.disk(image.name) if base else None
    return f"../{base.id}/{below.image}" if base and below else None


async def _check_image(run: VerifyRun, one: SetImage, backing: str | None) -> str:
    """Return what is wrong with one image, the others left aside."""
    path, image = run.repository.set_image_path(*one), one[1]
    try:
        async with run.processors:
            # The QEMU that has made a published image may still have it open: all commands ignore locks (-U).
            told = await qemu_img.run_json(qemu_img.info_command(path, image.format, shared=True))
            await qemu_img.run(check_command(path, image.format), timeout=qemu_img.LONG_TIMEOUT)
    except ToolError as error:
        return f"image {path} is damaged: {shorten(str(error))}; {REMEDY}"
    if told.get("virtual-size") != image.virtual_size:
        return (
            f"image {path} is that of another disk: it has {told.get('virtual-size')} bytes, and the disk had"
            f" {image.virtual_size}; {REMEDY}"
        )
    if told.get("backing-filename") != backing:
        found = told.get("backing-filename") or "nothing"
        return (
            f"image {path} is that of another disk or set: it builds on {found}, and should on"
            f" {backing or 'nothing'}; {REMEDY}"
        )
    return ""


async def _read_disk(run: VerifyRun, one: SetImage) -> str:
    """Read a disk with all images that it is made of, as a restore does."""
    path, image = run.repository.set_image_path(*one), one[1]
    try:
        async with run.processors:
            source = await qemu_img.whole(path, image.format)
            command = qemu_img.read_command(source, image.virtual_size)
            await qemu_img.run(command, timeout=qemu_img.LONG_TIMEOUT)
    except ToolError as error:
        return f"image {path} cannot be read whole: {shorten(str(error))}; {REMEDY}"
    return ""


def check_command(path: str, image_format: str) -> list[str]:
    """Return C(qemu-img check) of one image. What it builds on is not opened: that is checked by itself."""
    image = {"driver": image_format, "backing": None, "file": {"driver": "file", "filename": path}}
    return ["qemu-img", "check", "-q", "-U", "--", "json:" + json.dumps(image)]


def shorten(text: str) -> str:
    """Return the first lines of a text as one, and how many more there are."""
    lines = [line for line in text.splitlines() if line]
    more = len(lines) - MAX_COMPLAINTS
    return " / ".join(lines[:MAX_COMPLAINTS]) + (f" and {more} more lines" if more > 0 else "")
