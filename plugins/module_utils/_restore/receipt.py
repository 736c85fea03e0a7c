# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the fields of the receipt beside a restored disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._common.fields import INODE, NAME, NUMBER_OF_SCHEMA, SIZE, TIME, Document, OneOf, holds
from .._common.formats import SCHEMA
from .._repository.documents import ATTEMPT, SET_ID, UUID
from .model import FORMATS, METHODS


@dataclass(frozen=True)
class Restoration(Document):
    """What stands beside a restored disk: where it came from, and what its file is known by.

    C(mtime) is in nanoseconds.
    """

    repository: str = field(metadata=UUID)
    vm: str = field(metadata=NAME)
    id: str = field(metadata=SET_ID)
    attempt: str = field(metadata=ATTEMPT)
    disk: str = field(metadata=NAME)
    method: str = field(metadata=holds(OneOf(*METHODS)))
    format: str = field(metadata=holds(OneOf(*FORMATS)))
    inode: int = field(metadata=INODE)
    size: int = field(metadata=SIZE)
    mtime: int = field(metadata=SIZE)
    when: str = field(metadata=TIME)
    schema: int = field(default=SCHEMA, metadata=NUMBER_OF_SCHEMA)
