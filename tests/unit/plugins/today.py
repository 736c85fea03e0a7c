# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM of two disks, and its set `today`, as it is asked for, made and found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import (
    DiskPlan,
    Observation,
    Policy,
    Request,
    RunContext,
    VmPlan,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    Failure,
    Intent,
    Manifest,
    Phase,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import HERE, bitmap, disk, image

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk, Vm

TERMS = RunContext("today", "run", "12345678", HERE, Policy())
REQUEST = Request("web01", "unix:/web01.qmp")
VDA, VDB = disk("vda", "n-vda"), disk("vdb", "n-vdb")
GOLDEN = disk("golden", "n-golden", read_only=True)


def vm(*disks: Disk, **more: Any) -> Vm:
    """Return a VM of vda and vdb, or of other disks, whose process nobody knows."""
    return builders.vm(*(disks or (VDA, VDB)), **{"empty": ("cd",), "process": None, **more})


def intent(**more: Any) -> Intent:
    """Return the intent of the set today, of both disks, whose jobs run."""
    given: dict[str, Any] = {"attempt": "a1", "phase": Phase.COPYING, "reserved": True}
    return builders.intent("today", image("vda"), image("vdb"), **{**given, **more})


def manifest(**more: Any) -> Manifest:
    """Return the manifest of the set today, of both disks."""
    return builders.manifest("today", image("vda"), image("vdb"), **more)


JOB0, JOB1 = (builders.job_id("a1", number) for number in (0, 1))
FAILED = Failure("run", "a1", "today", "failed", "target full", builders.TIME, builders.TIME)
OFF = Observation(error="there is no such socket", off=True)


def tracked(name: str, record: str, **more: Any) -> Disk:
    """Return a disk with this bitmap."""
    return disk(name, f"n-{name}", bitmaps=(bitmap(record),), **more)


MONDAY = manifest(id="monday", disks=(image("vda", bitmap="b-vda", sha256="x"), image("vdb", bitmap="b-vdb")))


def start(name: str, size: int = 0, monitor: str = "") -> VmPlan:
    """Return the plan to make a set of one disk."""
    disk = DiskPlan("vda", "n0", "full", "", None, "vda.qcow2", size)
    return VmPlan(name, monitor or f"unix:/{name}", "start", "", disks=(disk,))
