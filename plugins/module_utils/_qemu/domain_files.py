# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at a domain of libvirt that is shut off: by its definition, and by the files of its disks.

Its disks have the names that they have while it runs. So have the variables of its firmware, which are no disk to
libvirt.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorError
from .._host.threads import within
from .disk_file import FORMATS, DiskFile
from .domain import read_definition
from .domain_disks import ELSEWHERE, NVRAM, NVRAM_CHIP
from .domain_xml import LOCAL
from .image_files import inspect_files
from .model import Disk
from .qemu_img import TIMEOUT

if TYPE_CHECKING:
    from .address import Address
    from .domain_disks import Domain
    from .domain_xml import DomainDisk, DomainXml, Source
    from .model import Vm


async def inspect_domain(address: Address, name: str) -> Vm:
    """Return a domain that is shut off, as its definition and its files show it. InUse where it is not.

    MonitorGone where there is no such domain, MonitorError where libvirt does not tell how it is defined.
    """
    domain = await read_definition(address)
    files = await files_of(domain.xml)
    vm = await inspect_files(files, name or domain.xml.name, domain.xml.uuid, str(address))
    for disk in vm.disks:
        await _check_chain(disk, vm, domain.xml)
    return _as_defined(vm, domain)


async def with_other_drives(vm: Vm, address: Address) -> Vm:
    """Return a domain whose disks a storage daemon has open, with the drives that are not copied."""
    try:
        return _as_defined(vm, await read_definition(address))
    except MonitorError:
        # What is copied comes to its end without libvirt.
        return vm


async def files_of(xml: DomainXml) -> tuple[DiskFile, ...]:
    """Return the files that a domain writes to, and that can be copied while it is off."""
    files = [DiskFile(disk.target, disk.source.path, disk.source.format) for disk in xml.disks if _is_copied(disk)]
    variables, kind = xml.firmware.nvram, xml.firmware.nvram_kind
    # Before its first start, a domain has no file of them.
    if variables and (kind == "block" or (kind == "file" and await _is_there(variables))):
        files.append(DiskFile(NVRAM, variables, xml.firmware.nvram_format))
    return tuple(files)


async def _check_chain(disk: Disk, vm: Vm, xml: DomainXml) -> None:
    """Raise BackupError where a disk would be another one when the domain runs than its files say.

    QEMU gets the images that a definition names, whatever the header of the image above says. libvirt leaves such a
    definition, as when a domain is reverted to an internal snapshot from before a C(virsh blockpull).
    """
    defined = xml.disk(disk.name)
    if defined is None:
        return
    files = vm.chain(disk)
    for place, above in enumerate(files):
        below = files[place + 1] if place + 1 < len(files) else None
        if place == len(defined.chain):
            if below and defined.ends:
                raise _other_chain(disk, above.filename, "nothing", below.filename)
            return
        layer = defined.chain[place]
        if not (below and await _is_same(layer, below)):
            said = f"{below.filename} ({below.driver})" if below else "nothing"
            raise _other_chain(disk, above.filename, f"{layer.path} ({layer.format or 'no format'})", said)


def _other_chain(disk: Disk, image: str, defined: str, said: str) -> BackupError:
    return BackupError(
        f"disk {disk.name}: the definition of the domain says that {image} builds on {defined}, and the header of that"
        f" image says {said}: it is not clear what is on the disk. Back up the domain while it runs, when QEMU tells"
        " that; or correct the <backingStore> of the definition (virsh edit), or the header (qemu-img rebase -u)"
    )


async def _is_same(layer: Source, below: Disk) -> bool:
    """Return whether a layer of a definition may be the one that a header names. Of one far away, no names tell it."""
    if layer.format not in ("", below.driver):
        return False
    if layer.kind not in LOCAL:
        return not below.filename.startswith("/")
    if layer.path == below.filename:
        return True
    try:
        return await within(TIMEOUT, lambda: os.path.realpath(layer.path) == os.path.realpath(below.filename))
    except asyncio.TimeoutError:
        return False


async def _is_there(path: str) -> bool:
    try:
        await within(TIMEOUT, os.stat, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, asyncio.TimeoutError):
        # Whoever looks at it then tells that.
        pass
    return True


def _is_copied(disk: DomainDisk) -> bool:
    return (
        disk.device in ("disk", "floppy")
        and not disk.read_only
        and disk.source.kind in LOCAL
        and disk.source.format in FORMATS
    )


def _as_defined(vm: Vm, domain: Domain) -> Vm:
    """Return a domain with all drives that its definition has, those that cannot be copied among them."""
    known = {disk.target: disk for disk in domain.xml.disks}
    disks = tuple(
        replace(
            disk,
            qdev=NVRAM_CHIP if disk.name == NVRAM else "",
            shared=disk.name in known and known[disk.name].shareable,
        )
        for disk in vm.disks
    )
    names = {disk.name for disk in disks}
    firmware = domain.xml.firmware
    far = Disk(NVRAM, "", firmware.nvram_kind, qdev=NVRAM_CHIP, filename=firmware.nvram)
    others = [disk for target, disk in known.items() if target not in names and disk.source.kind not in ELSEWHERE]
    return replace(
        vm,
        disks=(
            *disks,
            *(_drive(disk) for disk in others if disk.source.kind != "none"),
            *[far] * (firmware.nvram_kind not in LOCAL),
        ),
        empty=tuple(disk.target for disk in others if disk.source.kind == "none"),
        domain=domain,
    )


def _drive(disk: DomainDisk) -> Disk:
    """Return a drive of which no file is looked at: it has no node."""
    source = disk.source
    is_local = source.kind in LOCAL
    return Disk(
        name=disk.target,
        node="",
        driver=source.format if is_local else source.kind,
        read_only=disk.read_only or disk.device == "cdrom",
        filename=source.path,
        file=source.path if is_local else "",
    )
