# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check whether the VM of a set starts from its images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._common.errors import BackupError, in_words
from .._common.formats import utc_now
from .._host.process import machine_id
from .._qemu import qemu_img
from .._repository.annotation_documents import Depth, Pin
from .._repository.repository import DESCRIPTION
from . import boot
from .boot_options import BootDisk, qemu_options
from .manifest_check import read_description
from .record import annotate, remove_pins

if TYPE_CHECKING:
    from .._repository.documents import Manifest
    from .._repository.repository import Repository
    from .boot_options import BootOptions
    from .model import SetCheck
    from .run import VerifyRun


async def check_boot(run: VerifyRun, check: SetCheck, options: BootOptions) -> None:
    """Start a throwaway VM from a set that is good so far."""
    broken = [image.name for image in check.manifest.disks if image.name not in check.chains]
    if broken or "" in check.findings:
        _skip(check, "disk " + broken[0] if broken else "the set")
        return
    try:
        async with run.boot_lock:
            result = await start(run, check, options)
    except (BackupError, OSError) as error:
        result = boot.BootResult(in_words(error), is_backup_fault=False)
    if result.error:
        check.fail("", Depth.BOOT, result.error, console=result.console, is_backup_fault=result.is_backup_fault)


def _skip(check: SetCheck, culprit: str) -> None:
    reason = f"not started, since {culprit} is not good"
    before = check.findings.get("")
    if before:
        # The faults of the set itself are still told.
        check.fail("", before.depth, f"{before.error}; {reason}")
    else:
        check.fail("", Depth.BOOT, reason, is_backup_fault=False)


async def start(run: VerifyRun, check: SetCheck, options: BootOptions) -> boot.BootResult:
    """Start a throwaway VM, and wait for its sign of life. The set is pinned meanwhile."""
    boot.clear_work_dirs(options.tmpdir)
    with boot.work_dir(options.tmpdir) as directory:
        disks = await _create_overlays(run.repository, check.manifest, directory)
        try:
            description = read_description(run.repository, check.manifest)
            flash = boot.copy_flash(description, disks, directory)
            arguments = qemu_options(description, disks, flash, options, boot.this_host(), directory)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return boot.BootResult(f"{DESCRIPTION} does not describe a VM: {error!r}")
        pins = [_pin(check.manifest, disk) for disk in disks]
        pinned = await annotate(run, check, pins, "no prune is told that it is in use")
        try:
            return await boot.watch([options.qemu, *arguments], directory, options)
        finally:
            if pinned:
                await remove_pins(run.repository, check.catalog.name, pins)


async def _create_overlays(repository: Repository, manifest: Manifest, directory: str) -> list[BootDisk]:
    disks = []
    for number, image in enumerate(manifest.disks):
        overlay = os.path.join(directory, f"disk{number}.qcow2")
        path = os.path.abspath(repository.set_image_path(manifest, image))
        command = qemu_img.create_command(overlay, "qcow2", image.virtual_size, backing=(path, image.format))
        await qemu_img.run(command)
        disks.append(BootDisk(image.name, image.node, image.qdev, path, overlay))
    return disks


def _pin(manifest: Manifest, disk: BootDisk) -> Pin:
    return Pin(manifest.id, disk.name, disk.overlay, os.uname().nodename, machine_id(), utc_now())
