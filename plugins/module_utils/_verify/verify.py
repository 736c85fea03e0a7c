# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether sets are what they were made to be, as deep as is asked for. Nothing is written into a set.

How a look has ended is written beside the set. Where an image of another set is damaged, that is written beside that
one, too: all sets that build on it are not to be relied on, and retention is to know.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, ToolError, in_words
from .._common.formats import utc_now
from .._common.version import SCHEMA
from .._host.machine import machine_id
from .._qemu import qemu_img
from .._repository.annotations import remove_annotations, write_annotation
from .._repository.catalog import DEPTHS, Depth, read_catalog, require_sets, vm_names
from .._repository.checksums import check_all
from .._repository.documents import Pin, Verification
from .._repository.json_file import UNFINISHED
from .._repository.repository import DESCRIPTION, HARMLESS, INTENT, MANIFEST
from . import boot, boot_options
from .image_check import check_command, shorten
from .model import LOOKS, REMEDY, Finding, Look

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from .._repository.catalog import VmCatalog
    from .._repository.documents import DiskImage, Manifest
    from .._repository.repository import Repository
    from .model import Step, VerifyOptions


def bad_sets(findings: Iterable[Finding]) -> list[str]:
    """Return the sets that are not good, each as C(VM/ID)."""
    return list(dict.fromkeys(f"{finding.vm}/{finding.id}" for finding in findings if finding.error))


def headline(findings: Sequence[Finding]) -> str:
    """Return how many of the sets are good."""
    sets = {(finding.vm, finding.id) for finding in findings}
    return f"{len(sets) - len(bad_sets(findings))} of {len(sets)} sets are good"


def describe(findings: Sequence[Finding]) -> list[str]:
    """Return what was found for people to read, first what is not good."""
    lines = []
    for finding in findings:
        if finding.error:
            disk = f"{finding.disk}: " if finding.disk else ""
            lines.append(f"NOT GOOD  {finding.vm}/{finding.id}  {disk}{finding.error}")
            lines += [f"          | {line}" for line in finding.console]
    bad = bad_sets(findings)
    good: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda one: (one.vm.casefold(), one.id.casefold())):
        if f"{finding.vm}/{finding.id}" not in bad:
            good.setdefault(f"{finding.vm}/{finding.id}", []).append(finding)
    for name, found in good.items():
        disks = ", ".join(finding.disk for finding in found if finding.disk)
        lines.append(f"good      {name}  {disks}")
        lines += [f"          {finding.note}" for finding in found if finding.note]
    return lines


def known_vms(repository: Repository) -> list[str]:
    """All VMs with sets. One without any manifest that can be read goes by the name of its directory."""
    names = vm_names(repository)
    known = {os.path.basename(repository.directory(name)) for name in names}
    with os.scandir(repository.path) as entries:
        others = [entry.name for entry in entries if _is_directory(entry) and entry.name not in known | HARMLESS]
    return sorted(name for name in (*names, *others) if has_sets(repository, name))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it may be one: what cannot be looked up is not passed over."""
    try:
        return entry.is_dir()
    except OSError:
        return True


def has_sets(repository: Repository, name: str) -> bool:
    """Whether there are sets of a VM, or what is left of some."""
    try:
        shelf = repository.shelf(name)
        return bool(shelf.sets or _ruins(repository, name, shelf.strays))
    except (BackupError, OSError):
        # What cannot be read is said by the look at this VM.
        return True


def _ruins(repository: Repository, name: str, strays: Iterable[str]) -> list[str]:
    """Those of a VM's strays that have been sets; others may keep what they like there."""

    def is_one(path: str) -> bool:
        entries = os.listdir(path) if os.path.isdir(path) else []
        return any(entry in (MANIFEST, DESCRIPTION) or entry.endswith(".qcow2") for entry in entries)

    return [stray for stray in sorted(strays) if is_one(repository.set_path(name, stray))]


async def verify_all(
    repository: Repository, names: Sequence[str], set_id: str, order: VerifyOptions
) -> tuple[list[Finding], list[str]]:
    """Look at one set of each VM; one VM never stops the others. Returns what is found, and warnings."""
    work = _Verifier(repository, order)
    found = await asyncio.gather(*(work.verify_vm(name, set_id) for name in names))
    return [finding for findings in found for finding in findings], work.warnings


class _Verifier:
    """All looks of one call. They share the processors: an image takes one of them, whoever's it is."""

    def __init__(self, repository: Repository, order: VerifyOptions) -> None:
        self.repository = repository
        self.order = order
        self.warnings: list[str] = []
        self._processors = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        # A throwaway VM takes as much memory as the real one.
        self._boots = asyncio.Lock()

    async def verify_vm(self, name: str, set_id: str) -> list[Finding]:
        try:
            return await self._verify_vm(name, set_id)
        except (BackupError, OSError) as error:
            return [Finding(name, set_id, "", self.order.depth, in_words(error))]

    async def _verify_vm(self, name: str, set_id: str) -> list[Finding]:
        held = read_catalog(self.repository, name)
        ruins = _ruins(self.repository, name, held.shelf.strays)
        damaged = [self._ruin(name, ruin) for ruin in ruins if set_id in ("", ruin)]
        if damaged and (set_id or not held.shelf.sets):
            return damaged
        require_sets(self.repository, held)
        look = await self._look(held, held.find(set_id))
        for _again in range(LOOKS - 1):
            held = read_catalog(self.repository, name)
            if not look.findings or held.shelf.sets == look.held.shelf.sets:
                break
            # A set was consolidated or removed while it was read: what was found may be no fault.
            look = await self._look(held, held.find(look.manifest.id))
        await self._record(look)
        return [*damaged, *self._findings(look)]

    def _ruin(self, name: str, ruin: str) -> Finding:
        path = os.path.join(self.repository.set_path(name, ruin), MANIFEST)
        error = f"{path} is missing or damaged, so that this is no set any more; {REMEDY} and move the directory away"
        return Finding(name, ruin, "", Depth.MANIFEST, error)

    def _findings(self, look: Look) -> list[Finding]:
        """What is said of each disk, and of the set where there is something to say."""
        whole = [look.findings[""]] if "" in look.findings else []
        if self.order.depth == Depth.BOOT and not whole:
            whole = [Finding(look.held.name, look.manifest.id, "", Depth.BOOT)]
        good = {
            disk: Finding(look.held.name, look.manifest.id, disk, self.order.depth, note=self._unchecked(steps))
            for disk, steps in look.chains.items()
        }
        return [*whole, *({**good, **look.findings}[image.name] for image in look.manifest.disks)]

    def _unchecked(self, steps: Sequence[Step]) -> str:
        without = ", ".join(self._path(*step) for step in steps if not step[1].sha256)
        return f"made without a checksum: {without}" if without and self.order.depth != Depth.MANIFEST else ""

    def _path(self, manifest: Manifest, image: DiskImage) -> str:
        return os.path.join(self.repository.set_path(manifest.vm.name, manifest.id), image.image)

    async def _look(self, held: VmCatalog, manifest: Manifest) -> Look:
        look = Look(held, manifest)
        self._check_manifest(look)
        for depth, deeper in ((Depth.CHECKSUM, self._check_sums), (Depth.IMAGE, self._check_images)):
            if DEPTHS.index(depth) <= DEPTHS.index(self.order.depth):
                await deeper(look)
        if self.order.boot:
            await self._check_boot(look, self.order.boot)
        return look

    # manifest

    def _check_manifest(self, look: Look) -> None:
        held, manifest = look.held, look.manifest
        for image in manifest.disks:
            try:
                look.chains[image.name] = held.chain(manifest, image.name)
            except BackupError:
                reason = held.broken.get((manifest.id, image.name), "its chain is not complete")
                look.fail(image.name, Depth.MANIFEST, f"{reason}; {REMEDY}")
        reasons = [*self._oddities(held, manifest), *self._unreadable(manifest)]
        if reasons:
            look.fail("", Depth.MANIFEST, "; ".join(reasons))

    def _oddities(self, held: VmCatalog, manifest: Manifest) -> list[str]:
        """What does not belong to a set like this one."""
        path = self.repository.set_path(held.name, manifest.id)
        if self.repository.set_path(manifest.vm.name, manifest.id) != path:
            return [f"{path} is a set of VM {manifest.vm.name}; move it to where it belongs"]
        images = {image.image for image in manifest.disks}
        found = [] if manifest.disks else [f"{path} has no disk"]
        if len(images) < len(manifest.disks) or any(os.path.basename(image) != image for image in images):
            found.append(f"{os.path.join(path, MANIFEST)} does not name one file of the set for each disk; {REMEDY}")
        expected = {MANIFEST, DESCRIPTION, *images}
        # What a killed process leaves of its making, and NFS of a file that somebody still reads.
        making = {INTENT, *(name + UNFINISHED for name in (MANIFEST, DESCRIPTION, INTENT))}
        entries = sorted(entry for entry in os.listdir(path) if not entry.startswith(".nfs"))
        found += [
            f"{os.path.join(path, entry)} does not belong to the set; move it away"
            for entry in entries
            if entry not in expected | making
        ]
        return found

    def _unreadable(self, manifest: Manifest) -> list[str]:
        """What is wrong with the description of the VM."""
        path = os.path.join(self.repository.set_path(manifest.vm.name, manifest.id), DESCRIPTION)
        try:
            self._description(manifest)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            return [f"{path} cannot be read ({why}), and nothing else tells how the VM was built; {REMEDY}"]
        return []

    def _description(self, manifest: Manifest) -> dict[str, Any]:
        path = os.path.join(self.repository.set_path(manifest.vm.name, manifest.id), DESCRIPTION)
        with open(path, encoding="utf-8") as source:
            found = json.load(source)
        if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
            raise ValueError("it has no schema number")
        if found["schema"] > SCHEMA:
            raise ValueError("its schema {} is newer than this collection".format(found["schema"]))
        return found

    # checksum

    async def _check_sums(self, look: Look) -> None:
        images = look.images()
        errors = await asyncio.gather(*(self._check_sum(step) for step in images.values()))
        look.note_damage(Depth.CHECKSUM, {key: error for key, error in zip(images, errors) if error})

    async def _check_sum(self, step: Step) -> str:
        async with self._processors:
            errors = await check_all(self.repository, [step])
        return "".join(f"{error}; {REMEDY}" for error in errors.values())

    # image

    async def _check_images(self, look: Look) -> None:
        images = look.images()
        below = {key: self._backing(look, step) for key, step in images.items()}
        errors = await asyncio.gather(*(self._check_image(step, below[key]) for key, step in images.items()))
        look.note_damage(Depth.IMAGE, {key: error for key, error in zip(images, errors) if error})
        disks = list(look.chains)
        unreadable = await asyncio.gather(*(self._read(look.chains[disk][0]) for disk in disks))
        for disk, error in zip(disks, unreadable):
            if error:
                look.fail(disk, Depth.IMAGE, error)

    def _backing(self, look: Look, step: Step) -> str | None:
        """The name of the image below as it has to stand in an image, None for a full one."""
        parent = step[1].parent
        base = look.held.shelf.published(parent.id) if parent else None
        below = base.disk(step[1].name) if base else None
        return f"../{base.id}/{below.image}" if base and below else None

    async def _check_image(self, step: Step, backing: str | None) -> str:
        """What is wrong with one image, the others left aside."""
        path, image = self._path(*step), step[1]
        try:
            async with self._processors:
                told = await qemu_img.run_json(qemu_img.info_command(path, image.format, shared=True))
                await qemu_img.run(check_command(path, image.format), timeout=qemu_img.LONG_TIMEOUT)
        except ToolError as error:
            return f"image {path} is damaged: {shorten(str(error))}; {REMEDY}"
        if told.get("virtual-size") != image.virtual_size:
            return (
                f"image {path} is that of another disk: it has {told.get('virtual-size')} bytes, and the disk had"
                f" {image.virtual_size}; {REMEDY}"
            )
        if told.get("backing-filename") != backing:
            found = told.get("backing-filename") or "nothing"
            return (
                f"image {path} is that of another disk or set: it builds on {found}, and should on"
                f" {backing or 'nothing'}; {REMEDY}"
            )
        return ""

    async def _read(self, step: Step) -> str:
        """Read a disk with all that it is made of, as a restore does."""
        path = self._path(*step)
        try:
            async with self._processors:
                source = await qemu_img.whole(path, step[1].format)
                command = qemu_img.read_command(source, step[1].virtual_size)
                await qemu_img.run(command, timeout=qemu_img.LONG_TIMEOUT)
        except ToolError as error:
            return f"image {path} cannot be read whole: {shorten(str(error))}; {REMEDY}"
        return ""

    # boot

    async def _check_boot(self, look: Look, wish: boot_options.BootOptions) -> None:
        broken = [image.name for image in look.manifest.disks if image.name not in look.chains]
        if broken or "" in look.findings:
            reason = "not started, since {} not good".format("disk " + broken[0] + " is" if broken else "the set is")
            before = look.findings.get("")
            if before:
                # The set's own faults stay to be seen.
                look.fail("", before.depth, f"{before.error}; {reason}")
            else:
                look.fail("", Depth.BOOT, reason, guilty=False)
            return
        try:
            async with self._boots:
                ending = await self._start(look, wish)
        except (BackupError, OSError) as error:
            ending = boot.BootResult(in_words(error), guilty=False)
        if ending.error:
            look.fail("", Depth.BOOT, ending.error, console=ending.console, guilty=ending.guilty)

    async def _start(self, look: Look, wish: boot_options.BootOptions) -> boot.BootResult:
        boot.clear_work_dirs(wish.tmpdir)
        with boot.work_dir(wish.tmpdir) as place:
            layers = await self._overlays(look.manifest, place)
            try:
                description = self._description(look.manifest)
                copies = boot.copy_flash(description, layers, place)
                options = boot_options.command(description, layers, copies, wish, boot.this_host(), place)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                return boot.BootResult(f"{DESCRIPTION} does not describe a VM: {error!r}")
            pins = [_pin(look.manifest, layer) for layer in layers]
            pinned = await self._tell(look, pins, "no prune is told that it is in use")
            try:
                return await boot.watch([wish.qemu, *options], place, wish)
            finally:
                if pinned:
                    await self._take_back(look.held.name, pins)

    async def _overlays(self, manifest: Manifest, place: str) -> list[boot_options.BootDisk]:
        layers = []
        for number, image in enumerate(manifest.disks):
            overlay = os.path.join(place, f"disk{number}.qcow2")
            backing = (os.path.abspath(self._path(manifest, image)), image.format)
            await qemu_img.run(qemu_img.create_command(overlay, "qcow2", image.virtual_size, backing=backing))
            layers.append(boot_options.BootDisk(image.name, image.node, image.qdev, backing[0], overlay))
        return layers

    async def _take_back(self, vm: str, pins: Iterable[Pin]) -> None:
        async with self.repository.lock(vm):
            remove_annotations(self.repository, vm, pins)

    # What is written beside the sets

    async def _record(self, look: Look) -> None:
        """Say beside the sets how it went."""
        outcomes = {manifest.id: (manifest, found) for manifest, found in _damaged_sets(look)}
        outcomes[look.manifest.id] = (look.manifest, look.guilty())
        when = utc_now()
        marks = [
            Verification(one.id, one.attempt, self._reached(look, found), when, tuple(each.text for each in found))
            for one, found in outcomes.values()
        ]
        await self._tell(look, marks, "nobody is told how this verification ended")

    def _reached(self, look: Look, found: Sequence[Finding]) -> str:
        """How deep one has to look to see what was found, all of it. Without any, how deep the look went."""
        if found:
            return max((finding.depth for finding in found), key=DEPTHS.index)
        # For reasons that are not the set's, it may not have gone as deep as it should.
        return Depth.IMAGE if "" in look.findings else self.order.depth

    async def _tell(self, look: Look, marks: Sequence[Verification | Pin], otherwise: str) -> bool:
        """Write marks; a repository that cannot be written to is read all the same, and that is warned of."""
        vm = look.held.name
        if self.order.check_mode:
            return False
        try:
            async with self.repository.lock(vm):
                there = read_catalog(self.repository, vm)
                for mark in marks:
                    fitting = self._fitting(there, mark)
                    if fitting:
                        write_annotation(self.repository, vm, fitting)
        except (BackupError, OSError) as error:
            who = f"VM {vm}, set {look.manifest.id}"
            why = in_words(error)
            self.warnings.append(f"{who}: {self.repository.path} cannot be written to ({why}), so that {otherwise}")
            return False
        return True

    def _fitting(self, there: VmCatalog, mark: Verification | Pin) -> Verification | Pin | None:
        """The mark as it may be written, with what is known besides. None where its set is gone, or is not good yet."""
        manifest = there.shelf.published(mark.id)
        if manifest is None or isinstance(mark, Pin):
            return mark if manifest else None
        if manifest.attempt != mark.attempt:
            return None
        before = there.marks.verification(manifest)
        if before and not before.ok and _deeper(before, mark):
            if mark.ok:
                self.warnings.append(
                    f"VM {there.name}, set {mark.id}: it still counts as not good, by what depth {before.depth} found"
                    f" on {before.when}; look as deep again"
                )
                return None
            # That a guest did not start is not to hide that its images are damaged.
            if before.depth != Depth.BOOT:
                errors = tuple(dict.fromkeys((*mark.errors, *before.errors)))
                mark = replace(mark, depth=before.depth, errors=errors)
        return mark


def _deeper(one: Verification, other: Verification) -> bool:
    """Whether one look went deeper than another of this release; what a later one calls a depth is deeper."""
    return one.depth not in DEPTHS or DEPTHS.index(one.depth) > DEPTHS.index(other.depth)


def _damaged_sets(look: Look) -> Iterator[tuple[Manifest, list[Finding]]]:
    """The sets that damaged images belong to, and what is wrong with these."""
    for manifest in look.held.shelf.sets:
        keys = [(manifest.id, image.name) for image in manifest.disks]
        found = [look.damaged[key] for key in keys if key in look.damaged]
        if found:
            yield manifest, found


def _pin(manifest: Manifest, layer: boot_options.BootDisk) -> Pin:
    return Pin(manifest.id, layer.name, layer.overlay, os.uname().nodename, machine_id(), utc_now())
