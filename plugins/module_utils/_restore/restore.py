# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Restore disks of a set: as copies of their chain, or as overlays on it.

Everything is checked before the first byte is written, but the checksums of images that are copied to files: these are
taken of what the copy reads, while it does. A file gets its name only when all checksums are right, and it is complete
and on stable storage; a receipt beside it then says what it is, so that the same restore is not made twice. The files
of a domain wait for each other (C(_restore/agreement.py)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, after, in_words
from .._host import preallocate, target_files
from .._host.directory import Directory
from .._host.pace import Pace
from .._host.probe import answers
from .._qemu import image_commands, qemu_img
from .._repository.annotations import read_annotations
from .._repository.json_file import write_document
from .agreement import Agreement, Ended
from .checks import (
    check_checksums,
    check_device,
    check_headers,
    check_space,
    check_target,
    check_unused,
    is_restored,
    lock_target,
    make_receipt,
    open_images,
    read_receipt,
    refuse_collisions,
)
from .model import Checksum
from .pins import is_noted, make_pin, pinned, put_pin, remove_former_pins, remove_other_pins

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.repository import Repository
    from .model import DiskRestore, RestoreOptions

    Guard = Callable[[Sequence[str]], Awaitable[None]]


@dataclass(frozen=True)
class RestoreRun:
    """What the disks of one restore share.

    C(settled) has of each disk, by its target, whether its set is pinned, or read all the same; where not, it has
    failed. C(checked) ends when the checksums of all that are pinned are right, and raises BackupError where one is
    not; C(paces) has, by their targets, the disks that are written before that. C(agreement) is there where the disks
    are those of a domain. C(guard) is asked before files get their names.
    """

    repository: Repository
    vm: str
    options: RestoreOptions
    warnings: list[str]
    settled: Mapping[str, asyncio.Future[bool]]
    checked: asyncio.Future[None]
    paces: Mapping[str, Pace]
    agreement: Agreement | None = None
    guard: Guard | None = None


async def restore(
    repository: Repository,
    catalog: VmCatalog,
    disks: Sequence[DiskRestore],
    options: RestoreOptions,
    look: Callable[[], Awaitable[None]] | None = None,
    guard: Guard | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Restore all disks, after all checks; return the results, and warnings.

    C(look) is given where they are those of a domain: it raises BackupError where the domain is not as it was.
    C(guard) raises Refused for targets that must not be restored to.
    """
    refuse_collisions(disks)
    waiting = [disk for disk in disks if not is_restored(repository, disk)]
    for disk in waiting:
        check_target(disk, options.overwrite)
    if guard and waiting:
        # A disk that is missing may be waited for by a saved state, too.
        await guard([disk.target for disk in waiting])
    check_headers(repository, waiting)
    await check_space(repository, [disk for disk in waiting if not (disk.overlay or disk.block_device)])
    warnings: list[str] = []
    if options.check_mode:
        await _check(repository, catalog.name, waiting, options, {})
    else:
        await _restore_all(repository, catalog.name, waiting, options, warnings, look, guard)
        for disk in disks:
            if disk not in waiting:
                await _finish(repository, catalog.name, disk, warnings)
    return [disk.result(disk in waiting) for disk in disks], warnings


async def _check(
    repository: Repository, vm: str, disks: Sequence[DiskRestore], options: RestoreOptions, paces: Mapping[str, Pace]
) -> None:
    if disks and options.checksum != Checksum.FALSE:
        await check_checksums(repository, vm, disks, paces)


async def _restore_all(
    repository: Repository,
    vm: str,
    disks: Sequence[DiskRestore],
    options: RestoreOptions,
    warnings: list[str],
    look: Callable[[], Awaitable[None]] | None,
    guard: Guard | None,
) -> None:
    """Restore disks, none of them where an image of any of them is not what was written."""
    paces = {disk.target: Pace() for disk in disks if options.is_written_early(disk)}
    loop = asyncio.get_running_loop()
    settled: dict[str, asyncio.Future[bool]] = {disk.target: loop.create_future() for disk in disks}

    async def check() -> None:
        # Before its set is pinned, a prune may rewrite or remove what is read here.
        for is_pinned in settled.values():
            await asyncio.shield(is_pinned)
        await _check(repository, vm, [disk for disk in disks if settled[disk.target].result()], options, paces)

    checked = asyncio.ensure_future(check())
    agreement = _agreement(disks, look) if look and disks else None
    run = RestoreRun(repository, vm, options, warnings, settled, checked, paces, agreement, guard)
    try:
        done = await asyncio.gather(*(_restore_disk(run, disk) for disk in disks), return_exceptions=True)
    finally:
        # Where all of them have failed, nobody needs it any more.
        checked.cancel()
        if agreement:
            await agreement.end()
    with contextlib.suppress(asyncio.CancelledError):
        await checked
    _raise_failures(vm, disks, done)


def _agreement(disks: Sequence[DiskRestore], look: Callable[[], Awaitable[None]]) -> Agreement:
    """Return what the disks of a domain wait for: nothing is to be in the way of any of their files."""
    before = {disk.target: target_files.identity(disk.target) for disk in disks if not disk.block_device}

    async def look_at_all() -> None:
        try:
            for target, there in before.items():
                if target_files.identity(target) != there:
                    raise BackupError(f"somebody has replaced {target} during the restore")
                if there[0]:
                    check_unused(target)
            await look()
        except BackupError as error:
            raise BackupError(f"{in_words(error)}. No file was replaced") from error

    return Agreement(look_at_all, [disk.target for disk in disks])


def _raise_failures(vm: str, disks: Sequence[DiskRestore], done: Sequence[BaseException | None]) -> None:
    """Raise one BackupError for all disks that failed."""
    failed = [(disk, error) for disk, error in zip(disks, done) if error]
    for _disk, error in failed:
        if not isinstance(error, (BackupError, OSError)):
            raise error
    if failed:
        # What they have waited for together is told once.
        shared: dict[int, list[DiskRestore]] = {}
        for disk, error in failed:
            shared.setdefault(id(error), []).append(disk)
        words = {id(error): in_words(error) for _disk, error in failed}
        reasons = "; ".join(
            "{}: {}".format(", ".join(f"disk {disk.name} to {disk.target}" for disk in those), words[error])
            for error, those in shared.items()
        )
        good = [disk.result(True) for disk, error in zip(disks, done) if not error]
        raise BackupError(f"VM {vm}: {reasons}", restored=good)


async def _restore_disk(run: RestoreRun, disk: DiskRestore) -> None:
    try:
        # Two processes that write to one target would spoil it.
        async with lock_target(disk.target):
            if disk.block_device:
                await _write_device(run, disk)
            else:
                await _write_file(run, disk)
    finally:
        # Where it has failed, the checksums go on for the other disks.
        if not run.settled[disk.target].done():
            run.settled[disk.target].set_result(False)
        if disk.target in run.paces:
            run.paces[disk.target].end()
        if run.agreement:
            run.agreement.leave(disk.target)


@contextlib.asynccontextmanager
async def _reading(run: RestoreRun, disk: DiskRestore) -> AsyncIterator[None]:
    """Pin the set of a disk, and have its checksums compared: first, unless the disk is written early."""
    async with pinned(run.repository, run.vm, disk, run.warnings):
        run.settled[disk.target].set_result(True)
        if disk.target not in run.paces:
            await _checked(run)
        yield


async def _unless_failed(run: RestoreRun, work: Callable[[], Awaitable[Any]]) -> None:
    """Do what takes long, and end it where another disk of the domain has failed."""
    await (run.agreement.unless_failed(work) if run.agreement else work())


async def _checked(run: RestoreRun) -> None:
    """Wait for the checksums, which go on for the other disks whatever becomes of this one."""
    await _unless_failed(run, lambda: asyncio.shield(run.checked))


async def _write_device(run: RestoreRun, disk: DiskRestore) -> None:
    async with _reading(run, disk):
        if run.guard:
            await run.guard([disk.target])
        # The first check was before the checksums, which may have taken long.
        check_device(disk, run.options.overwrite)
        if run.agreement:
            # It has no other name to be written under, so that it cannot wait for the files.
            await run.agreement.look()
        try:
            await _unless_failed(run, lambda: _copy(run, disk, disk.target))
            preallocate.flush(disk.target)
            await _checked(run)
        except Ended:
            raise BackupError(
                "its copy was ended, because another disk of the domain was not restored; do not use its content"
            ) from None
    if run.agreement:
        run.agreement.complete(disk.target)


async def _write_file(run: RestoreRun, disk: DiskRestore) -> None:
    """Write the file under another name, and rename it when it is complete and its checksums are known to be right."""
    repository = run.repository
    replaces = target_files.identity(disk.target) if run.options.overwrite else (0, 0)
    # A killed process may have left one.
    _remove_partial(disk.partial)
    fd = os.open(disk.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    made = target_files.identity(disk.partial)
    try:
        async with _reading(run, disk):
            # By descriptor: another thing may have the path by now.
            if disk.overlay:
                await _create_overlay(repository, disk, fd)
            else:
                await _unless_failed(run, lambda: _copy(run, disk, qemu_img.by_descriptor(fd), (fd,)))
            preallocate.flush_open(disk.partial, fd)
            await _checked(run)
            if run.agreement:
                run.agreement.complete(disk.target)
                await run.agreement.reached()
            if run.guard:
                await run.guard([disk.target])
            if replaces[0]:
                # This comes last: libvirt may take its time to answer.
                check_unused(disk.target)
            _check_made(disk.partial, made)
            former = read_receipt(disk.receipt) if replaces[0] else None
            _take_name(repository, disk, replaces, made)
            if former and former.repository == repository.uuid and former.vm != run.vm:
                await remove_former_pins(repository, former.vm, disk, run.warnings)
    except BaseException as error:
        with after(error):
            # A call on one that hangs would never return.
            if not await answers(os.path.dirname(disk.partial)):
                raise BackupError(f"{disk.partial} is left there: its file system does not answer") from None
            if target_files.identity(disk.partial) == made:
                target_files.remove(disk.partial)
        raise
    finally:
        os.close(fd)


def _check_made(path: str, made: tuple[int, int]) -> None:
    """Raise BackupError where another thing stands at C(path) than the file that was made."""
    if target_files.identity(path) != made:
        raise BackupError(
            f"somebody has replaced {path}: another restore uses the same place, or another program has written there."
            " Find out who, then restore again"
        )


def _remove_partial(path: str) -> None:
    """Remove an unfinished copy. Refused where a process still writes it, perhaps on another machine."""
    if os.path.isfile(path):
        check_unused(path, "another process, such as a backup or a restore to the same place")
    target_files.remove(path)


def _take_name(repository: Repository, disk: DiskRestore, replaces: tuple[int, int], made: tuple[int, int]) -> None:
    """Write the receipt, and then give a complete file its name: whatever comes in between, the two belong together."""
    receipt = make_receipt(repository, disk, os.stat(disk.partial))
    with Directory.at(os.path.dirname(disk.receipt)) as directory:
        write_document(directory, os.path.basename(disk.receipt), receipt)
    try:
        target_files.take_name(disk.partial, disk.target, replaces)
        _check_made(disk.target, made)
    except (BackupError, OSError) as error:
        with after(error):
            target_files.remove(disk.receipt)
        raise


async def _copy(run: RestoreRun, disk: DiskRestore, path: str, fds: tuple[int, ...] = ()) -> None:
    """Copy a disk to what stands at C(path); C(fds) are the descriptors that this name needs."""
    with open_images(run.repository, disk) as chain:
        command = image_commands.convert_command(chain.name, path, disk.format, disk.block_device)
        if qemu_img.is_aligned(disk.format, disk.image.virtual_size) and _takes_direct(path):
            # All of it has to reach stable storage anyway, and others need the page cache.
            command[2:2] = ["-t", "none"]
        await qemu_img.run_long(command, (*chain.fds, *fds), run.paces.get(disk.target))


def _takes_direct(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def _create_overlay(repository: Repository, disk: DiskRestore, fd: int) -> None:
    # Whoever starts a VM on it has QEMU follow the names in the images.
    with open_images(repository, disk):
        pass
    backing = (repository.set_image_path(disk.manifest, disk.image), disk.image.format)
    command = qemu_img.create_command(qemu_img.by_descriptor(fd), "qcow2", disk.image.virtual_size, backing=backing)
    await qemu_img.run(command, pass_fds=(fd,))


async def _finish(repository: Repository, vm: str, disk: DiskRestore, warnings: list[str]) -> None:
    """Finish a restore that was killed when its target was complete."""
    if os.path.lexists(disk.partial):
        async with lock_target(disk.target):
            # A process that still writes it removes it in the end.
            with contextlib.suppress(Refused):
                _remove_partial(disk.partial)
    if disk.overlay and not is_noted(make_pin(disk), read_annotations(repository, vm).pins):
        await put_pin(repository, vm, disk, warnings)
    await remove_other_pins(repository, vm, disk, warnings)
