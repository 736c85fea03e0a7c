# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask libvirt which domains there are, running and shut off, and what they say of their own backup.

None of these questions goes to a QEMU, so that a domain that hangs is no matter.
Reference: libvirt 9.0, libvirt-host.h and libvirt-domain.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import MonitorTimeout
from .._host.threads import within
from .address import SYSTEM
from .answers import Odd, quoted
from .domain import INACTIVE
from .domain_xml import parse_domain
from .libvirt_connection import NO_DOMAIN, load_binding, unreachable
from .libvirt_domain import CALL_TIMEOUT

if TYPE_CHECKING:
    from typing import Any

    from .domain_xml import Note


EACH_TIMEOUT = 10.0
"""Seconds for one domain, where libvirt does not list all of them."""
AT_ONCE = 8
"""How many are asked for at the same time: libvirt has 20 workers, and one that hangs keeps it."""
PLACES = ("/etc/libvirt/qemu", "/run/libvirt/qemu")
"""Where libvirt of the system has the definitions of domains, and the states of those that run."""
XML = ".xml"


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
        entries = await within(CALL_TIMEOUT, _ask, libvirt, uri)
    except asyncio.TimeoutError:
        entries = await _ask_each(libvirt, uri)
    return tuple(sorted(filter(None, entries), key=lambda entry: entry.name))


def _ask(libvirt: Any, uri: str) -> list[DomainEntry | None]:
    """Ask, for as long as libvirt takes."""
    connection = _open(libvirt, uri)
    try:
        return [_entry(libvirt, domain) for domain in connection.listAllDomains(0)]
    except libvirt.libvirtError as error:
        raise unreachable(uri, uri, error) from error
    finally:
        connection.close()


def _open(libvirt: Any, uri: str) -> Any:
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise unreachable(uri, uri, error) from error


async def _ask_each(libvirt: Any, uri: str) -> list[DomainEntry | None]:
    """Ask for each domain alone, on a connection of its own, as libvirt does not list them.

    It does not while it holds one of them locked: for its start, say, which waits for a file system or a hook.
    MonitorTimeout where nobody else tells which domains there are, or libvirt answers for none of them.
    """
    names = _names_by_files() if uri.startswith(SYSTEM) else []
    turns = asyncio.Semaphore(AT_ONCE)

    async def ask(name: str) -> DomainEntry | None:
        async with turns:
            try:
                return await within(EACH_TIMEOUT, _ask_one, libvirt, uri, name)
            except asyncio.TimeoutError:
                error = (
                    f"libvirt did not return the XML of this domain within {EACH_TIMEOUT:g} s, because another"
                    " operation of libvirt on this domain hangs: for example a start that waits for a file system or a"
                    " hook (/etc/libvirt/hooks)"
                )
                return DomainEntry(name, error=error)

    entries = await asyncio.gather(*map(ask, names))
    if not any(entry and entry.uuid for entry in entries):
        raise MonitorTimeout(
            f"libvirt at {uri} did not list its domains within {CALL_TIMEOUT:g} s: its daemon hangs, or has no free"
            " worker (see `virt-admin srv-threadpool-info libvirtd`)"
        )
    return entries


def _names_by_files() -> list[str]:
    """Return the names of the domains that are defined, or run, by the files that libvirt has of them."""
    found = set()
    for place in PLACES:
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            found |= {entry.name[: -len(XML)] for entry in entries if entry.name.endswith(XML) and entry.is_file()}
    return sorted(found)


def _ask_one(libvirt: Any, uri: str, name: str) -> DomainEntry | None:
    connection = _open(libvirt, uri)
    try:
        return _entry(libvirt, connection.lookupByName(name))
    except libvirt.libvirtError as error:
        if error.get_error_code() == NO_DOMAIN:
            # It has gone meanwhile.
            return None
        return DomainEntry(name, error=f"libvirt does not find this domain: {quoted(error)}")
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
        return DomainEntry(name, uuid, error=f"libvirt does not return its XML: {quoted(error)}")
    try:
        live, defined = map(parse_domain, texts)
    except Odd as odd:
        return DomainEntry(name, uuid, error=f"the XML of the domain makes no sense: {quoted(odd)}")
    # A policy may have been set for the domain as it runs only, or for its next start.
    return DomainEntry(name, uuid, live.policies or defined.policies)
