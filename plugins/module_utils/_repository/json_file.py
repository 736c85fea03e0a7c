# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read JSON documents, and write them so that a crash leaves the old or the new one."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._host.files import remove, set_mode, step, sync_directory
from .documents import NewerSchema

if TYPE_CHECKING:
    from typing import Any


UNFINISHED = ".new"
"""What a file's name ends with while it is written."""
CHUNK = 1 << 16
"""Bytes that are read at once, more than most documents have."""


def read_document(path: str, kind: Any) -> Any:
    """Read a document; None where there is none, or one that is not whole. BackupError where its schema is newer."""
    try:
        return kind.parse(json.loads(_content(path)))
    except NewerSchema as error:
        raise BackupError(f"{path}: {error}") from error
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise BackupError(f"repository: {path} cannot be read: {error.strerror}") from error


def _content(path: str) -> bytes:
    """Read a small file. Thousands are read at a time, and to make a file object takes longer than to read it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        while True:
            part = os.read(fd, CHUNK)
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(fd)


def write_document(path: str, content: dict[str, Any], mode: int = 0o600) -> None:
    """Write a document onto stable storage, whole or not at all."""
    temporary = path + UNFINISHED
    remove(temporary)
    with step(path, "it was written"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as sink:
            json.dump(content, sink, indent=1)
            sink.write("\n")
            sink.flush()
            set_mode(temporary, mode, sink.fileno())
            os.fsync(sink.fileno())
        os.replace(temporary, path)
    sync_directory(os.path.dirname(path))
