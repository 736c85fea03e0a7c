# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the domain that is in a set, and tell which disks libvirt takes for it.

libvirt refuses others when the domain is defined, and by then they are in their places. Nothing asks it before that and
changes nothing: virConnectDomainXMLToNative() reads it like a definition, but goes on to what a start needs, so it
also refuses what can be defined, such as a CPU that this machine does not have.
Reference: libvirt 9.0, qemu_validate.c and domain_validate.c.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, in_words
from .._host.directory import WrongEntry
from .._qemu.answers import Odd
from .._qemu.domain_xml import parse_domain, parse_xml
from .._repository.description import is_as_written, read_description
from .._repository.repository import check_owner
from .definition import is_nvram

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any
    from xml.etree.ElementTree import Element

    from .._qemu.domain_xml import DomainXml
    from .._repository.documents import Manifest
    from .._repository.repository import Repository
    from .model import DiskRestore


@dataclass(frozen=True)
class OldDomain:
    """A domain as a set has it: what C(vm.json) says, and its XML."""

    manifest: Manifest
    description: Mapping[str, Any] = field(repr=False)
    xml: DomainXml

    def parse(self) -> Element:
        """Return its XML, which the caller may change."""
        return parse_xml(self.description["domain"]["xml"])

    def raw_files(self) -> dict[str, str]:
        """Return the disks that libvirt takes in format raw only, with what the names of their files end with."""
        is_raw = self.xml.firmware.nvram_format == "raw"
        nvram = {image.name: ".fd" for image in self.manifest.disks if is_nvram(image) and is_raw}
        # QEMU's driver of qcow2 keeps metadata in memory, so that only one VM can write to such an image.
        shared = {disk.target: ".raw" for disk in self.xml.disks if disk.shareable and not disk.read_only}
        return {**shared, **nvram}

    def check_disks(self, disks: Sequence[DiskRestore]) -> None:
        """Refuse disks that the domain cannot be defined with."""
        names = {disk.name for disk in disks}
        left_out = [image.name for image in self.manifest.disks if image.name not in names]
        if left_out:
            raise Refused(
                "disks",
                f"disk {left_out[0]} of set {self.manifest.id} is missing; a domain is defined with all of them",
            )
        raw, of_variables = self.raw_files(), self.xml.firmware.nvram_format
        for disk in disks:
            if not os.path.isabs(disk.target):
                raise Refused("target", f"{disk.target} is no absolute path, as libvirt needs it")
            if is_nvram(disk.image):
                # That of its firmware and of the template, and what internal snapshots may need.
                if disk.format != of_variables:
                    raise Refused(
                        "format",
                        f"{disk.target}: the UEFI variables of this domain are restored in format {of_variables}",
                    )
            elif disk.name in raw and disk.format != "raw":
                raise Refused(
                    "format",
                    f"{disk.target}: disk {disk.name} is shareable, and libvirt takes such a disk in format raw only",
                )
            old = self.xml.disk(disk.name)
            if old and old.device == "lun" and not disk.block_device:
                raise Refused(
                    "target",
                    f"{disk.target}: disk {disk.name} has device='lun', and libvirt takes only a block device for that;"
                    " name one in disks",
                )


def read_old_domain(repository: Repository, manifest: Manifest, checksum: bool) -> OldDomain:
    """Return the domain of a set. Refused where it has none, BackupError where that cannot be read.

    With C(checksum), it has to be what was written.
    """
    # Whoever can write its XML can have the domain do anything.
    check_owner(repository, manifest.vm.name)
    try:
        description = read_description(repository, manifest)
        if checksum and not is_as_written(repository, manifest):
            raise BackupError(
                f"VM {manifest.vm.name}: vm.json of set {manifest.id} is not what was written: its SHA-256 is another"
                " one than that in the manifest. If you have changed it yourself, use checksum: false"
            )
    except (OSError, ValueError, WrongEntry) as error:
        raise BackupError(
            f"VM {manifest.vm.name}: vm.json of set {manifest.id} cannot be read ({in_words(error)}), and no other"
            " file has the definition of the domain"
        ) from error
    domain = description.get("domain") or {}
    if not domain.get("xml"):
        raise Refused(
            "domain",
            f"set {manifest.id} has no definition of a domain: the backup did not reach its VM through libvirt"
            " (libvirt:NAME), or an earlier release made the set. Restore the disks, and define the domain by hand",
        )
    try:
        return OldDomain(manifest, description, parse_domain(domain["xml"]))
    except Odd as odd:
        raise BackupError(f"VM {manifest.vm.name}: vm.json of set {manifest.id}: {odd}") from None
