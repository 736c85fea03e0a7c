# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask libvirt about a domain that runs: its XML, and what libvirt does with it at the moment.

Reference: libvirt 9.0, virDomainJobOperation in libvirt-domain.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import MonitorError
from .answers import Odd, quoted
from .domain_disks import Domain
from .domain_xml import parse_domain

if TYPE_CHECKING:
    from typing import Any

    from .libvirt_domain import LibvirtDomain


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


async def read_domain(libvirt: LibvirtDomain) -> Domain:
    """Ask libvirt about a domain that runs. MonitorError where its XML cannot be read."""

    def ask() -> tuple[str, int, dict[str, Any]]:
        domain = libvirt.connection.domain
        kind = domain.jobInfo()[0]
        return domain.XMLDesc(0), kind, domain.jobStats() if kind else {}

    text, kind, told = await libvirt.call("the look at its XML and its job", ask)
    try:
        xml = parse_domain(text)
    except Odd as odd:
        raise MonitorError(f"{libvirt.address}: the XML of the domain makes no sense: {quoted(odd)}") from None
    return Domain(xml, _operation(told) if kind else "")


def _operation(told: dict[str, Any]) -> str:
    number = told.get("operation", 0)
    is_known = isinstance(number, int) and 0 <= number < len(OPERATIONS)
    return OPERATIONS[number] if is_known else OPERATIONS[0]
