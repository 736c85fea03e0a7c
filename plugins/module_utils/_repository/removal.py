# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Remove sets, and what processes that are done or dead have left.

What changes something here is called with the VM's lock held.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from .._host.files import remove, sync_directory
from .json_file import UNFINISHED
from .repository import INTENT, STAGING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .repository import Repository


REMOVED = ".removed"
IN_THE_WAY = frozenset({errno.EISDIR, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST})
"""Why what is left of a set may stay. Any other error says that the repository cannot be worked on."""


def untidy(repository: Repository, vm: str, set_id: str) -> bool:
    """Return whether tidy() has something to remove."""
    return bool(_traces(repository, vm, set_id))


def tidy(repository: Repository, vm: str, set_id: str) -> None:
    """Remove the traces of the making of a published set, and all litter of its VM.

    What cannot be removed does no harm, and litter() goes on to tell it.
    """
    for path in _traces(repository, vm, set_id):
        if os.path.isdir(path):
            remove_directory(path)
        else:
            remove(path)


def _traces(repository: Repository, vm: str, set_id: str) -> list[str]:
    intent = os.path.join(repository.set_path(vm, set_id), INTENT)
    making = (intent + UNFINISHED, intent, repository.failure_path(vm, set_id))
    return [*(path for path in making if os.path.lexists(path)), *litter(repository, vm)]


def litter(repository: Repository, vm: str) -> list[str]:
    """Return what killed processes have left of a VM. All of it is hidden, as a set's id may look like its names."""
    directory = repository.directory(vm)
    found = []
    for entry in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
        if not entry.startswith("."):
            continue
        path = os.path.join(directory, entry)
        half_written = entry.endswith(UNFINISHED)
        half_removed = entry.endswith(REMOVED)
        unclaimed = entry.endswith(STAGING) and not os.path.lexists(os.path.join(path, INTENT))
        if half_written or half_removed or unclaimed:
            found.append(path)
    return found


def remove_set(repository: Repository, vm: str, set_id: str) -> str:
    """Remove a set, and return what could not be removed and why; empty where all could.

    It is not listed any more from the first moment on. tidy() removes later what a crash, or an error, leaves of it.
    """
    directory = repository.directory(vm)
    going = os.path.join(directory, f".{set_id}{REMOVED}")
    number = 1
    while os.path.lexists(going):
        # Another set of this id was removed before, and not all of it could be.
        number += 1
        going = os.path.join(directory, f".{set_id}.{number}{REMOVED}")
    os.rename(repository.set_path(vm, set_id), going)
    sync_directory(directory)
    left = remove_directory(going)
    sync_directory(directory)
    return left


def remove_directory(path: str) -> str:
    """Remove a directory with its files, an intent last; return what has to stay, with the reasons.

    That is a directory, which somebody has put there, an immutable file, or on NFS one that somebody has open.
    """
    entries = sorted(os.listdir(path), key=lambda entry: entry == INTENT)
    left = [_remove_if_possible(remove, os.path.join(path, entry)) for entry in entries]
    if not any(left):
        left.append(_remove_if_possible(os.rmdir, path))
    return "; ".join(filter(None, left))


def _remove_if_possible(call: Callable[[str], object], path: str) -> str:
    """Remove something with this call; return why it has to stay."""
    try:
        call(path)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        return f"{path} cannot be removed ({error.strerror})"
    return ""
