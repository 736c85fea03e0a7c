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
from .._qemu.image_chain import FORMAT, open_chain
from .._repository.annotations import Depth, Pin
from .._repository.description import read_description
from .._repository.images import layers
from . import boot
from .boot_files import BootFiles
from .boot_options import BootDisk, Handed, flash_chips, named_files, qemu_options
from .boot_values import checked
from .record import annotate, remove_pins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .._repository.documents import Manifest
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
    except (BackupError, OSError, ValueError) as error:
        # It was not tried, which says nothing of the set.
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
    with boot.work_dir(options.tmpdir) as directory, BootFiles(directory, options.files) as files:
        disks = [await _overlay(run, check, number, files) for number in range(len(check.manifest.disks))]
        description = read_description(run.repository, check.manifest)
        handed = _hand(description, disks, options, files)
        arguments = qemu_options(description, disks, handed, options, boot.this_host(options.user))
        # QEMU is told of a descriptor before it is to use it.
        told = [word for fd in files.sets for word in ("-add-fd", f"fd={fd},set={fd}")]
        pins = [_pin(check.manifest, disk) for disk in disks]
        pinned = await annotate(run, check, pins, "no note says that it is in use, so a prune may remove it")
        try:
            return await boot.watch([options.qemu, *told, *arguments], directory, options, files.inherited)
        finally:
            if pinned:
                await remove_pins(run.repository, check.catalog.name, pins)


async def _overlay(run: VerifyRun, check: SetCheck, number: int, files: BootFiles) -> BootDisk:
    """Make an overlay for a disk of the set, and open it with all that it builds on."""
    image = check.manifest.disks[number]
    name = f"disk{number}.qcow2"
    await qemu_img.run(qemu_img.create_command(files.path(name), FORMAT, image.virtual_size))
    chain = files.enter_context(open_chain(layers(run.repository, check.chains[image.name])))
    files.inherited += chain.fds
    below = tuple(files.name(fd) for fd in chain.fds)
    overlay = files.name(files.open(name, os.O_RDWR))
    return BootDisk(image.name, image.node, image.qdev, files.path(name), overlay, below)


def _hand(description: Mapping[str, Any], disks: Sequence[BootDisk], options: BootOptions, files: BootFiles) -> Handed:
    """Open what QEMU gets beside the disks."""
    named = {option: _firmware(path, option, files) for option, path in named_files(description, options).items()}
    chips = flash_chips(description) if options.with_flash else []
    others = [chip for chip in chips if chip["name"] not in {disk.name for disk in disks}]
    flash = {chip["name"]: files.flash(chip.get("file", ""), f"flash{number}") for number, chip in enumerate(others)}
    console = files.name(files.open("console", os.O_WRONLY | os.O_CREAT))
    return Handed(named, flash, console, files.listen("agent") if options.agent else 0)


def _firmware(path: str, option: str, files: BootFiles) -> str:
    """Return what an option that names a file gets. QEMU finds its own firmware by a name without a directory."""
    return checked("firmware", path) if option == "-bios" and "/" not in path else files.kernel(path, option)


def _pin(manifest: Manifest, disk: BootDisk) -> Pin:
    return Pin(manifest.id, disk.name, disk.path, os.uname().nodename, machine_id(), utc_now())
