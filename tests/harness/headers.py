# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Have the header of an image say something else. It is never given to anything but the collection."""

from __future__ import annotations

import hashlib
import json
import struct
import typing as t

if t.TYPE_CHECKING:
    from pathlib import Path

FIXED = struct.Struct(">4sIQIIQIIQQIIQQQQII")
FIELDS = (
    *("magic", "version", "name_at", "name_length", "cluster_bits", "size", "encryption", "l1_size", "l1_at"),
    *("refcount_at", "refcount_clusters", "snapshots", "snapshots_at", "features", "compatible", "autoclear"),
    *("refcount_order", "length"),
)
"""The header of version 3 (docs/interop/qcow2.txt)."""
BACKING_FORMAT = 0xE2792ACA
DATA_FILE_NAME = 0x44415441
NAME_AT = 2048


def rewrite(
    image: Path, *, backing: str | None = "", extensions: dict[int, bytes] | None = None, **fields: t.Any
) -> None:
    """Write another header over that of an image, whose size stays. Without a name, its backing file stays, too."""
    content = bytearray(image.read_bytes())
    found = dict(zip(FIELDS, FIXED.unpack_from(content), strict=True))
    if backing is None:
        name = b""
    elif backing:
        name = backing.encode("utf-8", "surrogateescape")
    else:
        name = bytes(content[found["name_at"] : found["name_at"] + found["name_length"]])
    found.update(length=FIXED.size + 8, name_at=NAME_AT if name else 0, name_length=len(name))
    found.update(fields)
    head = bytearray(FIXED.pack(*(found[field] for field in FIELDS)) + bytes(8))
    for kind, value in (extensions if extensions is not None else {BACKING_FORMAT: b"qcow2"}).items():
        head += struct.pack(">II", kind, len(value)) + value + bytes(-len(value) % 8)
    content[:65536] = head.ljust(NAME_AT, b"\0")[:NAME_AT] + name.ljust(65536 - NAME_AT, b"\0")
    put(image, bytes(content))


def put(image: Path, content: bytes) -> None:
    """Write into a published file, which is read-only."""
    image.chmod(0o600)
    image.write_bytes(content)
    image.chmod(0o440)


def sign(directory: Path, name: str) -> None:
    """Have the manifests of a VM say of all its files what they are by now, and of which VM they are."""
    for path in sorted(directory.glob("[!.]*/manifest.json")):
        found = json.loads(path.read_text())
        found["vm"]["name"] = name
        found["description_sha256"] = hashlib.sha256(path.with_name("vm.json").read_bytes()).hexdigest()
        for disk in found["disks"]:
            image = path.parent / disk["image"]
            disk.update(bytes=image.stat().st_size, sha256=hashlib.sha256(image.read_bytes()).hexdigest())
            if disk["parent"]:
                below = directory / disk["parent"]["id"] / disk["image"]
                disk["parent"]["sha256"] = hashlib.sha256(below.read_bytes()).hexdigest()
        path.chmod(0o600)
        path.write_text(json.dumps(found))
