# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask libvirt which domains there are, running and shut off, and what they say of their own backup.

None of these questions goes to a QEMU, so that a domain that hangs is no matter.
Reference: libvirt 9.0, libvirt-host.h and libvirt-domain.h.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import MonitorTimeout
from .._host.threads import within
from .answers import Odd, quoted
from .domain import INACTIVE
from .domain_xml import parse_domain
from .libvirt_connection import NO_DOMAIN, load_binding, unreachable
from .libvirt_domain import CALL_TIMEOUT

if TYPE_CHECKING:
    from typing import Any

    from .domain_xml import Note


@dataclass(frozen=True)
class DomainEntry:
    """A domain that libvirt knows. C(policies) is what it says of its backup, C(error) why that cannot be read."""

    name: str
    uuid: str = ""
    policies: tuple[Note, ...] = ()
    error: str = ""

    @property
    def is_excluded(self) -> bool:
        """Return whether the domain says that it is not to be backed up."""
        return any(("skip", "yes") in policy.attributes for policy in self.policies)


async def list_domains(uri: str) -> tuple[DomainEntry, ...]:
    """Return all domains by their names. MonitorError where libvirt does not tell them."""
    libvirt = load_binding(uri)[0]
    try:
        return await within(CALL_TIMEOUT, _ask, libvirt, uri)
    except asyncio.TimeoutError:
        raise MonitorTimeout(
            f"libvirt at {uri} has not told its domains within {CALL_TIMEOUT:g} s: its daemon hangs, or has no worker"
            " left (see `virt-admin srv-threadpool-info libvirtd`)"
        ) from None


def _ask(libvirt: Any, uri: str) -> tuple[DomainEntry, ...]:
    """Ask, for as long as libvirt takes."""
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise unreachable(uri, uri, error) from error
    try:
        entries = (_entry(libvirt, domain) for domain in connection.listAllDomains(0))
        return tuple(sorted(filter(None, entries), key=lambda entry: entry.name))
    except libvirt.libvirtError as error:
        raise unreachable(uri, uri, error) from error
    finally:
        connection.close()


def _entry(libvirt: Any, domain: Any) -> DomainEntry | None:
    """Return what is told of a domain; None for one that has gone meanwhile."""
    name, uuid = domain.name(), domain.UUIDString()
    try:
        texts = domain.XMLDesc(0), domain.XMLDesc(INACTIVE)
    except libvirt.libvirtError as error:
        if error.get_error_code() == NO_DOMAIN:
            return None
        return DomainEntry(name, uuid, error=f"libvirt does not tell its XML: {quoted(error)}")
    try:
        live, defined = map(parse_domain, texts)
    except Odd as odd:
        return DomainEntry(name, uuid, error=f"the XML of the domain makes no sense: {quoted(odd)}")
    # A policy may have been set for the domain as it runs only, or for its next start.
    return DomainEntry(name, uuid, live.policies or defined.policies)
