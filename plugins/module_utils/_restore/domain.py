# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Restore the domain of a set: check what stands in its way, and define it when its disks are in place.

A process that dies in between leaves disks that are complete, and maybe the state of a TPM, but no domain: the next
call finds them, and goes on. A new uuid is made of the set, the machine and the name, so that it is the same one then.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import uuid as uuids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, in_words
from .._common.formats import Word
from .._common.options import LONGEST_NAME
from .._host.directory import Directory
from .._host.process import machine_id
from .._host.threads import within
from .._qemu.address import parse_address
from .._qemu.answers import Odd
from .._qemu.domain_config import DOMAIN
from .._qemu.domain_xml import parse_domain, parse_xml
from .._qemu.tpm import LARGEST, STATE, losses, read_state, store
from . import libvirt_host
from .checks import is_restored, lock_target
from .definition import RestoredFrom, Wanted, is_nvram, needed_files, origin_of, redefine
from .libvirt_host import LibvirtHost
from .owners import refuse_owned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from .._qemu.address import Address
    from .._repository.repository import Repository
    from .libvirt_host import Look
    from .model import DiskRestore
    from .old_domain import OldDomain


class Identity(Word):
    """Whether a restored domain goes on under what the old one was known by."""

    KEEP = "keep"
    NEW = "new"


IDENTITIES = tuple(Identity)
LOOK_TIMEOUT = 60.0
"""Seconds for a look at a few files."""


@dataclass(frozen=True)
class DomainRequest:
    """What is asked for. C(name) is empty for the old one. With C(overwrite), an old domain is defined anew."""

    libvirt_uri: str
    name: str = ""
    uuid: Identity = Identity.KEEP
    mac: Identity = Identity.KEEP
    overwrite: bool = False


@dataclass(frozen=True)
class DomainRestore:
    """A domain that is restored: its definition, and the files of its TPM, by their paths.

    C(is_defined) says that libvirt has it already, from this set and with these disks. C(found) is how the domain of
    its name was defined when all was checked. C(notes) is what is to be known before it is started. With C(overwrite),
    files are replaced: those of C(replaced) exist, and are other ones.
    """

    address: Address
    uuid: str
    xml: str = field(repr=False)
    tpm: Mapping[str, bytes] = field(repr=False)
    is_defined: bool
    is_placed: bool
    found: str = field(default="", repr=False)
    notes: tuple[str, ...] = ()
    overwrite: bool = False
    replaced: tuple[str, ...] = ()

    @property
    def is_needed(self) -> bool:
        """Return whether something is to be done for it."""
        return not (self.is_defined and self.is_placed)

    def result(self) -> dict[str, Any]:
        """Return the module's return value C(domain)."""
        where = {"name": self.address.domain, "uuid": self.uuid, "libvirt_uri": self.address.uri}
        return {**where, "changed": self.is_needed}

    def describe(self, check_mode: bool) -> list[str]:
        """Return what has become of it, for people to read."""
        done = "is defined already" if self.is_defined else "would be defined" if check_mode else "was defined"
        return [f"domain {self.address.domain} ({self.uuid}) {done} at {self.address.uri}", *self.notes]


async def plan_domain(
    repository: Repository, domain: OldDomain, disks: Sequence[DiskRestore], request: DomainRequest
) -> DomainRestore:
    """Return the domain that is to be defined. Refused, BackupError for what stands in its way."""
    domain.check_disks(disks)
    manifest, description, old, root = domain.manifest, domain.description, domain.xml, domain.parse()
    address = parse_address(f"libvirt:{request.name or old.name}", "domain_name", request.libvirt_uri)
    if len(address.domain.encode()) > LONGEST_NAME - len(".xml"):
        raise Refused("domain_name", f"{address.domain[:60]!r}... is too long: libvirt has a file of that name")
    missing = await _missing(needed_files(root))
    if missing:
        raise Refused(
            "domain", f"the domain starts from {missing[0]}, which does not exist on this machine; copy it there first"
        )
    system = root.find("os/type")
    arch = "" if system is None else system.get("arch", "")
    look = await libvirt_host.ask(
        address, "the look at its domains", lambda host: host.look(root.get("type", ""), arch, old.machine)
    )
    if look.unfit:
        raise Refused("domain", f"libvirt at {address.uri} cannot run such a VM: {look.unfit}")
    origin = RestoredFrom(repository.uuid, manifest.id, manifest.attempt)
    uuid = old.uuid if request.uuid == Identity.KEEP else _drawn(origin, address)
    is_defined = _is_defined(look, origin, uuid, disks)
    _check_names(look, address, uuid, is_defined, request.overwrite)
    waiting = [disk.target for disk in disks if not is_restored(repository, disk)]
    if waiting and look.held:
        raise Refused("domain_name", f"domain {address.domain} {look.held}; it was left as it is")
    replaced = [target for target in waiting if os.path.lexists(target)]
    await refuse_owned(look.others, disks, replaced, look.own)
    files, notes = _tpm_files(description, address, uuid)
    if not request.overwrite:
        _check_state(files)
    wanted = Wanted(address.domain, uuid, request.mac == Identity.NEW)
    xml, more = redefine(root, wanted, disks, origin, look.emulators)
    closed = _closed_directory(disks, look.user)
    if closed:
        notes.append(f"it cannot be started yet: the user that QEMU runs as ({look.user[0]}) cannot enter {closed}")
    absent = [entry for entry in description.get("removed", ()) if entry.startswith(DOMAIN)]
    if absent:
        notes.append("not in the set, so give the domain again: {}".format("; ".join(absent)))
    is_placed = all(_content(path) == content for path, content in files.items())
    return DomainRestore(
        address, uuid, xml, files, is_defined, is_placed, look.xml, (*notes, *more), request.overwrite, tuple(replaced)
    )


async def define_domain(domain: DomainRestore, restored: Sequence[Mapping[str, Any]]) -> None:
    """Put the state of the TPM in its place, and define the domain, whose disks are complete."""
    address = domain.address
    async with lock_target(f"/{address.uri}/{address}"):
        try:
            if domain.is_needed:
                await _look_unchanged(domain)
            for path, content in domain.tpm.items():
                if _content(path) != content:
                    _place(path, content)
            if not domain.is_defined:
                await libvirt_host.ask(address, "the definition of the domain", lambda host: host.define(domain.xml))
        except (BackupError, OSError) as error:
            raise BackupError(
                f"{address}: the disks are restored, and the domain is not defined: {in_words(error)}. Call again",
                restored=list(restored),
            ) from error


async def check_again(domain: DomainRestore, disks: Sequence[DiskRestore]) -> None:
    """Raise BackupError where the disks of a domain must not be replaced any more: their copy has taken long."""
    look = await _look_unchanged(domain)
    _check_names(look, domain.address, domain.uuid, domain.is_defined, domain.overwrite)
    await refuse_owned(look.others, disks, domain.replaced, look.own)
    if not domain.overwrite:
        _check_state(domain.tpm)


async def _look_unchanged(domain: DomainRestore) -> Look:
    """Return a new look at a domain. BackupError where it has changed."""
    look = await libvirt_host.ask(domain.address, "the look at the domain", LibvirtHost.look_again)
    if look.xml != domain.found or look.held:
        raise BackupError(f"the domain has changed during the restore: it {look.held or 'was defined by others'}")
    return look


def _check_state(files: Mapping[str, bytes]) -> None:
    """Refuse to replace the state of a TPM that is another one."""
    for path, content in files.items():
        if os.path.lexists(path) and _content(path) != content:
            raise Refused("domain", f"{path} exists, and is not of this set; overwrite: true replaces it")


async def _missing(paths: Iterable[str]) -> list[str]:
    """Return which of these files are not there."""
    try:
        return await within(LOOK_TIMEOUT, lambda: [path for path in paths if not os.path.exists(path)])
    except asyncio.TimeoutError:
        raise BackupError(
            "domain: the files that it starts from (loader, kernel) have not been found within"
            f" {LOOK_TIMEOUT:g} s: a file system hangs"
        ) from None


def _drawn(origin: RestoredFrom, address: Address) -> str:
    """Return a new uuid for a domain."""
    place = f"{origin.repository}/{origin.attempt}/{machine_id()}/{address.uri}/{address.domain}"
    return str(uuids.uuid5(uuids.NAMESPACE_URL, place))


def _is_defined(look: Look, origin: RestoredFrom, uuid: str, disks: Sequence[DiskRestore]) -> bool:
    """Return whether libvirt has the domain already."""
    if not look.xml:
        return False
    try:
        there = parse_domain(look.xml)
        is_ours = origin_of(parse_xml(look.xml)) == origin and there.uuid == uuid
    except Odd:
        return False
    places = {disk.target: disk.source.path for disk in there.disks}
    is_same = all(
        (there.firmware.nvram if is_nvram(disk.image) else places.get(disk.name, disk.target)) == disk.target
        for disk in disks
    )
    return is_ours and is_same


def _check_names(look: Look, address: Address, uuid: str, is_defined: bool, overwrite: bool) -> None:
    """Refuse a name or a uuid that another domain has, and an old domain that must not get other disks."""
    name = address.domain
    other = next((one for one, known in look.uuids.items() if known == uuid and one != name), "")
    if other:
        raise Refused(
            "domain_uuid",
            f"domain {other} has the uuid {uuid}; domain_uuid: new gives the restored one its own, or undefine {other}",
        )
    known = look.uuids.get(name)
    if known is None or (is_defined and not overwrite):
        return
    if not overwrite:
        raise Refused(
            "domain_name",
            f"domain {name} exists, and this restore has not defined it; give another name, or replace its definition"
            " with overwrite: true",
        )
    if known != uuid:
        raise Refused(
            "domain_name", f"domain {name} is another one, of uuid {known}; undefine it, or give another name"
        )
    if look.held:
        raise Refused("domain_name", f"domain {name} {look.held}; it was left as it is")


def _closed_directory(disks: Sequence[DiskRestore], user: tuple[int, ...]) -> str:
    """Return a directory on the way to a disk that a user cannot pass, by its mode; empty where there is none."""
    if not user:
        return ""
    places = dict.fromkeys(os.path.dirname(os.path.realpath(disk.target)) for disk in disks)
    for place in places:
        parts = place.split("/")
        for path in ("/".join(parts[:number]) or "/" for number in range(1, len(parts) + 1)):
            if not os.path.isdir(path):
                # That of a target has to be there: the restore itself tells that.
                break
            status = os.stat(path)
            mine = 0o100 if status.st_uid == user[0] else 0o010 if status.st_gid == user[1] else 0o001
            if user[0] and not status.st_mode & mine:
                return path
    return ""


def _tpm_files(description: Mapping[str, Any], address: Address, uuid: str) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of the TPM's state by the paths that libvirt has for them, and what is to be known of it."""
    tpm = description.get("tpm") or {}
    state = tpm.get("state") or {}
    if not state:
        return {}, losses(description)
    if not store(address.uri, uuid, ""):
        return {}, [f"the state of its TPM is not put in place: the libvirt at {address.uri} keeps it elsewhere"]
    files = {}
    for name, text in state.items():
        if not STATE.fullmatch(name):
            raise BackupError(f"vm.json: {name[:60]!r} is no file of a TPM")
        kind = "tpm2" if name.startswith("tpm2") else "tpm1.2"
        try:
            content = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise BackupError(f"vm.json: the state of the TPM is damaged: {error}") from None
        if len(content) > LARGEST:
            raise BackupError(
                f"vm.json: the state of the TPM has {len(content)} bytes, and the state of a TPM never has so many"
            )
        files[os.path.join(store(address.uri, uuid, kind), name)] = content
    return files, []


def _content(path: str) -> bytes | None:
    """Return what stands in a file of a TPM; None where there is none."""
    found = read_state(os.path.dirname(path))[0].get(os.path.basename(path))
    return None if found is None else base64.b64decode(found)


def _place(path: str, content: bytes) -> None:
    """Write a file of a TPM. libvirt gives it, with its directory, to the user of swtpm when the domain is started."""
    place = os.path.dirname(path)
    above = os.path.dirname(place)
    for directory, mode in ((os.path.dirname(above), 0o711), (above, 0o711), (place, 0o700)):
        if not os.path.isdir(directory):
            os.mkdir(directory)
            os.chmod(directory, mode)
    with Directory.at(place) as directory_of_state:
        directory_of_state.write(os.path.basename(path), content)
        directory_of_state.sync()
