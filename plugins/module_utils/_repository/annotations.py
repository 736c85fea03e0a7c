# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said of published sets, beside them: protected, in use by an overlay, verified. The sets stay as they are.

C(.<set id>.protected.json), C(.<set id>.pin-<8 hex>.json) and C(.<set id>.verified.json) stand in the VM's directory.
What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .._host.files import remove, sync_directory
from .._host.machine import machine_id
from .documents import Pin, Protection, Verification
from .json_file import read_document, write_document

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .documents import Manifest
    from .repository import Repository


SUFFIX = ".json"
PROTECTED = ".protected"
VERIFIED = ".verified"
PIN = ".pin-"
PARTIAL = ".partial"
"""What the name of a restored disk ends with until it is complete."""


@dataclass(frozen=True)
class SetAnnotations:
    """All that is said of the sets of one VM."""

    protections: tuple[Protection, ...] = ()
    pins: tuple[Pin, ...] = ()
    verifications: tuple[Verification, ...] = ()

    def protected(self, set_id: str) -> bool:
        return any(mark.id == set_id for mark in self.protections)

    def pins_of(self, set_id: str) -> tuple[Pin, ...]:
        return tuple(mark for mark in self.pins if mark.id == set_id)

    def verification(self, manifest: Manifest) -> Verification | None:
        """How the last look at a set ended; None for one that nobody has looked at."""
        return self._verified.get(manifest.attempt)

    @cached_property
    def _verified(self) -> dict[str, Verification]:
        return {mark.attempt: mark for mark in self.verifications}


def read_annotations(repository: Repository, vm: str) -> SetAnnotations:
    """What is said of the sets of one VM, whether they are still there or not."""
    directory = repository.directory(vm)
    try:
        entries = sorted(entry for entry in os.listdir(directory) if entry.startswith(".") and entry.endswith(SUFFIX))
    except FileNotFoundError:
        return SetAnnotations()
    kinds: dict[Any, list[Any]] = {Protection: [], Pin: [], Verification: []}
    for entry in entries:
        kind = _kind(entry[1 : -len(SUFFIX)])
        mark = read_document(os.path.join(directory, entry), kind) if kind else None
        if mark:
            kinds[kind].append(mark)
    return SetAnnotations(*(tuple(found) for found in kinds.values()))


def _kind(stem: str) -> Any:
    if stem.endswith(PROTECTED):
        return Protection
    if stem.endswith(VERIFIED):
        return Verification
    return Pin if PIN in stem else None


def is_read(pin: Pin) -> bool:
    """Whether what a pin stands for is still there. On another machine only that machine can tell."""
    return pin.machine_id != machine_id() or any(may_be_there(pin.path + end) for end in ("", PARTIAL))


def may_be_there(path: str) -> bool:
    """False only where there is nothing for certain: a path that this user may not look up is no such one."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def write_annotation(repository: Repository, vm: str, mark: Protection | Pin | Verification) -> None:
    """Say something of a set; what was said before in the same sense is replaced."""
    write_document(annotation_path(repository, vm, mark), asdict(mark))


def remove_annotations(repository: Repository, vm: str, marks: Iterable[Protection | Pin | Verification]) -> None:
    """Take back what was said."""
    for mark in marks:
        remove(annotation_path(repository, vm, mark))
    sync_directory(repository.directory(vm))


def annotation_path(repository: Repository, vm: str, mark: Protection | Pin | Verification) -> str:
    if isinstance(mark, Pin):
        # One overlay has one pin, however often it is made.
        place = f"{mark.machine_id}:{mark.path}".encode("utf-8", "surrogateescape")
        suffix = PIN + hashlib.sha256(place).hexdigest()[:8]
    else:
        suffix = PROTECTED if isinstance(mark, Protection) else VERIFIED
    return os.path.join(repository.directory(vm), f".{mark.id}{suffix}{SUFFIX}")
