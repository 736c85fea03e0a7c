# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find out which other domain a file belongs to: as a disk, or as an image that one of its disks builds on.

A domain that is off holds no lock on its files, and its definition need not name those that its disks build on: the
headers of the images do. Only images in format qcow2 are read for that; what is on others a guest has written.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused
from .._host.threads import within
from .._qemu.disk_file import QCOW2
from .._qemu.domain import DEVICE_VOLUME, LOST_VOLUME, UNKNOWN
from .._qemu.qcow2 import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .._qemu.domain_xml import Source
    from .libvirt_host import KnownDomain
    from .model import DiskRestore


LONGEST_CHAIN = 256
"""Images of the longest chain that is followed: libvirt opens 200."""
TIMEOUT = 60.0
"""Seconds for all of them. One takes far less than a millisecond, unless its file system hangs."""


async def refuse_owned(
    sources: Mapping[str, Sequence[Source]],
    disks: Sequence[DiskRestore],
    replaced: Sequence[str],
    own: Sequence[Source] = (),
) -> None:
    """Refuse to write to a file of another domain. C(sources) are the images that each one names.

    BackupError where that cannot be told. C(replaced) are the targets that exist, and are going to be written, and
    C(own) the images that the domain itself names so far.
    """

    def ask() -> tuple[tuple[str, str] | None, tuple[str, str, Source] | None]:
        return _owner(sources, [disk.target for disk in disks]), _unknown(sources, disks, replaced, own)

    try:
        found, unknown = await within(TIMEOUT, ask)
    except asyncio.TimeoutError:
        raise BackupError(
            f"a file system hangs, so the disks of the other domains could not be checked within {TIMEOUT:g} s. One of"
            " them may build on a file that would be replaced. Restore to places where no file exists yet"
        ) from None
    if found:
        target, owner = found
        raise Refused("target", f"{target} is a file of domain {owner}; restore to another place")
    if unknown:
        _refuse(*unknown)


async def refuse_kept(domains: Mapping[str, KnownDomain], targets: Sequence[str]) -> None:
    """Refuse to replace a file that a domain relies on to stay as it is.

    It goes on from its saved state with the disks of that moment, and what a disk builds on belongs to that disk.
    """

    def ask() -> Refused | None:
        return next((found for name, domain in domains.items() for found in _kept(name, domain, targets)), None)

    try:
        found = await within(TIMEOUT, ask)
    except asyncio.TimeoutError:
        raise BackupError(
            f"a file system hangs, so the disks of the domains could not be checked within {TIMEOUT:g} s. Restore to"
            " places where no file exists yet"
        ) from None
    if found:
        raise found


def _kept(name: str, domain: KnownDomain, targets: Sequence[str]) -> Iterator[Refused]:
    tops = {os.path.realpath(source.path) for source in domain.tops if source.kind not in UNKNOWN}
    seen: set[tuple[str, str]] = set()
    files = {path for source in domain.images if source.kind not in UNKNOWN for path in _files(source, seen)}
    names = {file: path for path in files for file in [_file(path)] if file}
    for target in targets:
        # It may be mounted at another place, too.
        path = names.get(_file(target), os.path.realpath(target))
        if path in files and domain.is_saved:
            yield Refused(
                "target",
                f"{target} is a file of domain {name}, which has a saved state (virsh managedsave): the guest would go"
                f" on with another disk than it had, and spoil it. Remove that state (virsh managedsave-remove {name}),"
                " or restore to another place",
            )
        elif path in files - tops:
            yield Refused(
                "target",
                f"a disk of domain {name} builds on {target}, and would be spoilt by another file there; restore to"
                " another place",
            )


def _refuse(target: str, owner: str, source: Source) -> None:
    """Refuse to replace what may be a disk of another domain."""
    pool, _slash, name = source.path.partition("/")
    reason = f"libvirt does not tell where this is. Start the pool (virsh pool-start {pool})"
    if source.kind == LOST_VOLUME:
        reason = f"libvirt has no such pool. Define the pool, remove the disk from {owner}"
    raise Refused(
        "target",
        f"{target} exists, and may be a disk of domain {owner}: that is volume {name} of storage pool {pool}, and"
        f" {reason}, or restore to places where no file exists yet",
    )


def _unknown(
    sources: Mapping[str, Sequence[Source]],
    disks: Sequence[DiskRestore],
    replaced: Sequence[str],
    own: Sequence[Source],
) -> tuple[str, str, Source] | None:
    """Return a target that another domain may have, as nobody knows where its image is, that domain and that image."""
    doubtful = [(owner, source) for owner, named in sources.items() for source in named if source.kind in UNKNOWN]
    if not doubtful:
        return None
    ours = {os.path.realpath(source.path) for source in own if source.kind not in UNKNOWN}
    for disk in disks:
        if disk.target in replaced and os.path.realpath(disk.target) not in ours:
            for owner, source in doubtful:
                if source.kind != DEVICE_VOLUME or disk.block_device:
                    return disk.target, owner, source
    return None


def _owner(sources: Mapping[str, Sequence[Source]], targets: Sequence[str]) -> tuple[str, str] | None:
    """Return a target that belongs to another domain, and that domain; None where there is none."""
    by_path = {os.path.realpath(target): target for target in targets}
    # It may be mounted at another place, too.
    by_file = {file: target for target in targets for file in [_file(target)] if file}
    # What nobody has made yet, nothing builds on.
    there = any(map(os.path.lexists, targets))
    # What is raw to one domain may build on other images to another domain.
    seen: set[tuple[str, str]] = set()
    for owner, named in sources.items():
        for source in named:
            if source.kind in UNKNOWN:
                continue
            for path in _files(source, seen) if there else [source.path]:
                target = by_path.get(os.path.realpath(path)) or by_file.get(_file(path))
                if target:
                    return target, owner
    return None


def _files(source: Source, seen: set[tuple[str, str]]) -> Iterator[str]:
    """Return the file of an image, and those that it builds on, without those that were C(seen) in its format."""
    path, image_format = source.path, source.format
    for _layer in range(LONGEST_CHAIN):
        path = os.path.realpath(path)
        if (path, image_format) in seen:
            return
        seen.add((path, image_format))
        yield path
        header = _header(path) if image_format == QCOW2 else None
        if header is None:
            return
        backing, image_format, data = header
        if data:
            yield _beside(path, data)
        if not backing:
            return
        path = _beside(path, backing)


def _file(path: str) -> tuple[int, ...]:
    """Return what a file or a block device is known by, whatever its path; nothing where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _header(path: str) -> tuple[str, str, str] | None:
    """Return what an image names: the file that it builds on and its format, and where its data are."""
    try:
        if not any(kind(os.stat(path).st_mode) for kind in (stat.S_ISREG, stat.S_ISBLK)):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        # It has gone, or is elsewhere: json:, or a URL.
        return None
    try:
        header = read_header(fd)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    return header.backing or "", header.backing_format or QCOW2, header.data_file or ""


def _beside(path: str, name: str) -> str:
    """Return the file that an image names, as seen from that image."""
    if name.startswith("json:"):
        name = _in_json(name[len("json:") :])
    elif name.startswith("file:"):
        name = name[len("file:") :]
    return os.path.join(os.path.dirname(path), name)


def _in_json(text: str) -> str:
    """Return the file that is named in QEMU's JSON; empty where there is none."""
    try:
        tree = json.loads(text)
        while isinstance(tree.get("file"), dict):
            tree = tree["file"]
        return str(tree.get("filename") or tree.get("file.filename") or "")
    except (ValueError, AttributeError, RecursionError):
        return ""
