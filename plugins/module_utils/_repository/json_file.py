# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read and write the JSON files of a repository, one at a time: what cannot be used is told, and never passed over."""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from .._common.errors import BackupError, warn_once
from .._common.fields import DocumentError, NewerSchema, load
from .._host.directory import WrongEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .._common.fields import Document
    from .._host.directory import Directory


SHOWN = 3
"""Entries that a warning names."""


class OddDocument(WrongEntry):
    """A file is there, and cannot be used: C(damaged), or C(newer) than this release, or this user may not read it."""

    def __init__(self, message: str, damaged: bool = False, newer: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged
        self.newer = newer


def read_document(
    directory: Directory,
    name: str,
    kind: Any,
    status: os.stat_result | None = None,
    misplaced: Callable[[Any], str] | None = None,
) -> Any:
    """Read a document; None where there is none. OddDocument for one that cannot be used.

    WrongEntry where something else stands in its place. C(status) is its own, where known; C(misplaced) returns why it
    does not belong where it stands.
    """
    try:
        found = kind.parse(load(directory.read(name, kind.MOST, status)))
        reason = misplaced(found) if misplaced else ""
        if reason:
            raise DocumentError(reason)
    except FileNotFoundError:
        return None
    except NewerSchema as error:
        raise OddDocument(f"{directory.join(name)}: {error}", newer=True) from None
    except DocumentError as error:
        raise OddDocument(
            f"{directory.join(name)} is damaged or misplaced ({error}); bring it back from a copy of the repository,"
            " or move it away",
            damaged=True,
        ) from None
    except OSError as error:
        raise OddDocument(f"repository: {directory.join(name)} cannot be read: {error.strerror}") from error
    return found


def read_named(directory: Directory, name: str, kind: Any, name_of: Callable[[str], str]) -> Any:
    """Read a document that says something of a set, by whose id it is called."""
    return read_document(
        directory, name, kind, misplaced=lambda one: "" if name_of(one.id) == name else f"it is of set {one.id}"
    )


def warn_of(directory: Directory, odd: Mapping[str, str]) -> None:
    """Warn of entries that are left out."""
    if odd:
        shown = "; ".join([*odd.values()][:SHOWN]) + ("; ..." if len(odd) > SHOWN else "")
        vm = os.path.basename(directory.path)
        warn_once(f"{directory.path}: {shown}", f"VM {vm}: {len(odd)} entries cannot be used: {shown}")


def write_document(
    directory: Directory, name: str, document: Document, mode: int = 0o600, indent: int | None = 1
) -> None:
    """Write a document onto stable storage, whole or not at all. BackupError for one that nobody could read.

    Without C(indent) it is written several times as fast: Python's fast encoder makes a single line only.
    """
    raw = dump(plain(document), indent)
    try:
        if len(raw) > document.MOST:
            raise DocumentError(f"it has more than {document.MOST} bytes")
        document.parse(load(raw))
    except DocumentError as error:
        raise BackupError(f"{directory.join(name)} cannot be written: {error}") from error
    directory.write(name, raw, mode)


def plain(value: Any) -> Any:
    """Return what JSON knows for a dataclass, with all that is in it. dataclasses.asdict() copies each text, too."""
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    return value


def dump(content: Any, indent: int | None = 1) -> bytes:
    """Return what stands in a file."""
    return (json.dumps(content, indent=indent) + "\n").encode()
