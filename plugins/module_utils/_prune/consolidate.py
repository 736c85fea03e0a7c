# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a full image of an increment, so that those before it can go."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, ToolError, after, in_words
from .._common.formats import human
from .._host import files, preallocate
from .._host.checksum import sha256
from .._host.files import set_mode
from .._qemu import qemu_img
from .._repository import chain
from .._repository.catalog import CONSOLIDATING_SUFFIX, growing, read_catalog
from .._repository.chain import Level
from .._repository.checksums import check_all
from .._repository.documents import Consolidation
from .._repository.repository import PUBLISHED_MODE
from .retention import condition

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .._repository.catalog import VmCatalog
    from .._repository.documents import DiskImage, Manifest
    from .._repository.repository import Repository
    from .retention import RetentionDecision


# Increments that become full


def finish_consolidation(repository: Repository, vm: str) -> None:
    """Bring to its end what a killed process has left, with the VM's lock held."""
    for note in repository.shelf(vm).notes:
        _settle(repository, vm, note)
    for path in growing(repository, vm):
        files.remove(path)
    repository.tidy(vm, "")


def _settle(repository: Repository, vm: str, note: Consolidation) -> None:
    """Let the manifest say what the file is by now, and take the note away."""
    manifest = repository.shelf(vm).published(note.id)
    if manifest and manifest.attempt == note.attempt and manifest.disk(note.image.name) == note.image:
        level = chain.set_level(disk.level for disk in manifest.disks)
        repository.rewrite_manifest(replace(manifest, level=level))
    repository.remove_note(vm, note.id)


async def consolidate(repository: Repository, held: VmCatalog, fates: Iterable[RetentionDecision]) -> dict[str, str]:
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


async def _make_full(repository: Repository, held: VmCatalog, manifest: Manifest, image: DiskImage) -> None:
    steps = held.chain(manifest, image.name)
    errors = await check_all(repository, steps)
    if errors:
        # What is wrong would get a good checksum by this.
        raise BackupError("; ".join(errors.values()))
    path = os.path.join(repository.set_path(held.name, manifest.id), image.image)
    _check_room(repository, await _most(path, steps))
    new = os.path.join(repository.directory(held.name), f".{manifest.id}.{image.image}{CONSOLIDATING_SUFFIX}")
    try:
        full = await _copy_full(path, new, image)
        async with repository.lock(held.name):
            now = read_catalog(repository, held.name)
            there = now.shelf.published(manifest.id)
            if there is None or there.attempt != manifest.attempt or there.disk(image.name) != image:
                raise BackupError("somebody else has changed it meanwhile")
            reader = _reader(now, manifest.id)
            if reader:
                raise BackupError(reader)
            note = Consolidation(manifest.id, manifest.attempt, full)
            repository.write_note(held.name, note)
            os.replace(new, path)
            files.sync_directory(os.path.dirname(path))
            _settle(repository, held.name, note)
    except BaseException as error:
        with after(error):
            files.remove(new)
        raise


def _reader(held: VmCatalog, set_id: str) -> str:
    """Who reads a set at this moment, or one that builds on it; empty where nobody does."""
    in_use = condition(held, may_go=False).in_use
    for manifest in held.shelf.sets:
        chains = (chain.walk(held.shelf.sets, manifest, image.name)[0] for image in manifest.disks)
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
        return await qemu_img.copy_bytes(path, image.format, image.virtual_size)
    except ToolError:
        return image.virtual_size


def _check_room(repository: Repository, needed: int) -> None:
    """Refuse to take the room that sets which are being made will need: their guests would feel it."""
    promised = sum(repository.outstanding(intent) for intent in repository.intents())
    free = files.free_bytes(repository.path)
    if needed + promised > free:
        raise BackupError(
            f"{repository.path} has {human(free)} free, of which sets that are being made take {human(promised)}, and"
            f" the full image may take {human(needed)}"
        )


def _forget_cached(path: str) -> None:
    """Bring a file to stable storage, and have whoever reads it next see what is there."""
    preallocate.flush(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


async def _copy_full(path: str, new: str, image: DiskImage) -> DiskImage:
    """A full image of the same content, on stable storage; returns what is to be said of it."""
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    source = await qemu_img.whole(path, "qcow2")
    command = qemu_img.convert_command(source, new, "qcow2", compression=image.compression)
    await qemu_img.run(command, timeout=qemu_img.LONG_TIMEOUT, is_long=True)
    _forget_cached(new)
    command = qemu_img.compare_command(source, await qemu_img.whole(new, "qcow2"))
    await qemu_img.run(command, timeout=qemu_img.LONG_TIMEOUT, is_long=True)
    if os.stat(new).st_size == image.bytes:
        # By their sizes the two are told apart while either may stand there. What follows the last cluster is ignored.
        os.truncate(new, image.bytes + qemu_img.CLUSTER)
    status = preallocate.flush(new)
    set_mode(new, PUBLISHED_MODE)
    digest = sha256(new) if image.sha256 else None
    return replace(
        image, level=Level.FULL, parent=None, reason="it was consolidated", bytes=status.st_size, sha256=digest
    )
