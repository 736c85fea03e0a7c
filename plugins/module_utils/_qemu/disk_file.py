# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the file of a disk of a VM, for when the VM is off."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._common.fields import NAME, OneOf, Text, holds

QCOW2 = "qcow2"
FORMATS = (QCOW2, "raw")


@dataclass(frozen=True)
class DiskFile:
    """A disk of a VM, for when it is off: what it is called when the VM is on, and where it is."""

    name: str = field(metadata=NAME)
    file: str = field(metadata=holds(Text("an absolute path", pattern="/[^\0]*")))
    format: str = field(metadata=holds(OneOf(*FORMATS)))
