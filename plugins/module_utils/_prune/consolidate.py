# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make an increment a full image, so that those before it can go."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, ToolError, after, in_words
from .._common.formats import human
from .._host import preallocate, target_files
from .._host.checksum import sha256
from .._host.files import set_mode
from .._host.pace import Pace
from .._qemu import image_commands, qemu_img
from .._qemu.image_chain import FORMAT, checked_image, open_chain
from .._repository import chain
from .._repository.catalog import CONSOLIDATING_SUFFIX, consolidating_files, read_catalog
from .._repository.documents import Consolidation, Level
from .._repository.images import check_all, layers
from .._repository.published import remove_note, rewrite_manifest, write_note
from .._repository.repository import PUBLISHED_MODE
from .._repository.staging import outstanding, remove_file, tidy
from .retention import read_constraints

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .._host.directory import Directory
    from .._qemu.image_chain import Chain
    from .._repository.catalog import VmCatalog
    from .._repository.documents import DiskImage, Manifest
    from .._repository.repository import Repository
    from .retention import RetentionDecision


def finish_consolidation(repository: Repository, vm: str) -> None:
    """Finish what a killed process has left, with the VM's lock held."""
    with repository.opened(vm) as directory:
        for note in repository.records(vm).notes:
            manifest = repository.records(vm).published(note.id)
            if manifest and manifest.attempt == note.attempt and manifest.disk(note.image.name) == note.image:
                with directory.directory(note.id) as place:
                    _finish_manifest(place, manifest)
            remove_note(directory, note.id)
        for name in consolidating_files(directory):
            remove_file(directory, name)
    tidy(repository, vm)


def _finish_manifest(place: Directory, manifest: Manifest) -> None:
    """Write into the manifest of the set at C(place) what its images are by now."""
    rewrite_manifest(place, replace(manifest, level=chain.set_level(disk.level for disk in manifest.disks)))


async def consolidate(
    repository: Repository, catalog: VmCatalog, decisions: Iterable[RetentionDecision]
) -> dict[str, str]:
    """Make all images of some sets full, one after the other; return what went wrong, by set id."""
    errors = {}
    for manifest in (catalog.find(decision.id) for decision in decisions if decision.consolidate):
        try:
            for image in manifest.disks:
                if image.parent:
                    await _make_full(repository, catalog, manifest, image)
        except (BackupError, OSError) as error:
            errors[manifest.id] = f"set {manifest.id} was not consolidated: {in_words(error)}"
    return errors


async def _make_full(repository: Repository, catalog: VmCatalog, manifest: Manifest, image: DiskImage) -> None:
    """Replace an increment by a full image."""
    images = catalog.chain(manifest, image.name)
    with open_chain(layers(repository, images)) as source:
        _check_free(repository, await _most_bytes(source, images))
    name = f".{manifest.id}.{image.image}{CONSOLIDATING_SUFFIX}"
    # All is done by what is opened here, whatever has these names by then.
    with repository.opened(catalog.name) as directory, directory.directory(manifest.id) as place:
        fd = directory.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with open_chain(layers(repository, images)) as source:
                full = await _copy_full(repository, images, source, directory.join(name), fd)
            async with repository.lock(catalog.name):
                there = _unchanged(repository, manifest, image, directory, place)
                _check_open(directory, name, fd)
                write_note(directory, Consolidation(manifest.id, manifest.attempt, full))
                directory.rename(name, image.image, place)
                place.sync()
                _check_open(place, image.image, fd)
                disks = tuple(full if disk == image else disk for disk in there.disks)
                _finish_manifest(place, replace(there, disks=disks))
                remove_note(directory, manifest.id)
        except BaseException as error:
            with after(error):
                directory.remove(name)
            raise
        finally:
            os.close(fd)


def _unchanged(
    repository: Repository, manifest: Manifest, image: DiskImage, directory: Directory, place: Directory
) -> Manifest:
    """Return the manifest of a set as it is now. BackupError where an image of it must not be replaced any more.

    C(directory) is the VM's, and C(place) that of the set, from before.
    """
    now = read_catalog(repository, manifest.vm.name)
    there = now.records.published(manifest.id)
    if there is None or there.attempt != manifest.attempt or there.disk(image.name) != image:
        raise BackupError("another process has changed it meanwhile")
    with repository.opened(manifest.vm.name) as again, again.directory(manifest.id) as set_again:
        if not (os.path.sameopenfile(again.fd, directory.fd) and os.path.sameopenfile(set_again.fd, place.fd)):
            raise BackupError(f"somebody has replaced the directory {place.path}")
    reader = _reader(now, manifest.id)
    if reader:
        raise BackupError(reader)
    return there


def _check_open(directory: Directory, name: str, fd: int) -> None:
    """Raise BackupError where an entry is not the file that is open."""
    found = directory.status(name)
    if found is None or not os.path.samestat(found, os.fstat(fd)):
        raise BackupError(f"somebody has replaced the file {directory.join(name)}")


def _reader(catalog: VmCatalog, set_id: str) -> str:
    """Return who reads a set at this moment, or one that builds on it; empty where nobody does."""
    in_use = read_constraints(catalog, allow_remove_last=False).in_use
    for manifest in catalog.records.sets:
        chains = (chain.walk(catalog.records.sets, manifest, image.name)[0] for image in manifest.disks)
        if manifest.id in in_use and any(below.id == set_id for images in chains for below, _image in images):
            return in_use[manifest.id]
    return ""


async def _most_bytes(source: Chain, images: Sequence[tuple[Manifest, DiskImage]]) -> int:
    """Return the most bytes that a full image of a chain can take."""
    image = images[0][1]
    if all(below.compression == image.compression for _manifest, below in images):
        return sum(below.bytes for _manifest, below in images)
    # With another compression the same content may take more.
    try:
        return await source.copy_bytes(image.virtual_size)
    except ToolError:
        return image.virtual_size


def _check_free(repository: Repository, needed: int) -> None:
    """Refuse to take the space that running backups will need: their guests would feel it."""
    promised = sum(outstanding(repository, intent) for intent in repository.intents())
    free = target_files.free_bytes(repository.path)
    if needed + promised > free:
        raise BackupError(
            f"{repository.path} has {human(free)} free, of which sets that are being made take {human(promised)}, and"
            f" the full image may take {human(needed)}"
        )


async def _copy_full(
    repository: Repository, images: Sequence[tuple[Manifest, DiskImage]], source: Chain, path: str, fd: int
) -> DiskImage:
    """Write a full image of the same content to stable storage; return what the manifest is to say of it.

    C(fd) is the new file, which had C(path) when it was made.
    """
    await _copy_checked(repository, images, source, path, fd)
    return await _read_back(source, path, fd, images[0][1])


async def _copy_checked(
    repository: Repository, images: Sequence[tuple[Manifest, DiskImage]], source: Chain, path: str, fd: int
) -> None:
    """Copy a chain, and compare the checksums of its images, which are read once for both."""
    image = images[0][1]
    pace = Pace()
    paces = {(manifest.id, below.name): pace for manifest, below in images}
    checked = asyncio.ensure_future(check_all(repository, list(reversed(images)), paces))
    command = image_commands.convert_command(
        source.name, qemu_img.by_descriptor(fd), FORMAT, compression=image.compression
    )
    try:
        await qemu_img.run_long(command, (*source.fds, fd), pace)
        preallocate.flush_open(path, fd)
        errors = await checked
    finally:
        checked.cancel()
    if errors:
        # Otherwise what was read of a damaged image would get a new checksum that fits.
        raise BackupError("; ".join(errors.values()))


async def _read_back(source: Chain, path: str, fd: int, image: DiskImage) -> DiskImage:
    """Compare a new image with what it was made from; return what the manifest is to say of it."""
    if os.fstat(fd).st_size == image.bytes:
        # Their sizes must differ: they tell the two apart after a crash. QEMU ignores what follows its clusters.
        os.ftruncate(fd, image.bytes + qemu_img.CLUSTER)
    status = preallocate.flush_open(path, fd)
    set_mode(path, PUBLISHED_MODE, fd)
    # It is to be read back from stable storage.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    command = image_commands.compare_command(source.name, checked_image(fd, path, image.virtual_size).name)
    await qemu_img.run_long(command, (*source.fds, fd))
    digest = sha256(path, fd) if image.sha256 else None
    return replace(
        image, level=Level.FULL, parent=None, reason="it was consolidated", bytes=status.st_size, sha256=digest
    )
