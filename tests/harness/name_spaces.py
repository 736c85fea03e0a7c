# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Starts processes in the name spaces of another one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import typing as t
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


class NameSpaces:
    """The processes, mounts and network among which the children of process `pid` are."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def seen_here(self, path: Path | str) -> Path:
        """Return where a path of theirs is for this process."""
        return Path(f"/proc/{self.pid}/root{path}")

    @contextlib.contextmanager
    def for_children(self) -> t.Iterator[None]:
        """Make the processes that this thread starts meanwhile theirs; these still see the mounts of this process."""
        with (
            open("/proc/self/ns/pid", "rb") as here,
            open(f"/proc/{self.pid}/ns/pid_for_children", "rb") as there,
        ):
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(here.fileno())

    def enter(self) -> None:
        """Give their mounts and network to this process, which must have one thread only."""
        where = os.getcwd()
        with open(f"/proc/{self.pid}/ns/net", "rb") as net, open(f"/proc/{self.pid}/ns/mnt", "rb") as mounts:
            _set_namespace(net.fileno())
            _set_namespace(mounts.fileno())
        os.chdir(where)

    def command(self, *command: str | Path, directory: Path | str = "/") -> list[str]:
        """Return what runs a program with their mounts and network, in a directory of theirs."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", f"--wdns={directory}", "--"]
        return [*enter, *map(str, command)]


def _set_namespace(fd: int) -> None:
    if _libc.setns(fd, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
