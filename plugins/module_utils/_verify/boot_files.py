# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Open the files of a throwaway VM, which its QEMU gets as descriptors.

C(vm.json) comes out of the repository, and the guest shows what it is given. So of this machine's own files it gets
firmware, and what the caller allows.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._common.formats import human
from .._host.target_files import free_bytes
from .._qemu.qemu_img import by_descriptor

if TYPE_CHECKING:
    from collections.abc import Sequence


FIRMWARE = re.compile(
    r"/usr/(?:local/)?(?:share|lib)/(?:pve-)?(?:qemu|ovmf|aavmf|seabios|edk2|ipxe)[^/]*/", re.IGNORECASE
)
"""Where distributions have firmware, and nothing else."""
LARGEST = 1 << 30
"""Bytes of the largest kernel or initrd."""
LARGEST_FLASH = 64 << 20
"""Bytes of the largest flash chip that a machine has (QEMU's virt)."""
MIN_FREE = 128 << 20
"""Bytes that a throwaway VM leaves free where its overlays are: others need them."""


class BootFiles(contextlib.ExitStack):
    """The work directory of a throwaway VM, and its open files. C(allowed) are files and directories of the caller.

    C(inherited) are all descriptors that QEMU gets, C(sets) those of them that it is told of.
    """

    def __init__(self, directory: str, allowed: Sequence[str] = ()) -> None:
        super().__init__()
        self.directory = directory
        self.inherited: list[int] = []
        self.sets: list[int] = []
        self._allowed = [os.path.realpath(path) for path in allowed]

    def path(self, name: str) -> str:
        """Return the path of a file in the work directory."""
        return os.path.join(self.directory, name)

    def open(self, name: str, flags: int) -> int:
        """Open a file of the work directory, which C(flags) may make, for QEMU to inherit."""
        fd = os.open(self.path(name), flags | os.O_CLOEXEC, 0o600)
        self.callback(os.close, fd)
        self.inherited.append(fd)
        return fd

    def listen(self, name: str) -> int:
        """Open a socket in the work directory, for QEMU to inherit."""
        listener = self.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(self.path(name))
        listener.listen(1)
        self.inherited.append(listener.fileno())
        return listener.fileno()

    def name(self, fd: int) -> str:
        """Return the name by which QEMU opens a descriptor that it can be told of: an image, or what it writes."""
        self.sets.append(fd)
        return f"/dev/fdset/{fd}"

    def flash(self, path: str, name: str) -> str:
        """Return the name of a copy of a flash chip of this machine; empty where there is no such file."""
        if not os.path.lexists(path):
            return ""
        self._copy(path, "a flash chip", name, LARGEST_FLASH)
        return self.name(self.open(name, os.O_RDWR))

    def kernel(self, path: str, option: str) -> str:
        """Return the name of a copy of what an option such as C(-kernel) names on this machine."""
        name = option.lstrip("-")
        self._copy(path, f"its {name}", name, LARGEST)
        # QEMU looks at the permissions once more. It gets to the file without going through the directory.
        os.chmod(self.path(name), 0o444)
        return by_descriptor(self.open(name, os.O_RDONLY))

    def _copy(self, path: str, what: str, name: str, most: int) -> None:
        """Copy a file that may be used. Nothing is opened before that is known: of some devices that has effects."""
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise BackupError(f"{_named(path, what)} cannot be opened: {error.strerror}; {REMEDY}") from error
        try:
            found = os.readlink(by_descriptor(place))
            status = os.fstat(place)
            if not (os.path.isabs(path) and stat.S_ISREG(status.st_mode) and self._may_be_used(found)):
                raise BackupError(
                    f"{_named(path, what)} is no firmware of this machine, so it was not read: a set can name any"
                    f" file; {REMEDY}"
                )
            if status.st_size > most:
                raise BackupError(f"{_named(path, what)} has {human(status.st_size)}, and {human(most)} is the most")
            if free_bytes(self.directory) < MIN_FREE + status.st_size:
                raise BackupError(f"{self.directory} has no room for {what}; give a tmpdir with more")
            with open(by_descriptor(place), "rb") as source, open(self.path(name), "xb") as sink:
                shutil.copyfileobj(source, sink)
        finally:
            os.close(place)

    def _may_be_used(self, path: str) -> bool:
        return bool(FIRMWARE.match(path)) or any(f"{path}/".startswith(f"{one}/") for one in self._allowed)


REMEDY = "allow it with boot_files, or replace what the set says with boot_options"


def _named(path: str, what: str) -> str:
    return f"the file {path!r}, which vm.json names as {what},"
