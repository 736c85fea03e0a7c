# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the VMs that a repository knows, and tell them where another one is asked for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused
from .._host.directory import Directory, WrongEntry
from .names import vm_directory
from .repository import FAILED, HARMLESS, LOCK, STAGING
from .staging import litter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .documents import Manifest
    from .repository import Repository


MAX_NAMES = 30
"""VMs that are listed where one is not found."""


def unknown_vms(
    unknown: Sequence[str], known: Sequence[str], path: str, /, *, option: str = "names", **details: Any
) -> Refused:
    """Return what is said of VMs that the repository at C(path) does not know, and which there are.

    Mostly a name is misspelt.
    """
    more = f" and {len(known) - MAX_NAMES} others" if len(known) > MAX_NAMES else ""
    there = ", ".join(known[:MAX_NAMES]) or "none"
    have = "have no sets" if len(unknown) > 1 else "has no set"
    return Refused(option, f"{', '.join(unknown)} {have} in {path}; VMs there: {there}{more}", **details)


def vm_names(repository: Repository) -> list[str]:
    """Return the VMs that a repository has sets of, is getting some, or was to, by the names in their documents."""
    names = set()
    with Directory.at(repository.path) as root:
        for entry in root.entries():
            name = entry.name
            if name.startswith(".") or name in HARMLESS or not (entry.is_symlink() or entry.is_dir()):
                continue
            try:
                with root.directory(name) as directory:
                    found = _any_name(repository, directory)
                    used = not found and _was_used(directory)
            except (BackupError, OSError):
                # Whoever reads this VM tells why it cannot be read.
                found, used = None, True
            if found:
                names.add(found)
            elif used and vm_directory(name) == name:
                names.add(name)
    return sorted(names)


def names_by_identity(repository: Repository) -> dict[str, list[str]]:
    """Return the names of the VMs that a repository has sets of, by the identity in one of their manifests."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError), Directory.at(repository.path) as root:
        for entry in root.entries():
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                # Whoever reads this VM tells why it cannot be read.
                with contextlib.suppress(BackupError, OSError), root.directory(entry.name) as directory:
                    manifest = _any_manifest(repository, directory)
                    if manifest:
                        found.setdefault(manifest.vm.identity, []).append(manifest.vm.name)
    return found


def _any_name(repository: Repository, directory: Directory) -> str | None:
    """Return the name of the VM whose directory this is; None where no document of it tells."""
    found = _any_manifest(repository, directory) or next(iter(repository.intents_in(directory)), None)
    return found.vm.name if found else None


def _any_manifest(repository: Repository, directory: Directory) -> Manifest | None:
    """Return some manifest in a VM's directory, whose name does not always tell the VM's.

    WrongEntry where there is none, but something else in the place of one.
    """
    odd: WrongEntry | None = None
    for entry in reversed(directory.entries()):
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            try:
                found = repository.manifest(directory, entry)
            except FileNotFoundError:
                continue
            except WrongEntry as error:
                odd = error
            else:
                if found:
                    return found
    if odd:
        raise odd
    return None


def _was_used(directory: Directory) -> bool:
    """Return whether there are traces of sets of a VM that has none."""
    hidden = [name for name in directory.names() if name.startswith(".")]
    # Sets may have been moved away, with links in their places. Whatever else is a link, is no set where no lock is.
    moved = LOCK in hidden and any(entry.is_symlink() for entry in directory.entries())
    return moved or any(name.endswith((FAILED, STAGING)) for name in hidden) or bool(litter(directory))
