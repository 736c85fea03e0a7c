# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Verify sets as deep as is asked for. Nothing is written into a set."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .._common.errors import BackupError, in_words
from .._host.directory import Directory
from .._repository.annotations import Depth
from .._repository.catalog import lost_sets, read_catalog, require_sets
from .._repository.names import vm_directory
from .._repository.repository import HARMLESS
from .._repository.vm_names import vm_names
from .boot_check import check_boot
from .image_check import check_checksums, check_images
from .manifest_check import check_manifest, lost_set
from .model import Finding, SetCheck
from .record import record
from .run import VerifyRun

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Manifest
    from .._repository.repository import Repository
    from .model import SetImage, VerifyOptions


MAX_CHECKS = 3
"""How often a set is checked that others change meanwhile."""


def known_vms(repository: Repository) -> list[str]:
    """Return all VMs with sets. One without any manifest that can be read goes by the name of its directory."""
    names = vm_names(repository)
    known = {vm_directory(name) for name in names}
    with Directory.at(repository.path) as root:
        others = [entry.name for entry in root.entries() if _is_directory(entry) and entry.name not in known | HARMLESS]
    return sorted(name for name in (*names, *others) if has_sets(repository, name))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Return whether it may be a directory: what cannot be looked up is not passed over."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return True


def has_sets(repository: Repository, name: str) -> bool:
    """Return whether there are sets of a VM, or what is left of some."""
    try:
        records = repository.records(name)
        return bool(records.sets or records.odd or lost_sets(repository, name, records))
    except (BackupError, OSError):
        # The check of this VM tells what cannot be read.
        return True


async def verify_all(
    repository: Repository, names: Sequence[str], set_id: str, options: VerifyOptions
) -> tuple[list[Finding], list[str]]:
    """Verify one set of each VM; one VM never stops the others. Return what is found, and warnings."""
    run = VerifyRun(repository, options)
    found = await asyncio.gather(*(_verify_or_tell(run, name, set_id) for name in names))
    return [finding for findings in found for finding in findings], run.warnings


async def _verify_or_tell(run: VerifyRun, name: str, set_id: str) -> list[Finding]:
    try:
        return await _verify_vm(run, name, set_id)
    except (BackupError, OSError) as error:
        return [Finding(name, set_id, "", run.options.depth, in_words(error))]


async def _verify_vm(run: VerifyRun, name: str, set_id: str) -> list[Finding]:
    repository = run.repository
    catalog = read_catalog(repository, name)
    lost = [
        lost_set(repository, name, stray, catalog.records)
        for stray in lost_sets(repository, name, catalog.records)
        if set_id in ("", stray)
    ]
    if not set_id:
        hidden = catalog.odd.keys() - catalog.records.strays
        lost += [Finding(name, "", "", Depth.MANIFEST, catalog.odd[entry]) for entry in sorted(hidden)]
    if lost and (set_id or not catalog.records.sets):
        return lost
    require_sets(repository, catalog)
    check = await _check_set(run, catalog, catalog.find(set_id))
    for _again in range(MAX_CHECKS - 1):
        catalog = read_catalog(repository, name)
        if not check.findings or catalog.records.sets == check.catalog.records.sets:
            break
        # A set was consolidated or removed while it was read: what was found may be no fault.
        check = await _check_set(run, catalog, catalog.find(check.manifest.id))
    await record(run, check)
    return [*lost, *_findings(run, check)]


async def _check_set(run: VerifyRun, catalog: VmCatalog, manifest: Manifest) -> SetCheck:
    """Check a set, each depth after those before it."""
    check = SetCheck(catalog, manifest)
    check_manifest(run.repository, check)
    if run.options.includes(Depth.CHECKSUM):
        await check_checksums(run, check)
    if run.options.includes(Depth.IMAGE):
        await check_images(run, check)
    if run.options.boot:
        await check_boot(run, check, run.options.boot)
    return check


def _findings(run: VerifyRun, check: SetCheck) -> list[Finding]:
    """Return what is said of each disk, and of the set where there is something to say."""
    vm, set_id, depth = check.catalog.name, check.manifest.id, run.options.depth
    whole = [check.findings[""]] if "" in check.findings else []
    if depth == Depth.BOOT and not whole:
        whole = [Finding(vm, set_id, "", Depth.BOOT)]
    good = {disk: Finding(vm, set_id, disk, depth, note=_unchecked(run, chain)) for disk, chain in check.chains.items()}
    return [*whole, *({**good, **check.findings}[image.name] for image in check.manifest.disks)]


def _unchecked(run: VerifyRun, chain: Sequence[SetImage]) -> str:
    """Return which images have no checksum that could be compared."""
    without = ", ".join(run.repository.set_image_path(*one) for one in chain if not one[1].sha256)
    return f"made without a checksum: {without}" if without and run.options.includes(Depth.CHECKSUM) else ""
