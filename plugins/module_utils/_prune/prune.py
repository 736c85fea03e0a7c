# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets of a VM removed, and increments turned into full ones, as the rules of retention have it.

A set is removed by one rename, after all that build on it; what a crash leaves of it is listed no more, and goes with
the next run. The long work of making an increment full is done without the VM's lock, so that no backup waits for it.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused
from .._common.formats import amount, utc_now
from .._host import files
from .._host.lock import LockHeld, locked
from .._repository.annotations import is_read, may_be_there, remove_annotations, write_annotation
from .._repository.catalog import read_catalog
from .._repository.documents import Protection
from . import retention
from .consolidate import consolidate, finish_consolidation
from .retention import condition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._repository.catalog import VmCatalog
    from .._repository.documents import Verification
    from .._repository.repository import Repository
    from .retention import RetentionDecision, Rules


@dataclass(frozen=True)
class PruneOptions:
    """What is asked for. C(may_go) lets VMs lose their newest good set; the lists are ids of sets."""

    rules: Rules
    consolidate: bool = False
    may_go: bool = False
    protect: tuple[str, ...] = ()
    unprotect: tuple[str, ...] = ()
    check_mode: bool = False


@dataclass(frozen=True)
class Pruned:
    """What has become of one VM's sets. C(sizes) are the bytes that each took before.

    C(error) says what went wrong with the increments that were to become full, and what is left of removed sets.
    """

    vm: str
    fates: tuple[RetentionDecision, ...]
    sizes: dict[str, int]
    marked: bool = False
    error: str = ""

    @property
    def changed(self) -> bool:
        return self.marked or any(not fate.keep or fate.consolidate for fate in self.fates)


def headline(pruned: Iterable[Pruned], check_mode: bool) -> str:
    """Return what has become of the sets of all VMs, in one line."""
    fates = [(fate, one.sizes[fate.id]) for one in pruned for fate in one.fates]
    removed = [size for fate, size in fates if not fate.keep]
    made_full = sum(fate.keep and fate.consolidate for fate, _size in fates)
    told = [f"{len(fates) - len(removed)} kept"]
    if made_full:
        told.insert(0, f"{made_full} would be made full" if check_mode else f"{made_full} made full")
    would_be = "would be removed" if check_mode else "removed"
    gone = f"{len(removed)} sets ({amount(sum(removed))}) {would_be}" if removed else "nothing to remove"
    return ", ".join((gone, *told))


async def prune(repository: Repository, vm: str, order: PruneOptions) -> Pruned:
    """Bring one VM's sets to what the rules say; in check mode only say it."""
    held = read_catalog(repository, vm)
    marked = _check_marks(held, order)
    if order.check_mode:
        held = _as_marked(held, order)
        return Pruned(vm, _fates(held, order), _sizes(held), marked)
    if order.protect or order.unprotect:
        async with repository.lock(vm):
            # A set that is marked is not to go any more: it has to be there at this moment.
            held = read_catalog(repository, vm)
            marked = _check_marks(held, order)
            _mark(repository, held, order)
        held = read_catalog(repository, vm)
        fates = _fates(held, order)
        if all(fate.keep and not fate.consolidate for fate in fates):
            # So that nobody has to wait for a prune that makes full images for hours.
            return Pruned(vm, fates, _sizes(held), marked)
    async with AsyncExitStack() as stack:
        # The VM's own lock is for moments only; this one keeps a second prune away meanwhile.
        lock = locked(os.path.join(repository.directory(vm), ".prune.lock"), f"VM {vm}, prune")
        try:
            await stack.enter_async_context(lock)
        except LockHeld:
            raise BackupError(f"VM {vm} is being pruned by another process; run again later") from None
        async with repository.lock(vm):
            finish_consolidation(repository, vm)
        held = read_catalog(repository, vm)
        fates = _fates(held, order)
        doomed = {fate.id for fate in fates if not fate.keep}
        errors: dict[str, str] = {}
        if any(fate.consolidate for fate in fates):
            # What nothing builds on makes room for what comes.
            async with repository.lock(vm):
                _remove(repository, vm, order, doomed, errors)
            errors.update(await consolidate(repository, held, fates))
        async with repository.lock(vm):
            spared = _remove(repository, vm, order, doomed, errors)
    fates = tuple(
        replace(spared.get(fate.id, fate), consolidate=fate.consolidate and fate.id not in errors) for fate in fates
    )
    return Pruned(vm, fates, _sizes(held), marked, "; ".join(errors.values()))


def _sizes(held: VmCatalog) -> dict[str, int]:
    return {manifest.id: manifest.bytes for manifest in held.shelf.sets}


def _fates(held: VmCatalog, order: PruneOptions) -> tuple[RetentionDecision, ...]:
    now = datetime.now(timezone.utc)
    return retention.decide(held.shelf.sets, order.rules, condition(held, order.may_go), now, order.consolidate)


# Protection


def _check_marks(held: VmCatalog, order: PruneOptions) -> bool:
    """Whether there are marks to be changed; Refused where there is no such set."""
    for option, ids in (("protect", order.protect), ("unprotect", order.unprotect)):
        for set_id in ids:
            if held.shelf.published(set_id) is None:
                raise Refused(option, f"VM {held.name} has no set {set_id}")
    return any(not held.marks.protected(set_id) for set_id in order.protect) or any(
        held.marks.protected(set_id) for set_id in order.unprotect
    )


def _mark(repository: Repository, held: VmCatalog, order: PruneOptions) -> None:
    for set_id in order.protect:
        if not held.marks.protected(set_id):
            write_annotation(repository, held.name, Protection(set_id, utc_now()))
    remove_annotations(repository, held.name, [mark for mark in held.marks.protections if mark.id in order.unprotect])


def _as_marked(held: VmCatalog, order: PruneOptions) -> VmCatalog:
    """How it would be, for check mode."""
    kept = [mark for mark in held.marks.protections if mark.id not in (*order.unprotect, *order.protect)]
    added = [Protection(set_id, "") for set_id in order.protect]
    return replace(held, marks=replace(held.marks, protections=(*kept, *added)))


# Removal, with the VM's lock held


def _remove(
    repository: Repository, vm: str, order: PruneOptions, doomed: set[str], errors: dict[str, str]
) -> dict[str, RetentionDecision]:
    """Remove what was to go and still may, those first that build on others; returns the fates of those that stay.

    What is left of a set all the same is added to C(errors), by set id.
    """
    held = read_catalog(repository, vm)
    # Meanwhile a set may have been begun that builds on one of them, or an overlay; or a set has turned out to be bad,
    # and another one is the newest good set. What has not become a full one by now counts as what it is.
    fates = {fate.id: fate for fate in _fates(held, replace(order, consolidate=False)) if fate.id in doomed}
    for manifest in reversed(held.shelf.sets):
        if manifest.id in fates and not fates[manifest.id].keep:
            left = repository.remove_set(vm, manifest.id)
            if left:
                errors[manifest.id] = f"set {manifest.id} was removed, but {left}; remove that by hand"
    _remove_stale_marks(repository, held)
    _forget_failures(repository, held)
    return {fate.id: fate for fate in fates.values() if fate.keep}


def _remove_stale_marks(repository: Repository, held: VmCatalog) -> None:
    said: list[Protection | Verification] = [*held.marks.protections, *held.marks.verifications]
    gone = [mark for mark in said if not may_be_there(repository.set_path(held.name, mark.id))]
    remove_annotations(repository, held.name, [*gone, *(pin for pin in held.marks.pins if not is_read(pin))])


def _forget_failures(repository: Repository, held: VmCatalog) -> None:
    """Forget the attempts that failed before the VM's newest set was begun: their runs have long ended."""
    newest = held.shelf.sets[-1].started if held.shelf.sets else ""
    for failure in held.shelf.failures:
        if failure.ended < newest:
            files.remove(repository.failure_path(held.name, failure.id))
