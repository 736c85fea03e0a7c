# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Remove sets of a VM, and make increments full, as the rules of retention decide.

A set is removed by one rename, after all that build on it; what a crash leaves of it is not listed any more, and the
next run removes it. The long work of making an increment full is done without the VM's lock: no backup waits for it.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused
from .._common.formats import amount, counted, utc_now
from .._host.lock import LockHeld, locked
from .._repository.annotations import Protection
from .._repository.catalog import read_catalog
from .._repository.pins import is_read
from .._repository.published import remove_annotations, remove_set, write_annotation
from .._repository.staging import remove_failure
from .consolidate import consolidate, finish_consolidation
from .retention import decide, read_constraints

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._repository.annotations import Verification
    from .._repository.catalog import VmCatalog
    from .._repository.repository import Repository
    from .retention import RetentionDecision, Rules


@dataclass(frozen=True)
class PruneOptions:
    """What is asked for. C(allow_remove_last) lets VMs lose their newest good set; the lists are ids of sets."""

    rules: Rules
    consolidate: bool = False
    allow_remove_last: bool = False
    protect: tuple[str, ...] = ()
    unprotect: tuple[str, ...] = ()
    check_mode: bool = False


@dataclass(frozen=True)
class Pruned:
    """What has become of one VM's sets. C(sizes) are the bytes that each took before.

    C(error) says what went wrong with the increments that were to become full, and what is left of removed sets.
    """

    vm: str
    decisions: tuple[RetentionDecision, ...]
    sizes: dict[str, int]
    protection_changed: bool = False
    error: str = ""

    @property
    def changed(self) -> bool:
        return self.protection_changed or any(not decision.keep or decision.consolidate for decision in self.decisions)


def headline(pruned: Iterable[Pruned], check_mode: bool) -> str:
    """Return what has become of the sets of all VMs, in one line."""
    decisions = [(decision, one.sizes[decision.id]) for one in pruned for decision in one.decisions]
    removed = [size for decision, size in decisions if not decision.keep]
    made_full = sum(decision.keep and decision.consolidate for decision, _size in decisions)
    told = [f"{len(decisions) - len(removed)} kept"]
    if made_full:
        told.insert(0, f"{made_full} would be made full" if check_mode else f"{made_full} made full")
    would_be = "would be removed" if check_mode else "removed"
    gone = f"{counted(len(removed), 'set')} ({amount(sum(removed))}) {would_be}" if removed else "nothing to remove"
    return ", ".join((gone, *told))


async def prune(repository: Repository, vm: str, options: PruneOptions) -> Pruned:
    """Prune the sets of one VM; in check mode only return what would be done."""
    catalog = read_catalog(repository, vm)
    changed = check_protection(catalog, options)
    if options.check_mode:
        catalog = _as_protected(catalog, options)
        return Pruned(vm, _decide(catalog, options), _sizes(catalog), changed)
    if options.protect or options.unprotect:
        async with repository.lock(vm):
            # The set has to be there with the lock held: once protected, it is not removed any more.
            catalog = read_catalog(repository, vm)
            changed = check_protection(catalog, options)
            _protect(repository, catalog, options)
        catalog = read_catalog(repository, vm)
        decisions = _decide(catalog, options)
        if all(decision.keep and not decision.consolidate for decision in decisions):
            # Nothing is left to do, so this needs not wait for a prune that makes full images for hours.
            return Pruned(vm, decisions, _sizes(catalog), changed)
    async with AsyncExitStack() as stack:
        # The VM's own lock is held for moments only; this one keeps a second prune away meanwhile.
        lock = locked(os.path.join(repository.directory(vm), ".prune.lock"), f"VM {vm}, prune")
        try:
            await stack.enter_async_context(lock)
        except LockHeld:
            raise BackupError(f"VM {vm} is being pruned by another process; run again later") from None
        return await _apply(repository, vm, options, changed)


async def _apply(repository: Repository, vm: str, options: PruneOptions, protection_changed: bool) -> Pruned:
    """Remove sets and make increments full, while no other process prunes the VM."""
    async with repository.lock(vm):
        finish_consolidation(repository, vm)
    catalog = read_catalog(repository, vm)
    decisions = _decide(catalog, options)
    doomed = {decision.id for decision in decisions if not decision.keep}
    errors: dict[str, str] = {}
    if any(decision.consolidate for decision in decisions):
        # What nothing builds on goes first: full images need space.
        async with repository.lock(vm):
            _remove(repository, vm, options, doomed, errors)
        errors.update(await consolidate(repository, catalog, decisions))
    async with repository.lock(vm):
        spared = _remove(repository, vm, options, doomed, errors)
    done = tuple(
        replace(spared.get(decision.id, decision), consolidate=decision.consolidate and decision.id not in errors)
        for decision in decisions
    )
    return Pruned(vm, done, _sizes(catalog), protection_changed, "; ".join(errors.values()))


def _sizes(catalog: VmCatalog) -> dict[str, int]:
    return {manifest.id: manifest.bytes for manifest in catalog.records.sets}


def _decide(catalog: VmCatalog, options: PruneOptions) -> tuple[RetentionDecision, ...]:
    now = datetime.now(timezone.utc)
    constraints = read_constraints(catalog, options.allow_remove_last)
    return decide(catalog.records.sets, options.rules, constraints, now, options.consolidate)


def check_protection(catalog: VmCatalog, options: PruneOptions) -> bool:
    """Return whether the protection of a set would change; Refused where there is no such set."""
    for option, ids in (("protect", options.protect), ("unprotect", options.unprotect)):
        for set_id in ids:
            if catalog.records.published(set_id) is None:
                there = ", ".join(one.id for one in catalog.records.sets) or "none"
                raise Refused(option, f"VM {catalog.name} has no set {set_id}; it has: {there}")
    return any(not catalog.annotations.protected(set_id) for set_id in options.protect) or any(
        catalog.annotations.protected(set_id) for set_id in options.unprotect
    )


def _protect(repository: Repository, catalog: VmCatalog, options: PruneOptions) -> None:
    for set_id in options.protect:
        if not catalog.annotations.protected(set_id):
            write_annotation(repository, catalog.name, Protection(set_id, utc_now()))
    gone = [protection for protection in catalog.annotations.protections if protection.id in options.unprotect]
    remove_annotations(repository, catalog.name, gone)


def _as_protected(catalog: VmCatalog, options: PruneOptions) -> VmCatalog:
    """Return the catalog as it would be with the protection that is asked for."""
    changed = (*options.unprotect, *options.protect)
    kept = [protection for protection in catalog.annotations.protections if protection.id not in changed]
    added = [Protection(set_id, "") for set_id in options.protect]
    return replace(catalog, annotations=replace(catalog.annotations, protections=(*kept, *added)))


def _remove(
    repository: Repository, vm: str, options: PruneOptions, doomed: set[str], errors: dict[str, str]
) -> dict[str, RetentionDecision]:
    """Remove what was to go and still may, with the VM's lock held; return the decisions of the sets that stay.

    Where something of a set is left, that is added to C(errors), by set id.
    """
    catalog = read_catalog(repository, vm)
    # Meanwhile a new set or an overlay may build on one of them, or a set has turned out to be bad, and another one is
    # the newest good set. An increment that was not made full by now counts as an increment.
    now = _decide(catalog, replace(options, consolidate=False))
    decisions = {decision.id: decision for decision in now if decision.id in doomed}
    # Those that build on others go first.
    for manifest in reversed(catalog.records.sets):
        if manifest.id in decisions and not decisions[manifest.id].keep:
            left = remove_set(repository, vm, manifest.id)
            if left:
                errors[manifest.id] = f"set {manifest.id} was removed, but {left}; remove that by hand"
    _remove_stale_annotations(repository, catalog)
    stay = [one for one in catalog.records.sets if one.id not in decisions or decisions[one.id].keep]
    _remove_old_failures(repository, catalog, is_forgotten=options.allow_remove_last and not stay)
    return {decision.id: decision for decision in decisions.values() if decision.keep}


def _remove_stale_annotations(repository: Repository, catalog: VmCatalog) -> None:
    annotations: list[Protection | Verification] = [
        *catalog.annotations.protections,
        *catalog.annotations.verifications,
    ]
    with repository.opened(catalog.name) as directory:
        gone = [one for one in annotations if directory.status(one.id) is None]
    remove_annotations(
        repository, catalog.name, [*gone, *(pin for pin in catalog.annotations.pins if not is_read(pin))]
    )


def _remove_old_failures(repository: Repository, catalog: VmCatalog, is_forgotten: bool) -> None:
    """Remove the records of attempts that failed before the newest set was begun: their runs have long ended.

    All go of a VM that is forgotten.
    """
    newest = catalog.records.sets[-1].started if catalog.records.sets else ""
    for failure in catalog.records.failures:
        if is_forgotten or failure.ended < newest:
            remove_failure(repository, catalog.name, failure)
