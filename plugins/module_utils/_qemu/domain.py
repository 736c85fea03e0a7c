# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask libvirt about a domain: its XML, and what libvirt does with it at the moment.

Reference: libvirt 9.0, libvirt-domain.h and libvirt-storage.h.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import MonitorError
from .answers import Odd, quoted
from .domain_disks import Domain
from .domain_xml import parse_domain
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


async def read_domain(libvirt: LibvirtDomain) -> Domain:
    """Ask libvirt about a domain that runs. MonitorError where its XML cannot be read."""

    def ask() -> tuple[str, int, dict[str, Any]]:
        domain = libvirt.connection.domain
        kind = domain.jobInfo()[0]
        return domain.XMLDesc(0), kind, domain.jobStats() if kind else {}

    text, kind, told = await libvirt.call("the look at its XML and its job", ask)
    return Domain(_read(libvirt.address, text), _operation(told) if kind else "")


async def read_definition(address: Address) -> Domain:
    """Ask libvirt how a domain is defined that is shut off. MonitorError where it is not."""
    libvirt = LibvirtDomain(address)
    await libvirt.open()

    def ask() -> Domain:
        domain = libvirt.connection.domain
        if domain.isActive():
            raise MonitorError(f"{address}: the domain has just been started")
        xml = _read(address, domain.XMLDesc(INACTIVE))
        library, connection = libvirt.connection.libvirt, domain.connect()
        disks = tuple(replace(disk, source=file_of(library, connection, disk.source)) for disk in xml.disks)
        return Domain(replace(xml, disks=disks), saved=bool(domain.hasManagedSaveImage(0)))

    try:
        found: Domain = await libvirt.call("the look at its definition", ask)
    finally:
        await libvirt.close()
    return found


def file_of(library: Any, connection: Any, source: Source) -> Source:
    """Return where an image stands that is a volume of a storage pool. A pool that is not active tells nothing."""
    if source.kind != "volume":
        return source
    pool, _slash, name = source.path.partition("/")
    try:
        volume = connection.storagePoolLookupByName(pool).storageVolLookupByName(name)
        kind, path = VOLUMES.get(volume.info()[0]), volume.path()
    except library.libvirtError:
        return source
    return replace(source, kind=kind, path=path) if kind else source


def _read(address: Address, text: str) -> DomainXml:
    try:
        return parse_domain(text)
    except Odd as odd:
        raise MonitorError(f"{address}: the XML of the domain makes no sense: {quoted(odd)}") from None


def _operation(told: dict[str, Any]) -> str:
    number = told.get("operation", 0)
    is_known = isinstance(number, int) and 0 <= number < len(OPERATIONS)
    return OPERATIONS[number] if is_known else OPERATIONS[0]
