# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make of the XML of a domain, as a set has it, that of the restored one: with other disks, and maybe other names.

It has no disk but those that are restored: others may be in use by the old domain, or be any file of this machine. What
it uses of the machine beside that is told.
Reference: libvirt, "Domain XML format" (9.0 and 12.9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .._qemu.disk_file import QCOW2
from .._qemu.domain_config import QEMU
from .._qemu.domain_disks import NVRAM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from xml.etree.ElementTree import Element

    from .._repository.documents import DiskImage
    from .model import DiskRestore


RESTORED = "https://github.com/vmfleet/backup/restored/1"
"""The name space of what a domain says of the set that it was restored from, in C(<metadata>)."""
NEEDED = ("os/loader", "os/kernel", "os/initrd", "os/dtb")
"""Elements that name files without which a domain does not start, and which are not in the set."""
REMOVABLE = ("cdrom", "floppy")
OTHERS = (
    "metadata",
    "title",
    "description",
    "resource",
    "loader",
    "kernel",
    "initrd",
    "dtb",
    "nvram",
    "disk",
    "emulator",
)
"""Elements whose paths are none of the machine's files, are replaced, or are told in another way."""
ENTROPY = ("/dev/random", "/dev/urandom", "/dev/hwrng")
OF_SOURCE = ("source", "backingStore", "mirror", "auth", "encryption", "reservations")
"""Elements of a disk that belong to where its image has stood, and how."""
OF_VARIABLES = ("template", "templateFormat", "format")
"""Attributes of UEFI variables that do not tell where they have stood."""


@dataclass(frozen=True)
class Wanted:
    """What a domain is to be called, and whether its network cards get addresses that nobody else has."""

    name: str
    uuid: str
    new_mac: bool = False


@dataclass(frozen=True)
class RestoredFrom:
    """The set that a domain is restored from: a domain that says this of itself is not defined once more."""

    repository: str
    id: str
    attempt: str


def is_nvram(image: DiskImage) -> bool:
    """Return whether an image is that of the UEFI variables of a domain."""
    return image.name == NVRAM


def needed_files(root: Element) -> Iterator[str]:
    """Return the files of its machine that a domain needs to start."""
    return (element.text.strip() for path in NEEDED for element in root.iterfind(path) if element.text)


def origin_of(root: Element) -> RestoredFrom | None:
    """Return the set that a domain was restored from, as it says; None where it says nothing of that."""
    note = root.find(f"metadata/{{{RESTORED}}}restored")
    return (
        None if note is None else RestoredFrom(note.get("repository", ""), note.get("set", ""), note.get("attempt", ""))
    )


def redefine(
    root: Element, wanted: Wanted, disks: Sequence[DiskRestore], origin: RestoredFrom, emulators: frozenset[str]
) -> tuple[str, list[str]]:
    """Return the XML of the restored domain, and what is to be known of it. C(root) is changed."""
    _set_identity(root, wanted)
    _set_origin(root, origin)
    nvram = next((disk for disk in disks if is_nvram(disk.image)), None)
    by_name = {disk.name: disk for disk in disks if disk is not nvram}
    notes = [
        *_replace_disks(root, by_name),
        *_replace_nvram(root, nvram),
        *_drop_varstore(root),
        *_drop_tpm_place(root),
        *_check_emulator(root, emulators),
        *_tell_uses(root),
    ]
    ElementTree.register_namespace("qemu", QEMU)
    ElementTree.register_namespace("vmfleet", RESTORED)
    return ElementTree.tostring(root, encoding="unicode"), notes


def _set_identity(root: Element, wanted: Wanted) -> None:
    old_uuid = root.findtext("uuid", "")
    _child(root, "name").text = wanted.name
    _child(root, "uuid").text = wanted.uuid
    for entry in root.iterfind("sysinfo/system/entry[@name='uuid']"):
        # libvirt refuses one that is not that of the domain.
        if entry.text == old_uuid:
            entry.text = wanted.uuid
    for generation in root.iterfind("genid"):
        # It tells a guest that it goes on from an older state; libvirt draws a new one.
        generation.text = None
    if wanted.new_mac:
        for interface in root.iterfind("devices/interface"):
            _remove(interface, "mac")


def _set_origin(root: Element, origin: RestoredFrom) -> None:
    metadata = _child(root, "metadata")
    tag = f"{{{RESTORED}}}restored"
    _remove(metadata, tag)
    attributes = {"repository": origin.repository, "set": origin.id, "attempt": origin.attempt}
    ElementTree.SubElement(metadata, tag, attributes)


def _replace_disks(root: Element, restored: Mapping[str, DiskRestore]) -> Iterator[str]:
    """Put the restored disks in the places of the old ones, and take out all others."""
    devices = _child(root, "devices")
    known = set()
    for element in devices.findall("disk"):
        target = element.find("target")
        name = "" if target is None else target.get("dev", "")
        known.add(name)
        if name in restored:
            _replace_disk(element, restored[name])
        elif element.get("device") in REMOVABLE:
            if element.find("source") is not None:
                _remove(element, "source")
                yield f"drive {name} is empty: what was in it is not in the set"
        else:
            devices.remove(element)
            yield f"disk {name} is not in the set, and was removed from the domain"
    for name in restored:
        if name not in known:
            yield f"disk {name} was restored, but belongs to no disk of the domain as it was defined; attach it"


def _replace_disk(element: Element, disk: DiskRestore) -> None:
    element.set("type", "block" if disk.block_device else "file")
    for tag in OF_SOURCE:
        _remove(element, tag)
    driver = element.find("driver")
    if driver is None:
        driver = ElementTree.Element("driver", {"name": "qemu"})
        element.insert(0, driver)
    driver.set("type", disk.format)
    if disk.format != QCOW2:
        # libvirt refuses what is only for the other format.
        _remove(driver, "metadata_cache")
        driver.attrib.pop("discard_no_unref", None)
    source = ElementTree.Element("source", {"dev" if disk.block_device else "file": disk.target})
    element.insert(list(element).index(driver) + 1, source)


def _replace_nvram(root: Element, nvram: DiskRestore | None) -> Iterator[str]:
    system = _child(root, "os")
    old = system.find("nvram")
    kept = {name: old.attrib[name] for name in OF_VARIABLES if name in old.attrib} if old is not None else {}
    _remove(system, "nvram")
    if nvram is not None or "template" in kept:
        element = ElementTree.SubElement(system, "nvram", kept)
        element.text = nvram.target if nvram else None
    if nvram is None and old is not None:
        # The file that it has named may be that of the old domain.
        yield "its UEFI variables are not in the set: the firmware begins without them"


def _drop_varstore(root: Element) -> Iterator[str]:
    """Let libvirt choose a new file for UEFI variables that are in no flash chip: the old one is the old domain's."""
    for store in root.iterfind("os/varstore"):
        if store.attrib.pop("path", ""):
            yield "its UEFI variables (<varstore>) are not in the set: the firmware begins without them"


def _drop_tpm_place(root: Element) -> Iterator[str]:
    """Let libvirt keep the state of the TPM where it keeps it by itself: the restored one is put there."""
    for backend in root.iterfind("devices/tpm/backend[@type='emulator']"):
        if backend.find("source") is not None:
            _remove(backend, "source")
            yield "the state of its TPM is in the default place of libvirt, not in the place of the old domain"


def _check_emulator(root: Element, emulators: frozenset[str]) -> Iterator[str]:
    """Let libvirt choose the emulator where it does not know the old one: it may be any program."""
    devices = _child(root, "devices")
    emulator = devices.find("emulator")
    path = "" if emulator is None else (emulator.text or "").strip()
    if emulator is not None and path not in emulators:
        devices.remove(emulator)
        yield f"libvirt does not know the emulator {path} here, and uses its own"


def _tell_uses(root: Element) -> Iterator[str]:
    """Return what a domain uses of its machine, which nobody has backed up, and which may not be there."""
    uses = list(needed_files(root))
    for interface in root.iterfind("devices/interface/source"):
        uses += [
            f"{kind} {interface.attrib[kind]}" for kind in ("network", "bridge", "dev") if kind in interface.attrib
        ]
    uses += _paths(root)
    counts = {"host devices": "devices/hostdev", "options for QEMU": f"{{{QEMU}}}commandline/{{{QEMU}}}arg"}
    for what, path in counts.items():
        number = len(root.findall(path))
        uses += [f"{what} ({number})"] if number else []
    if uses:
        yield "it uses of this machine: {}".format(", ".join(dict.fromkeys(uses)))


def _paths(element: Element, owner: str = "") -> Iterator[str]:
    """Return all other paths in a domain: shared directories, the memory of an NVDIMM, programs that libvirt starts."""
    for child in element:
        if child.tag not in OTHERS:
            name = child.tag if owner in ("", "devices") else owner
            for found in (*child.attrib.values(), (child.text or "").strip()):
                if found.startswith("/") and found not in ENTROPY:
                    yield f"{found} ({name})"
            yield from _paths(child, name)


def _child(parent: Element, tag: str) -> Element:
    """Return the first child of this tag, which is made where there is none."""
    found = parent.find(tag)
    return ElementTree.SubElement(parent, tag) if found is None else found


def _remove(parent: Element, tag: str) -> None:
    for child in parent.findall(tag):
        parent.remove(child)
