# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU and modules under the labels of a security module, as in the guests of tools/confined."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import file_label, label_of
from ansible_collections.vmfleet.backup.tests.harness.modules import NAMES, PACKAGE

if t.TYPE_CHECKING:
    import pytest

IS_HERE = os.environ.get("VMFLEET_CONFINED", "")
"""The security module of this kernel, in such a guest."""


def with_label(word: str) -> list[str]:
    """Return the beginning of a command that is run with a label; C(word) asks the kernel for it."""
    return ["sh", "-c", 'printf %s "$1" >/proc/self/attr/exec && shift && exec "$@"', "sh", word]


def run_modules_as(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Have modules ask the kernel for a label of their own before they begin."""
    for name in NAMES:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        main: t.Callable[[], None] = module.main

        def confined(main: t.Callable[[], None] = main) -> None:
            Path("/proc/thread-self/attr/current").write_text(word)
            main()

        monkeypatch.setattr(module, "main", confined)


def label(process: int | t.Literal["self"] = "self") -> str:
    """The label of a process."""
    return label_of(process).text


def label_file(path: Path, context: str) -> Path:
    """Give a file or a directory an SELinux context."""
    os.setxattr(path, "security.selinux", context.encode() + b"\0")
    assert file_label(str(path)) == context
    return path


def mount_with_label(place: Path, context: str) -> None:
    """Mount a file system all of whose files have this SELinux context.

    The program `mount` leaves that out on a machine without /etc/selinux/config.
    """
    options = f"size=64M,mode=700,context={context}".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", ctypes.c_ulong(0), options):
        raise OSError(ctypes.get_errno(), f"{place} was not mounted")


def denials(what: str = "") -> list[str]:
    """What the kernel's log says was denied, of that what names `what`."""
    said = subprocess.run(["dmesg"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    denied = (line for line in said.splitlines() if 'apparmor="DENIED"' in line or "avc:  denied" in line)
    return [line for line in denied if what in line]
