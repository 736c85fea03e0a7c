# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write beside the sets how their checks ended.

Where an image of another set is damaged, that is written beside that one, too: all sets that build on it are not to be
relied on, and retention is to know.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, in_words
from .._common.formats import utc_now
from .._repository.annotations import DEPTHS, Depth, Pin, Verification
from .._repository.catalog import read_catalog
from .._repository.published import remove_annotations, write_annotation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Manifest
    from .._repository.repository import Repository
    from .model import Finding, SetCheck, VerifyOptions
    from .run import VerifyRun


async def record(run: VerifyRun, check: SetCheck) -> None:
    """Write how a check ended beside its set, and beside the sets whose images are damaged."""
    faults = {manifest.id: (manifest, found) for manifest, found in _damaged_sets(check)}
    faults[check.manifest.id] = (check.manifest, check.faults())
    when = utc_now()
    verifications = [
        Verification(
            manifest.id,
            manifest.attempt,
            _depth_reached(check, run.options, found),
            when,
            tuple(finding.text for finding in found),
        )
        for manifest, found in faults.values()
    ]
    await annotate(run, check, verifications, "the result of this verification is not recorded")


def _damaged_sets(check: SetCheck) -> Iterator[tuple[Manifest, list[Finding]]]:
    """Yield the sets that damaged images belong to, and what is wrong with these."""
    for manifest in check.catalog.records.sets:
        keys = [(manifest.id, image.name) for image in manifest.disks]
        found = [check.damaged[key] for key in keys if key in check.damaged]
        if found:
            yield manifest, found


def _depth_reached(check: SetCheck, options: VerifyOptions, found: Sequence[Finding]) -> Depth:
    """Return how deep a check has to go to find all of these. Without any, return how deep this one went."""
    if found:
        return max((finding.depth for finding in found), key=DEPTHS.index)
    # The VM was not started, for a reason that is not the fault of the set.
    return Depth.IMAGE if "" in check.findings else options.depth


async def annotate(
    run: VerifyRun, check: SetCheck, annotations: Sequence[Verification | Pin], consequence: str
) -> bool:
    """Write annotations, and return whether that was possible. Warn of C(consequence) where it was not."""
    vm, repository = check.catalog.name, run.repository
    if run.options.check_mode:
        return False
    try:
        async with repository.lock(vm):
            now = read_catalog(repository, vm)
            for one in annotations:
                updated = _updated(now, one, run.warnings)
                if updated:
                    write_annotation(repository, vm, _as_compared(check, updated))
    except (BackupError, OSError) as error:
        # A repository that is mounted read-only is verified all the same.
        run.warnings.append(
            f"VM {vm}, set {check.manifest.id}: {repository.path} cannot be written to ({in_words(error)}), so that"
            f" {consequence}"
        )
        return False
    return True


def _as_compared(check: SetCheck, one: Verification | Pin) -> Verification | Pin:
    """Return an annotation that does not claim checksums where an image was made without one.

    What had failed is good again all the same: it was looked at with the depth that was asked for.
    """
    if isinstance(one, Pin) or not one.ok or one.depth != Depth.CHECKSUM:
        return one
    is_whole = all(image.sha256 for _manifest, image in check.images().values())
    return one if is_whole else replace(one, depth=Depth.MANIFEST)


def _updated(catalog: VmCatalog, one: Verification | Pin, warnings: list[str]) -> Verification | Pin | None:
    """Return an annotation with what was known before. None where its set is gone, or does not count as good yet."""
    manifest = catalog.records.published(one.id)
    if manifest is None or isinstance(one, Pin):
        return one if manifest else None
    if manifest.attempt != one.attempt:
        return None
    before = catalog.annotations.verification(manifest)
    if before and not before.ok and _is_deeper(before, one):
        if one.ok:
            warnings.append(
                f"VM {catalog.name}, set {one.id}: it still counts as not good, because its verification with depth"
                f" {before.depth} failed on {before.when}; verify it with that depth again"
            )
            return None
        # A guest that did not start must not hide that its images are damaged.
        if before.depth != Depth.BOOT:
            return replace(one, depth=before.depth, errors=tuple(dict.fromkeys((*one.errors, *before.errors))))
    return one


def _is_deeper(one: Verification, other: Verification) -> bool:
    """Return whether one went deeper than another of this release; a depth that only a later one knows is deeper."""
    return one.depth not in DEPTHS or DEPTHS.index(Depth(one.depth)) > DEPTHS.index(Depth(other.depth))


async def remove_pins(repository: Repository, vm: str, pins: Iterable[Pin]) -> None:
    """Say that these overlays are gone."""
    async with repository.lock(vm):
        remove_annotations(repository, vm, pins)
