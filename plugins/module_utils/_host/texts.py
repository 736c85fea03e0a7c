# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write texts for everybody to read, and read them."""

from __future__ import annotations

import contextlib
import glob
import os
import time

from .._common.errors import Refused
from .directory import Directory, exposed
from .files import UNFINISHED, set_mode, step

LARGEST = 1 << 26
"""Bytes that no text has which is read here."""
FORGOTTEN = 3600.0
"""Seconds after which nobody is writing a text any more: its process was killed."""


def check_directory(directory: str, trust_others: bool) -> None:
    """Refuse a directory that others than root and this user can write to: what it holds could be theirs."""
    fault = "" if trust_others else exposed(directory, os.stat(directory))
    if fault:
        raise Refused("directory", fault)


def read_file(path: str, limit: int) -> bytes:
    """Return the content of the file at a path, as Directory.read() does."""
    with Directory.at(os.path.dirname(path)) as directory:
        return directory.read(os.path.basename(path), limit)


def read_text(path: str) -> str:
    """Return the content of a text file; empty where there is none. WrongEntry where something else stands there."""
    try:
        with step(path, "it was read"):
            return read_file(path, LARGEST).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def write_text(path: str, text: str) -> None:
    """Write a file for everybody to read, onto stable storage, whole or not at all.

    Who reads it meanwhile sees the old one or the new one.
    """
    # Collectors look for the ends of file names, and pass over this one.
    beginning = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.")
    _remove_forgotten(f"{glob.escape(beginning)}*{UNFINISHED}")
    temporary = f"{beginning}{os.getpid()}{UNFINISHED}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with step(path, "it was written"), os.fdopen(fd, "w", encoding="utf-8", errors="replace", newline="\n") as sink:
            sink.write(text)
            sink.flush()
            set_mode(temporary, 0o644, sink.fileno())
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _remove_forgotten(pattern: str) -> None:
    for path in glob.glob(pattern):
        # Another process may remove or rename it at this moment.
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_mtime < time.time() - FORGOTTEN:
                os.unlink(path)
