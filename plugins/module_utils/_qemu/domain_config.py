# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe a domain so that libvirt can define it again: its XML as it is defined, without the secrets in it.

libvirt leaves out what it takes for a secret, unless it is asked for that (C(VIR_DOMAIN_XML_SECURE)): what is missing
is found by comparing the two. Secrets that libvirt keeps apart are named in the XML, by their uuid or usage.
Reference: libvirt 9.0, virDomainXMLFlags in libvirt-domain.h.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .._common.redaction import HARMLESS, REMOVED, Redaction, is_secret_name, redact
from .answers import Odd
from .domain_xml import UUID, parse_xml

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from xml.etree.ElementTree import Element

    from .libvirt_connection import LibvirtConnection
    from .libvirt_domain import LibvirtDomain


LONGEST_KEPT = 1 << 18
"""Characters of the longest XML that is kept: what is larger holds something else than a domain."""
MOST_NAMES = 1000
"""How many snapshots, or checkpoints, are named."""
DOMAIN = "domain"
"""What entries of C(removed) begin with that are about the XML of a domain."""
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
"""The name space of what libvirt hands on to QEMU as it is."""
PAYLOADS = ("sysinfo[@type='fwcfg']/entry", "devices/disk/source/cookies/cookie")
"""Elements whose text may be a secret, whatever it looks like."""
NOTES = ("title", "description", "metadata//*")
"""Elements with what people have written about a domain."""
VALUES = ("value", "val", "content", "data")
"""What an attribute is called that holds what another one names."""


async def describe_domain(libvirt: LibvirtDomain, removed: list[str]) -> dict[str, Any]:
    """Return what libvirt knows of a domain; what is not in it is added to C(removed)."""
    ask = partial(_ask, libvirt.connection)
    kept, secure, snapshots, checkpoints = await libvirt.call("the look at its definition", ask)
    return {
        "uri": libvirt.address.uri,
        "xml": without_secrets(kept, secure, removed),
        "snapshots": snapshots[:MOST_NAMES],
        "checkpoints": checkpoints[:MOST_NAMES],
    }


def _ask(connection: LibvirtConnection) -> tuple[str, str, list[str], list[str]]:
    domain, library = connection.domain, connection.libvirt
    kept = domain.XMLDesc(library.VIR_DOMAIN_XML_INACTIVE)
    try:
        secure = domain.XMLDesc(library.VIR_DOMAIN_XML_INACTIVE | library.VIR_DOMAIN_XML_SECURE)
    except library.libvirtError:
        # Not everyone who may back a domain up may see its secrets.
        secure = ""
    checkpoints = sorted(checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0))
    return kept, secure, sorted(domain.snapshotListNames(0)), checkpoints


def without_secrets(kept: str, secure: str, removed: list[str]) -> str:
    """Return the XML of a domain without its secrets. What is not in it is added to C(removed).

    C(secure) is the XML with what libvirt itself has left out; empty where libvirt does not tell that.
    """
    try:
        root = parse_xml(kept)
        hidden = _places(parse_xml(secure)) - _places(root) if secure else Counter(["secrets, if it has any"])
    except Odd as odd:
        removed.append(f"domain: all of it, as {odd}")
        return ""
    if len(kept) > LONGEST_KEPT:
        removed.append(f"domain: all of it, as the XML has {len(kept)} characters")
        return ""
    removed += (f"domain: {place}" for place in sorted(hidden.elements()))
    removed += (f"domain: {name} of libvirt" for name in dict.fromkeys(_references(root)))
    known = len(removed)
    _redact(root, removed)
    if len(removed) == known:
        return kept
    ElementTree.register_namespace("qemu", QEMU)
    return ElementTree.tostring(root, encoding="unicode")


def _places(element: Element, path: str = "") -> Counter[str]:
    """Return where elements and attributes are below an element, and how many of them."""
    found: Counter[str] = Counter(f"{path}@{name}" for name in element.attrib)
    for child in element:
        place = f"{path}/{child.tag}".lstrip("/")
        found[place] += 1
        found += _places(child, place)
    return found


def _references(root: Element) -> list[str]:
    """Return the secrets of libvirt that a domain names."""
    found = []
    for element in root.iter():
        name = element.get("secret") if element.tag == "encryption" else None
        if element.tag == "secret":
            name = element.get("uuid") or element.get("usage")
        found += [f"secret {name}"] if name else []
    return found


def _redact(root: Element, removed: list[str]) -> None:
    """Take the secrets out of what others have written into a domain."""
    arguments = root.findall(f"{{{QEMU}}}commandline/{{{QEMU}}}arg")
    cleaned, found = redact([argument.get("value", "") for argument in arguments])
    removed += (f"domain, QEMU's {name}" for name in found)
    for argument, value in zip(arguments, cleaned):
        argument.set("value", value)
    for variable in root.iterfind(f"{{{QEMU}}}commandline/{{{QEMU}}}env"):
        name = variable.get("name", "")
        setting = "{}={}".format(name, variable.get("value", ""))
        cleaned_setting = Redaction(f"domain, QEMU's environment {name}", removed).text("", setting)
        variable.set("value", cleaned_setting[len(name) + 1 :])
    payloads = {element for path in PAYLOADS for element in root.iterfind(path)}
    seen = {*arguments, *root.iterfind(f"{{{QEMU}}}commandline/{{{QEMU}}}env")}
    notes = {element for path in NOTES for element in root.iterfind(path)}
    for element in root.iter():
        if element not in seen:
            tag = element.tag.rpartition("}")[2]
            redaction = Redaction(f"domain {tag}", removed, tag if element in payloads else "")
            _redact_element(element, tag, redaction.note if element in notes else redaction.text)
    for element in root.iterfind("metadata//*"):
        _redact_metadata(element, removed)


def _redact_element(element: Element, tag: str, cleaned: Callable[[str, str], str]) -> None:
    for name, value in element.attrib.items():
        if not UUID.fullmatch(value):
            # The uuid of a secret is none.
            element.set(name, cleaned(name, value))
    if element.text and element.text.strip():
        element.text = cleaned(tag, element.text)


def _redact_metadata(element: Element, removed: list[str]) -> None:
    """Take out what is called a secret: attributes, texts, and values of C(name='...' value='...')."""
    tag = element.tag.rpartition("}")[2]
    is_secret = any(map(is_secret_name, (tag, *(element.get(name, "") for name in ("name", "key")))))
    for name, value in element.attrib.items():
        if (is_secret_name(name) or (is_secret and name in VALUES)) and value not in (*HARMLESS, REMOVED):
            element.set(name, REMOVED)
            removed.append(f"domain {tag}: {name}")
    text = (element.text or "").strip()
    if is_secret and text not in (*HARMLESS, REMOVED):
        element.text = REMOVED
        removed.append(f"domain {tag}: {tag}")
