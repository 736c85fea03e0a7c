# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read what libvirt says of a domain, its XML, as frozen data: of one that runs, or as it is defined.

Whoever may define domains has written most of it, and a repository may hold it: nothing in it is believed. Odd names
the element that is something else than it should be.

Reference: libvirt, "Domain XML format" (9.0 and 12.9).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError, TreeBuilder, XMLParser

from .answers import Odd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any
    from xml.etree.ElementTree import Element


LONGEST = 16 << 20
"""Characters of the longest XML that is read: libvirt's own messages have no more than 32 MiB."""
DEEPEST = 256
"""How deep elements may lie in each other, as to libxml2, and so to libvirt.

Each layer of a disk is one level, and libvirt opens 200 of them.
"""
MOST_DISKS = 1000
LONGEST_VALUE = 4096
"""Characters of the longest name or path."""
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
POLICY = "https://github.com/vmfleet/backup/policy/1"
"""The name space of what a domain says of its own backup, in C(<metadata>)."""
DEVICES = ("disk", "cdrom", "floppy", "lun")
LOCATIONS = {"file": "file", "block": "dev", "dir": "dir", "vhostuser": "path", "vhostvdpa": "dev"}
"""The attribute of C(<source>) that says where the image stands, by the type of the disk."""

LOCAL = ("file", "block")
"""The kinds of sources that are on this machine."""


@dataclass(frozen=True)
class Source:
    """Where an image of a disk stands. C(kind) is libvirt's type of it, or C(none).

    C(path) is that of a file, device or socket; else it tells images from each other, and no secret is in it. C(index)
    is a part of the names of its nodes in QEMU; None where the domain does not run.
    """

    kind: str = "none"
    path: str = ""
    format: str = ""
    index: int | None = None


@dataclass(frozen=True)
class DomainDisk:
    """A disk of a domain. C(target) is its name, on or off; C(alias) the id of its device in QEMU, while it runs.

    C(chain) are the images below its own, the nearest first, and C(ends) says that there are no others below these. Of
    one that is off, they are what its definition says, if it says any. C(indexes) are all indexes that belong to it.
    """

    target: str
    bus: str = ""
    device: str = "disk"
    alias: str = ""
    source: Source = field(default_factory=Source)
    read_only: bool = False
    shareable: bool = False
    transient: bool = False
    chain: tuple[Source, ...] = ()
    ends: bool = False
    indexes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Firmware:
    """What a domain boots with. C(auto) is what libvirt is to find (C(efi)), C(nvram) where its UEFI variables are.

    C(nvram_kind) is libvirt's type of that source. C(varstore) is a file of variables that is no flash chip's.
    """

    auto: str = ""
    loader: str = ""
    loader_type: str = ""
    nvram: str = ""
    template: str = ""
    nvram_format: str = "raw"
    nvram_kind: str = "file"
    varstore: str = ""


@dataclass(frozen=True)
class Tpm:
    """A TPM. C(backend) is C(emulator) where swtpm keeps its state in a file, and C(secret) the uuid of its key.

    C(place) is the directory of that state, or with C(file://) the file, where somebody has chosen it.
    """

    model: str = ""
    backend: str = ""
    version: str = ""
    secret: str = ""
    place: str = ""


@dataclass(frozen=True)
class Note:
    """An element that a domain holds of its own backup: its name, what it says, and what is in it."""

    name: str
    attributes: tuple[tuple[str, str], ...] = ()
    children: tuple[Note, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class DomainXml:
    """A domain, as its XML tells. C(policies) are the elements about its backup; more than one is a mistake."""

    name: str
    uuid: str
    kind: str = ""
    machine: str = ""
    firmware: Firmware = field(default_factory=Firmware)
    tpm: Tpm | None = None
    disks: tuple[DomainDisk, ...] = ()
    policies: tuple[Note, ...] = ()

    def disk(self, target: str) -> DomainDisk | None:
        return next((disk for disk in self.disks if disk.target == target), None)


class _Builder(TreeBuilder):
    """Builds the tree of one document that has neither a DTD, and so no entities of its own, nor a bottomless depth."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def doctype(self, _name: str, _public: str | None, _system: str | None) -> None:
        raise Odd("has a document type, which no domain has", "the XML")

    def start(self, tag: Any, attrs: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise Odd("is nested too deep", "the XML")
        return super().start(tag, attrs)

    def end(self, tag: Any) -> Any:
        self._depth -= 1
        return super().end(tag)


def parse_domain(text: str) -> DomainXml:
    """Read the XML of a domain. Raises Odd."""
    root = parse_xml(text)
    if root.tag != "domain":
        raise Odd(f"is a {root.tag[:60]!r}, not a domain", "the XML")
    uuid = _text(root.find("uuid"), "domain.uuid")
    if not UUID.fullmatch(uuid):
        raise Odd("is no uuid", "domain.uuid")
    disks = tuple(_disk(element, f"domain.devices.disk[{number}]") for number, element in _disks(root))
    targets = [disk.target for disk in disks]
    twin = next((target for target in targets if targets.count(target) > 1), "")
    if twin:
        raise Odd(f"has two disks with the target {twin}", "domain.devices")
    kind = root.find("os/type")
    return DomainXml(
        name=_text(root.find("name"), "domain.name"),
        uuid=uuid,
        kind=_value(root, "type", "domain"),
        machine=_value(kind, "machine", "domain.os.type"),
        firmware=_firmware(root),
        tpm=_tpm(root),
        disks=disks,
        policies=tuple(_note(element) for element in root.iterfind(f"metadata/{{{POLICY}}}backup")),
    )


def parse_xml(text: str) -> Element:
    """Return the tree of an XML document from outside. Raises Odd."""
    if len(text) > LONGEST:
        raise Odd(f"has {len(text)} characters, and no domain needs more than {LONGEST}", "the XML")
    parser = XMLParser(target=_Builder())
    try:
        parser.feed(text)
        root: Element = parser.close()
    except ParseError as error:
        raise Odd(f"cannot be read: {error}", "the XML") from None
    except UnicodeEncodeError:
        raise Odd("is no text in Unicode", "the XML") from None
    return root


def _disks(root: Element) -> Iterator[tuple[int, Element]]:
    found = list(root.iterfind("devices/disk"))
    if len(found) > MOST_DISKS:
        raise Odd(f"has {len(found)} disks", "domain.devices")
    return enumerate(found)


def _disk(element: Element, place: str) -> DomainDisk:
    target = element.find("target")
    if target is None:
        raise Odd("has no target", place)
    name = _value(target, "dev", f"{place}.target")
    if not TARGET.fullmatch(name):
        raise Odd(f"has no name of a disk as its dev: {name[:60]!r}", f"{place}.target")
    device = _value(element, "device", place) or "disk"
    if device not in DEVICES:
        raise Odd(f"is a device of a kind that nobody knows: {device[:60]!r}", place)
    driver, alias = element.find("driver"), element.find("alias")
    own_format = _value(driver, "type", f"{place}.driver")
    return DomainDisk(
        target=name,
        bus=_value(target, "bus", f"{place}.target"),
        device=device,
        alias=_value(alias, "name", f"{place}.alias"),
        source=_source(element, place, own_format),
        read_only=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        chain=tuple(_layers(element, place)),
        ends=_ends(element),
        indexes=frozenset(_indexes(element, place)),
    )


def _layers(element: Element, place: str) -> Iterator[Source]:
    """Return the images below that of a disk. The element of the last one is empty, where libvirt knows it."""
    layer = element.find("backingStore")
    while layer is not None and layer.get("type"):
        place += ".backingStore"
        form = layer.find("format")
        yield _source(layer, place, _value(form, "type", f"{place}.format"))
        layer = layer.find("backingStore")


def _ends(element: Element) -> bool:
    layer: Element | None = element
    while layer is not None and (layer is element or layer.get("type")):
        layer = layer.find("backingStore")
    return layer is not None


def _source(element: Element, place: str, image_format: str) -> Source:
    source = element.find("source")
    if source is None:
        return Source(format=image_format)
    kind = _value(element, "type", place) or "file"
    place = f"{place}.source"
    index = source.get("index", element.get("index") if element.tag == "backingStore" else None)
    path = _path(source, kind, place)
    # An empty drive may keep the kind of what was in it.
    return Source(kind if path else "none", path, image_format, None if index is None else _number(index, place))


def _path(source: Element, kind: str, place: str) -> str:
    if kind in LOCATIONS:
        return _value(source, LOCATIONS[kind], place)
    if kind == "volume":
        return "{}/{}".format(_value(source, "pool", place), _value(source, "volume", place)).strip("/")
    if kind == "network":
        return "{}:{}".format(_value(source, "protocol", place), _value(source, "name", place)).strip(":")
    if kind == "nvme":
        address = source.find("address")
        parts = (
            [] if address is None else [_value(address, name, place) for name in ("domain", "bus", "slot", "function")]
        )
        return ":".join([*parts, _value(source, "namespace", place)]).strip(":")
    raise Odd(f"is of a kind that nobody knows: {kind[:60]!r}", place)


def _indexes(element: Element, place: str) -> Iterator[int]:
    """Return every index in a disk: of its images, of data files beside them, and of what it is being copied to."""
    for part in element.iter():
        if part.tag in ("source", "backingStore", "dataStore", "mirror") and "index" in part.attrib:
            yield _number(part.attrib["index"], f"{place}.{part.tag}")


def _firmware(root: Element) -> Firmware:
    element = root.find("os")
    if element is None:
        return Firmware()
    loader, nvram = element.find("loader"), element.find("nvram")
    variables, template, kind = "", "", "file"
    if nvram is not None:
        source = nvram.find("source")
        kind = _value(nvram, "type", "domain.os.nvram") or kind
        variables = _optional(nvram, "domain.os.nvram") if source is None else _path(source, kind, "domain.os.nvram")
        template = _value(nvram, "template", "domain.os.nvram")
    return Firmware(
        auto=_value(element, "firmware", "domain.os"),
        loader=_optional(loader, "domain.os.loader"),
        loader_type=_value(loader, "type", "domain.os.loader"),
        nvram=variables,
        template=template,
        nvram_format=_value(nvram, "format", "domain.os.nvram") or "raw",
        nvram_kind=kind,
        varstore=_value(element.find("varstore"), "path", "domain.os.varstore"),
    )


def _tpm(root: Element) -> Tpm | None:
    element = root.find("devices/tpm")
    if element is None:
        return None
    place = "domain.devices.tpm"
    backend, secret, source = (element.find(path) for path in ("backend", "backend/encryption", "backend/source"))
    kind, path = (_value(source, name, f"{place}.backend.source") for name in ("type", "path"))
    return Tpm(
        model=_value(element, "model", place),
        backend=_value(backend, "type", f"{place}.backend"),
        version=_value(backend, "version", f"{place}.backend"),
        secret=_value(secret, "secret", f"{place}.backend.encryption"),
        place=f"file://{path}" if kind == "file" else path if kind == "dir" else "",
    )


def _note(element: Element) -> Note:
    return Note(
        name=element.tag.replace(f"{{{POLICY}}}", ""),
        attributes=tuple((name, element.attrib[name]) for name in element.attrib),
        children=tuple(_note(child) for child in element),
        text=(element.text or "").strip(),
    )


def _value(element: Element | None, name: str, place: str) -> str:
    """Return an attribute; empty where it, or the element, is not there."""
    return "" if element is None else _bounded(element.get(name, ""), f"{place}@{name}")


def _optional(element: Element | None, place: str) -> str:
    """Return the text of an element; empty where it is not there."""
    return "" if element is None else _bounded((element.text or "").strip(), place)


def _text(element: Element | None, place: str) -> str:
    if element is None or not element.text:
        raise Odd("is missing", place)
    # Spaces belong to the name of a domain.
    return _bounded(element.text, place)


def _bounded(found: str, place: str) -> str:
    if len(found) > LONGEST_VALUE:
        raise Odd(f"has {len(found)} characters", place)
    return found


def _number(found: str, place: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", found):
        raise Odd(f"has an index that is no number: {found[:60]!r}", place)
    return int(found)
