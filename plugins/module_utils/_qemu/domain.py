# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask libvirt about a domain: its XML, and what libvirt does with it at the moment.

Reference: libvirt 9.0, libvirt-domain.h and libvirt-storage.h.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import MonitorError
from .answers import Odd, quoted
from .domain_disks import Domain
from .domain_xml import parse_domain, parse_xml
from .libvirt_connection import NO_RIGHTS, NO_STORAGE_POOL, OPERATION_INVALID, OPERATION_TIMEOUT
from .libvirt_domain import LibvirtDomain

if TYPE_CHECKING:
    from typing import Any

    from .address import Address
    from .domain_xml import DomainXml, Source


OPERATIONS = (
    "an operation",
    "a start",
    "a save (virsh save, managedsave)",
    "a restore",
    "a migration to here",
    "a migration to another host",
    "a snapshot",
    "a revert to a snapshot",
    "a dump of its memory",
    "a backup (virsh backup-begin)",
    "the removal of a snapshot",
)
"""What a job of libvirt's does, by virDomainJobOperation."""
INACTIVE = 2
"""VIR_DOMAIN_XML_INACTIVE: a domain as it will be started next time."""
VOLUMES = {0: "file", 1: "block"}
"""The types of volumes that stand on this machine, by virStorageVolType."""
VOLUME = "volume"
"""The kind of an image that is named by its storage pool."""
DEVICE_VOLUME = "volume on a device"
"""The kind of such an image that is a block device, and nobody knows which."""
LOST_VOLUME = "volume of no pool"
"""The kind of such an image whose storage pool is not defined."""
UNKNOWN = (VOLUME, DEVICE_VOLUME, LOST_VOLUME)
"""The kinds of images of which nobody knows where they are."""
BELOW = ("dir", "fs", "netfs", "vstorage", "logical", "zfs")
"""The types of storage pools whose volumes stand below the path of the pool, under their own names."""
DEVICES = ("disk", "iscsi", "scsi", "mpath")
"""The types of storage pools whose volumes are block devices, under names that are found when the pool is started."""
FAR = ("rbd", "sheepdog", "gluster", "iscsi-direct")
"""The types of storage pools whose volumes are no files and no block devices."""


async def read_domain(libvirt: LibvirtDomain) -> Domain:
    """Ask libvirt about a domain that runs. MonitorError where its XML cannot be read."""

    def ask() -> tuple[str, str, int, dict[str, Any]]:
        domain = libvirt.connection.domain
        kind = domain.jobInfo()[0]
        return domain.XMLDesc(0), domain.XMLDesc(INACTIVE), kind, domain.jobStats() if kind else {}

    text, defined, kind, told = await libvirt.call("the look at its XML and its job", ask)
    xml, next_start = (_read(libvirt.address, one) for one in (text, defined))
    return Domain(xml, _operation(told) if kind else "", defined=next_start.disks)


async def read_definition(address: Address) -> Domain:
    """Ask libvirt what a domain that is shut off will be when it is started. MonitorError where it is not shut off.

    That is its definition; where its memory was saved, it is what it was then.
    """
    libvirt = LibvirtDomain(address)
    await libvirt.open()

    def ask() -> Domain:
        domain, library = libvirt.connection.domain, libvirt.connection.libvirt
        if domain.isActive():
            raise MonitorError(f"{address}: the domain has just been started")
        defined = _read(address, domain.XMLDesc(INACTIVE))
        saved = _saved_xml(libvirt)
        xml = _read(address, saved) if saved else defined
        disks = tuple(replace(disk, source=file_of(library, domain.connect(), disk.source)) for disk in xml.disks)
        return Domain(replace(xml, disks=disks), saved=bool(saved), defined=defined.disks)

    try:
        found: Domain = await libvirt.call("the look at its definition", ask)
    finally:
        await libvirt.close()
    return found


def _saved_xml(libvirt: LibvirtDomain) -> str:
    """Return what a domain was when its memory was saved; empty where it was not. MonitorError where it is not told."""
    library = libvirt.connection.libvirt
    try:
        return saved_xml(library, libvirt.connection.domain)
    except library.libvirtError as error:
        if error.get_error_code() in (OPERATION_TIMEOUT, *NO_RIGHTS) or not libvirt.connection.is_alive():
            raise
        name = libvirt.address.domain
        raise MonitorError(
            f"{libvirt.address}: libvirt cannot read the saved memory of the domain"
            f" ({quoted(error.get_error_message())}), so the disks of its next start are unknown. Start the domain, or"
            f" remove its saved memory (virsh managedsave-remove {name})"
        ) from None


def saved_xml(library: Any, domain: Any) -> str:
    """Return what a domain was when its memory was saved (virsh managedsave); empty where it was not.

    It will be that again. Unlike hasManagedSaveImage(), and like a start, this goes by the file, which may have gone.
    """
    try:
        return str(domain.managedSaveGetXMLDesc(0))
    except library.libvirtError as error:
        if error.get_error_code() != OPERATION_INVALID:
            raise
        return ""


def file_of(library: Any, connection: Any, source: Source) -> Source:
    """Return where an image stands that is a volume of a storage pool. A pool that is not active tells nothing."""
    if source.kind != VOLUME:
        return source
    pool, _slash, name = source.path.partition("/")
    try:
        volume = connection.storagePoolLookupByName(pool).storageVolLookupByName(name)
        kind, path = VOLUMES.get(volume.info()[0]), volume.path()
    except library.libvirtError:
        return source
    return replace(source, kind=kind, path=path) if kind else source


def place_of(library: Any, connection: Any, source: Source) -> Source:
    """Return where an image stands, of which a pool that is not active tells as much as its definition has.

    Its kind is one of C(UNKNOWN) where that is not enough.
    """
    found = file_of(library, connection, source)
    if found.kind != VOLUME:
        return found
    pool, _slash, name = source.path.partition("/")
    try:
        definition = parse_xml(connection.storagePoolLookupByName(pool).XMLDesc(0))
    except library.libvirtError as error:
        return replace(source, kind=LOST_VOLUME) if error.get_error_code() == NO_STORAGE_POOL else source
    except Odd:
        return source
    directory = definition.findtext("target/path", "")
    if definition.get("type") in BELOW and directory:
        return replace(source, kind="file", path=os.path.join(directory, name))
    kinds = {**dict.fromkeys(DEVICES, DEVICE_VOLUME), **dict.fromkeys(FAR, "network")}
    return replace(source, kind=kinds.get(definition.get("type", ""), VOLUME))


def _read(address: Address, text: str) -> DomainXml:
    try:
        return parse_domain(text)
    except Odd as odd:
        raise MonitorError(f"{address}: the XML of the domain makes no sense: {quoted(odd)}") from None


def _operation(told: dict[str, Any]) -> str:
    number = told.get("operation", 0)
    is_known = isinstance(number, int) and 0 <= number < len(OPERATIONS)
    return OPERATIONS[number] if is_known else OPERATIONS[0]
