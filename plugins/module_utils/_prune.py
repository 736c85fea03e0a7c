# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
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

from ansible_collections.vmfleet.backup.plugins.module_utils import _chain, _qemu_img, _retention, _target
from ansible_collections.vmfleet.backup.plugins.module_utils._checksum import check_all, sha256
from ansible_collections.vmfleet.backup.plugins.module_utils._documents import Consolidation, Protection
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import BackupError, Refused, ToolError, after
from ansible_collections.vmfleet.backup.plugins.module_utils._files import in_words, set_mode
from ansible_collections.vmfleet.backup.plugins.module_utils._library import GROWING, growing, holdings
from ansible_collections.vmfleet.backup.plugins.module_utils._lock import LockHeld, locked
from ansible_collections.vmfleet.backup.plugins.module_utils._marks import (
    is_read,
    may_be_there,
    remove_marks,
    write_mark,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import PUBLISHED_MODE
from ansible_collections.vmfleet.backup.plugins.module_utils._retention import Condition, Fate
from ansible_collections.vmfleet.backup.plugins.module_utils._units import amount, human, utc_now

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import DiskImage, Manifest, Verification
    from ansible_collections.vmfleet.backup.plugins.module_utils._library import Holdings
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository import Repository
    from ansible_collections.vmfleet.backup.plugins.module_utils._retention import Rules


@dataclass(frozen=True)
class Order:
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
    fates: tuple[Fate, ...]
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


async def prune(repository: Repository, vm: str, order: Order) -> Pruned:
    """Bring one VM's sets to what the rules say; in check mode only say it."""
    held = holdings(repository, vm)
    marked = _check_marks(held, order)
    if order.check_mode:
        held = _as_marked(held, order)
        return Pruned(vm, _fates(held, order), _sizes(held), marked)
    if order.protect or order.unprotect:
        async with repository.lock(vm):
            # A set that is marked is not to go any more: it has to be there at this moment.
            held = holdings(repository, vm)
            marked = _check_marks(held, order)
            _mark(repository, held, order)
        held = holdings(repository, vm)
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
            _finish(repository, vm)
        held = holdings(repository, vm)
        fates = _fates(held, order)
        doomed = {fate.id for fate in fates if not fate.keep}
        errors: dict[str, str] = {}
        if any(fate.consolidate for fate in fates):
            # What nothing builds on makes room for what comes.
            async with repository.lock(vm):
                _remove(repository, vm, order, doomed, errors)
            errors.update(await _consolidate(repository, held, fates))
        async with repository.lock(vm):
            spared = _remove(repository, vm, order, doomed, errors)
    fates = tuple(
        replace(spared.get(fate.id, fate), consolidate=fate.consolidate and fate.id not in errors) for fate in fates
    )
    return Pruned(vm, fates, _sizes(held), marked, "; ".join(errors.values()))


def _sizes(held: Holdings) -> dict[str, int]:
    return {manifest.id: manifest.bytes for manifest in held.shelf.sets}


def _fates(held: Holdings, order: Order) -> tuple[Fate, ...]:
    now = datetime.now(timezone.utc)
    return _retention.decide(held.shelf.sets, order.rules, condition(held, order.may_go), now, order.consolidate)


def condition(held: Holdings, may_go: bool) -> Condition:
    """What keeps sets besides the rules."""
    guarded = {mark.id: "it is protected" for mark in held.marks.protections}
    in_use = {}
    for pin in held.marks.pins:
        if is_read(pin):
            guarded[pin.id] = in_use[pin.id] = f"{pin.path} on {pin.host} reads it"
    for intent in held.shelf.intents:
        for disk in intent.disks:
            if disk.image.parent:
                guarded[disk.image.parent.id] = f"set {intent.id}, which is being made, builds on it"
    return Condition(guarded, {**held.failed_sets, **held.broken_sets}, in_use, may_go)


# Protection


def _check_marks(held: Holdings, order: Order) -> bool:
    """Whether there are marks to be changed; Refused where there is no such set."""
    for option, ids in (("protect", order.protect), ("unprotect", order.unprotect)):
        for set_id in ids:
            if held.shelf.published(set_id) is None:
                raise Refused(option, f"VM {held.name} has no set {set_id}")
    return any(not held.marks.protected(set_id) for set_id in order.protect) or any(
        held.marks.protected(set_id) for set_id in order.unprotect
    )


def _mark(repository: Repository, held: Holdings, order: Order) -> None:
    for set_id in order.protect:
        if not held.marks.protected(set_id):
            write_mark(repository, held.name, Protection(set_id, utc_now()))
    remove_marks(repository, held.name, [mark for mark in held.marks.protections if mark.id in order.unprotect])


def _as_marked(held: Holdings, order: Order) -> Holdings:
    """How it would be, for check mode."""
    kept = [mark for mark in held.marks.protections if mark.id not in (*order.unprotect, *order.protect)]
    added = [Protection(set_id, "") for set_id in order.protect]
    return replace(held, marks=replace(held.marks, protections=(*kept, *added)))


# Removal, with the VM's lock held


def _remove(repository: Repository, vm: str, order: Order, doomed: set[str], errors: dict[str, str]) -> dict[str, Fate]:
    """Remove what was to go and still may, those first that build on others; returns the fates of those that stay.

    What is left of a set all the same is added to C(errors), by set id.
    """
    held = holdings(repository, vm)
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


def _remove_stale_marks(repository: Repository, held: Holdings) -> None:
    said: list[Protection | Verification] = [*held.marks.protections, *held.marks.verifications]
    gone = [mark for mark in said if not may_be_there(repository.set_path(held.name, mark.id))]
    remove_marks(repository, held.name, [*gone, *(pin for pin in held.marks.pins if not is_read(pin))])


def _forget_failures(repository: Repository, held: Holdings) -> None:
    """Forget the attempts that failed before the VM's newest set was begun: their runs have long ended."""
    newest = held.shelf.sets[-1].started if held.shelf.sets else ""
    for failure in held.shelf.failures:
        if failure.ended < newest:
            _target.remove(repository.failure_path(held.name, failure.id))


# Increments that become full


def _finish(repository: Repository, vm: str) -> None:
    """Bring to its end what a killed process has left, with the VM's lock held."""
    for note in repository.shelf(vm).notes:
        _settle(repository, vm, note)
    for path in growing(repository, vm):
        _target.remove(path)
    repository.tidy(vm, "")


def _settle(repository: Repository, vm: str, note: Consolidation) -> None:
    """Let the manifest say what the file is by now, and take the note away."""
    manifest = repository.shelf(vm).published(note.id)
    if manifest and manifest.attempt == note.attempt and manifest.disk(note.image.name) == note.image:
        level = _chain.set_level(disk.level for disk in manifest.disks)
        repository.rewrite_manifest(replace(manifest, level=level))
    repository.remove_note(vm, note.id)


async def _consolidate(repository: Repository, held: Holdings, fates: Iterable[Fate]) -> dict[str, str]:
    """Make all images of some sets full, one after the other; returns what went wrong, by set id."""
    errors = {}
    for manifest in (held.find(fate.id) for fate in fates if fate.consolidate):
        try:
            for image in manifest.disks:
                if image.parent:
                    await _make_full(repository, held, manifest, image)
        except (BackupError, OSError) as error:
            errors[manifest.id] = f"set {manifest.id} was not consolidated: {in_words(error)}"
    return errors


async def _make_full(repository: Repository, held: Holdings, manifest: Manifest, image: DiskImage) -> None:
    steps = held.chain(manifest, image.name)
    errors = await check_all(repository, steps)
    if errors:
        # What is wrong would get a good checksum by this.
        raise BackupError("; ".join(errors.values()))
    path = os.path.join(repository.set_path(held.name, manifest.id), image.image)
    _check_room(repository, await _most(path, steps))
    new = os.path.join(repository.directory(held.name), f".{manifest.id}.{image.image}{GROWING}")
    try:
        full = await _copy_full(path, new, image)
        async with repository.lock(held.name):
            now = holdings(repository, held.name)
            there = now.shelf.published(manifest.id)
            if there is None or there.attempt != manifest.attempt or there.disk(image.name) != image:
                raise BackupError("somebody else has changed it meanwhile")
            reader = _reader(now, manifest.id)
            if reader:
                raise BackupError(reader)
            note = Consolidation(manifest.id, manifest.attempt, full)
            repository.write_note(held.name, note)
            os.replace(new, path)
            _target.sync_directory(os.path.dirname(path))
            _settle(repository, held.name, note)
    except BaseException as error:
        with after(error):
            _target.remove(new)
        raise


def _reader(held: Holdings, set_id: str) -> str:
    """Who reads a set at this moment, or one that builds on it; empty where nobody does."""
    in_use = condition(held, may_go=False).in_use
    for manifest in held.shelf.sets:
        chains = (_chain.walk(held.shelf.sets, manifest, image.name)[0] for image in manifest.disks)
        if manifest.id in in_use and any(below.id == set_id for steps in chains for below, _image in steps):
            return in_use[manifest.id]
    return ""


async def _most(path: str, steps: Sequence[tuple[Manifest, DiskImage]]) -> int:
    """The most bytes that a full image of a chain can take."""
    image = steps[0][1]
    if all(below.compression == image.compression for _manifest, below in steps):
        return sum(below.bytes for _manifest, below in steps)
    # The same content may take more when it is packed in another way.
    try:
        return await _qemu_img.copy_bytes(path, image.format, image.virtual_size)
    except ToolError:
        return image.virtual_size


def _check_room(repository: Repository, needed: int) -> None:
    """Refuse to take the room that sets which are being made will need: their guests would feel it."""
    promised = sum(repository.outstanding(intent) for intent in repository.intents())
    free = _target.free_bytes(repository.path)
    if needed + promised > free:
        raise BackupError(
            f"{repository.path} has {human(free)} free, of which sets that are being made take {human(promised)}, and"
            f" the full image may take {human(needed)}"
        )


def _forget_cached(path: str) -> None:
    """Bring a file to stable storage, and have whoever reads it next see what is there."""
    _target.flush(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


async def _copy_full(path: str, new: str, image: DiskImage) -> DiskImage:
    """A full image of the same content, on stable storage; returns what is to be said of it."""
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    source = await _qemu_img.whole(path, "qcow2")
    command = _qemu_img.convert_command(source, new, "qcow2", compression=image.compression)
    await _qemu_img.run(command, timeout=_qemu_img.LONG_TIMEOUT, is_long=True)
    _forget_cached(new)
    command = _qemu_img.compare_command(source, await _qemu_img.whole(new, "qcow2"))
    await _qemu_img.run(command, timeout=_qemu_img.LONG_TIMEOUT, is_long=True)
    if os.stat(new).st_size == image.bytes:
        # By their sizes the two are told apart while either may stand there. What follows the last cluster is ignored.
        os.truncate(new, image.bytes + _qemu_img.CLUSTER)
    status = _target.flush(new)
    set_mode(new, PUBLISHED_MODE)
    digest = sha256(new) if image.sha256 else None
    return replace(
        image, level=_chain.FULL, parent=None, reason="it was consolidated", bytes=status.st_size, sha256=digest
    )
