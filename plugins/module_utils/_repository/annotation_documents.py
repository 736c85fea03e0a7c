# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the fields of the JSON files that say something of a set: verified, protected, pinned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .._common.fields import NAME, NUMBER_OF_SCHEMA, TEXT, TIME, Document, Newer, Several, Text, holds
from .._common.formats import SCHEMA, Word
from .documents import ATTEMPT, LARGE, SET_ID


class Depth(Word):
    """How deep a verification looks. Each depth includes those before it."""

    MANIFEST = "manifest"
    CHECKSUM = "checksum"
    IMAGE = "image"
    BOOT = "boot"
    """That a guest does not start says nothing of the sets that build on its own."""


DEPTHS = tuple(Depth)
"""From the least deep to the deepest."""


@dataclass(frozen=True)
class Protection(Document):
    """A set that is not to be removed, whatever the rules say."""

    id: str = field(metadata=SET_ID)
    since: str = field(metadata=TIME)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)


@dataclass(frozen=True)
class Pin(Document):
    """Somebody's overlay on an image of a set: C(path) on the machine C(host), made by which that image is read."""

    id: str = field(metadata=SET_ID)
    disk: str = field(metadata=NAME)
    path: str = field(metadata=NAME)
    host: str = field(metadata=TEXT)
    machine_id: str = field(metadata=TEXT)
    since: str = field(metadata=TIME)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)


@dataclass(frozen=True)
class Verification(Document):
    """How the last look at a set of this C(attempt) ended. C(errors) are empty where all was well."""

    MOST: ClassVar[int] = LARGE

    id: str = field(metadata=SET_ID)
    attempt: str = field(metadata=ATTEMPT)
    depth: Depth = field(metadata=holds(Newer(Depth)))
    when: str = field(metadata=TIME)
    errors: tuple[str, ...] = field(default=(), metadata=holds(Several(Text())))
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)

    @property
    def ok(self) -> bool:
        return not self.errors
