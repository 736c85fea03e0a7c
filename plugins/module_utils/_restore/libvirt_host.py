# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask the libvirt of this machine what it has and can run, and define a domain there.

Calls block for as long as libvirt does: each is made in a thread, for a time that has an end.
Reference: libvirt 9.0, virConnectGetDomainCapabilities() and virDomainDefineXML().
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorGone
from .._host.threads import within
from .._qemu.answers import Odd, quoted
from .._qemu.domain import INACTIVE, UNKNOWN, place_of, saved_xml
from .._qemu.domain_xml import LOCAL, Source, parse_domain, parse_xml
from .._qemu.libvirt_connection import NO_DOMAIN, LibvirtConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, TypeVar
    from xml.etree.ElementTree import Element

    from .._qemu.address import Address

    T = TypeVar("T")


HOST_TIMEOUT = 60.0
"""Seconds for what is asked of libvirt at one time: it takes milliseconds, and seconds where a QEMU is new to it."""


@dataclass(frozen=True)
class Look:
    """What libvirt has. C(unfit) says why it cannot run such a VM; C(uuids) are those of all domains, by their names.

    C(user) is who its QEMUs run as, by numbers, where libvirt tells that. C(xml) is how the domain of the name that is
    asked for is defined, and C(held) why it must not be defined anew. C(own) are its images then, and C(others) those
    of each other domain.
    """

    unfit: str
    uuids: Mapping[str, str] = field(default_factory=dict)
    emulators: frozenset[str] = frozenset()
    user: tuple[int, ...] = ()
    xml: str = ""
    held: str = ""
    own: tuple[Source, ...] = ()
    others: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownDomain:
    """The images of a domain. C(tops) are those that its disks are on, C(images) also those that these build on.

    C(is_saved) says that it has a saved state (C(virsh managedsave)), with which it goes on.
    """

    images: tuple[Source, ...]
    tops: tuple[Source, ...]
    is_saved: bool


class LibvirtHost(LibvirtConnection):
    """A connection to the libvirt of this machine, and to a domain that it may have."""

    def is_active(self) -> bool:
        """Return true: an error of libvirt is not taken for the end of a QEMU."""
        return True

    def look(self, kind: str, arch: str, machine: str) -> Look:
        """Look at what there is, and whether a VM of this kind can run here."""
        connection = self._connection
        try:
            told = connection.getDomainCapabilities(None, arch or None, machine or None, kind or None, 0)
            default = parse_xml(told).findtext("path", "")
            known = parse_xml(connection.getCapabilities())
        except (self.libvirt.libvirtError, Odd) as error:
            return Look(quoted(error))
        emulators = frozenset({default, *(element.text or "" for element in known.iter("emulator"))})
        return replace(self.look_again(), emulators=emulators, user=_user(known, kind))

    def look_again(self) -> Look:
        """Look at what may have changed since the first look: the domains."""
        uuids = {domain.name(): domain.UUIDString() for domain in self._connection.listAllDomains(0)}
        look = Look("", uuids, others=self._others_images())
        if self.domain is None:
            return look
        own = tuple(self._images(partial(self.domain.XMLDesc, INACTIVE)))
        return replace(look, xml=self.domain.XMLDesc(INACTIVE), held=self._held(), own=own)

    def define(self, xml: str) -> str:
        """Define a domain, and return its uuid."""
        return str(self._connection.defineXML(xml).UUIDString())

    def _others_images(self) -> dict[str, tuple[Source, ...]]:
        """Return the images of each other domain: as it is defined, as it runs, and as it was saved."""
        found = {}
        for domain in self._connection.listAllDomains(0):
            name = domain.name()
            if name != self.address.domain:
                found[name] = tuple(source for look in _looks(domain) for source in self._images(look))
        return found

    def known_domains(self) -> dict[str, KnownDomain]:
        """Return the images of all domains, by their names."""
        found = {}
        for domain in self._connection.listAllDomains(0):
            looks = [self._tops_and_below(look) for look in _looks(domain)]
            images = tuple(source for look in looks for source in chain(*look))
            tops = tuple(source for top, _below in looks for source in top)
            found[domain.name()] = KnownDomain(images, tops, self._is_saved(domain))
        return found

    def _is_saved(self, domain: Any) -> bool:
        """Tell whether a domain goes on from a saved state, be that one that nobody can read."""
        try:
            return bool(saved_xml(self.libvirt, domain))
        except self.libvirt.libvirtError as error:
            if not self.is_alive():
                raise
            # It may have gone at this moment.
            return bool(error.get_error_code() != NO_DOMAIN)

    def _images(self, look: Callable[[], str]) -> Iterator[Source]:
        """Return the files and block devices that an XML names, and the volumes that may be such."""
        tops, below = self._tops_and_below(look)
        return chain(tops, below)

    def _tops_and_below(self, look: Callable[[], str]) -> tuple[list[Source], list[Source]]:
        """Return of the images of _images() those that a guest writes to, and those that these build on."""
        try:
            xml = parse_domain(look())
        except Odd:
            # It is none that anybody could start.
            return [], []
        except self.libvirt.libvirtError:
            if not self.is_alive():
                raise
            # It has gone at this moment, or was not saved.
            return [], []
        firmware = xml.firmware
        variables = Source(firmware.nvram_kind, firmware.nvram, firmware.nvram_format)
        tops = [*(disk.source for disk in xml.disks), variables]
        return [*self._placed(tops)], [*self._placed(layer for disk in xml.disks for layer in disk.chain)]

    def _placed(self, named: Iterable[Source]) -> Iterator[Source]:
        """Return where these images stand, without those that are on no file system or device of a machine."""
        for each in named:
            source = place_of(self.libvirt, self._connection, each)
            if source.kind in (*LOCAL, *UNKNOWN) and source.path:
                yield source

    def _held(self) -> str:
        """Return why the domain must not be defined anew with other disks."""
        if self.domain.isActive():
            return "runs"
        if self._is_saved(self.domain):
            return "has a saved state (virsh managedsave), which belongs to its old disks"
        if self.domain.snapshotNum() or self.domain.listAllCheckpoints(0):
            return "has snapshots or checkpoints, which belong to its old disks"
        return ""

    def _find(self) -> None:
        try:
            super()._find()
        except MonitorGone:
            self.domain = None


def _looks(domain: Any) -> tuple[Callable[[], str], ...]:
    """Return the calls for the XML of a domain: as it is defined, as it runs, and as it was saved."""
    return partial(domain.XMLDesc, INACTIVE), partial(domain.XMLDesc, 0), partial(domain.managedSaveGetXMLDesc, 0)


def _user(capabilities: Element, kind: str) -> tuple[int, ...]:
    """Return the user and the group that QEMUs run as; nothing where that is not told."""
    for model in capabilities.iterfind("host/secmodel[model='dac']"):
        found = re.fullmatch(r"\+(\d{1,9}):\+(\d{1,9})", model.findtext(f"baselabel[@type='{kind}']", ""))
        if found:
            return int(found[1]), int(found[2])
    return ()


async def ask(address: Address, what: str, question: Callable[[LibvirtHost], T]) -> T:
    """Connect to libvirt, and return its answer to a question. C(what) is asked is told where that goes wrong."""

    def call() -> Any:
        host = LibvirtHost(address)
        try:
            host.open()
            return host.call(what, lambda: question(host))
        finally:
            host.close()

    try:
        found: T = await within(HOST_TIMEOUT, call)
    except asyncio.TimeoutError:
        raise BackupError(f"{address}: no answer of libvirt to {what} within {HOST_TIMEOUT:g} s: it hangs") from None
    return found
