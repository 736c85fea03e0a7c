# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the monitors that are asked for: those that are listed, domains of libvirt, and sockets that match a pattern."""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorError, Refused
from .._common.options import check_path
from .._common.selection import matching
from .address import LIBVIRT, FoundBy, parse_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from .address import Address
    from .domain_list import DomainEntry


PATTERNS = ("sockets", "domains", "exclude_domains")
"""The options with patterns, as the modules have them."""


@dataclass
class Discovery:
    """Which monitors were found, and in which way first. C(domains) are all that libvirt knows, where it was asked.

    C(failure) says why libvirt has not told them.
    """

    ways: dict[Address, FoundBy] = field(default_factory=dict)
    domains: dict[Address, DomainEntry] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    failure: str = ""


async def discover(listed: Iterable[Address], params: dict[str, Any]) -> Discovery:
    """Return the monitors that are listed, and those that a module's options stand for.

    Refused for a pattern that cannot be meant, BackupError where libvirt is to tell its domains and does not.
    """
    sockets, domains, excluded = (tuple(params[option] or ()) for option in PATTERNS)
    found = Discovery(dict.fromkeys(listed, FoundBy.LISTED))
    if domains or any(address.domain for address in found.ways):
        await _ask_libvirt(found, params["libvirt_uri"], bool(domains))
    for address in find_domains(found, domains, excluded, params["libvirt_uri"]):
        found.ways.setdefault(address, FoundBy.DOMAIN)
    for address in find_sockets(found, sockets):
        found.ways.setdefault(address, FoundBy.SOCKET)
    return found


async def _ask_libvirt(found: Discovery, libvirt_uri: str, is_needed: bool) -> None:
    """Ask libvirt once for all domains."""
    # Where nobody asks for one, it need not be loaded, and compiled.
    from .domain_list import list_domains  # noqa: PLC0415

    # This tells what is wrong with the address of libvirt, too.
    uri = parse_address(f"{LIBVIRT}any", "domains", libvirt_uri).uri
    try:
        entries = await list_domains(uri)
    except MonitorError as error:
        if is_needed:
            raise BackupError(f"domains: {error}") from error
        # Each domain that is listed will most likely tell by itself what is wrong.
        found.failure = str(error)
        return
    for entry in entries:
        try:
            found.domains[parse_address(f"{LIBVIRT}{entry.name}", "domains", uri)] = entry
        except Refused as refused:
            # One such name is no matter to the other domains.
            found.warnings.append(f"a domain cannot be backed up under its name: {refused}")


def find_domains(
    found: Discovery, patterns: Sequence[str], excluded: Sequence[str], libvirt_uri: str
) -> Iterator[Address]:
    """Return the domains that patterns stand for, without those that are excluded."""
    known = {entry.name: address for address, entry in found.domains.items()}
    found.warnings += [f"exclude_domains: no domain matches {one}" for one in excluded if not matching(one, known)]
    unwanted = {name for pattern in excluded for name in matching(pattern, known)}
    for pattern in patterns:
        names = matching(pattern, known)
        if not names and glob.has_magic(pattern):
            found.warnings.append(f"domains: no domain matches {pattern}")
        elif not names:
            # A name that is spelled out is meant, be there a domain or not.
            yield parse_address(f"{LIBVIRT}{pattern}", "domains", libvirt_uri)
        yield from (known[name] for name in names if name not in unwanted)


def find_sockets(found: Discovery, patterns: Iterable[str]) -> Iterator[Address]:
    """Return the sockets that patterns stand for."""
    for pattern in patterns:
        check_path("sockets", pattern)
        if not glob.has_magic(pattern):
            # A path that is spelled out is meant, be there a socket or not.
            yield parse_address(pattern, "sockets")
            continue
        paths = [path for path in sorted(glob.glob(pattern)) if _is_socket(path)]
        if not paths:
            found.warnings.append(f"no socket matches {pattern}")
        yield from (parse_address(path, "sockets") for path in paths)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
