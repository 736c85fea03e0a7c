# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say what the record of a hypervisor and the report of a run hold: they come from other machines, and from disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._backup.outcome import STATES
from .._common.fields import Fields, Flag, Maybe, Newer, Number, OneOf, Said, Several, Text, Time, Whole, check_schema
from .._common.formats import Word
from .._repository.documents import Level
from .._repository.names import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class HypervisorState(Word):
    """What is known of a hypervisor in a run."""

    REPORTED = "reported"
    UNREACHED = "failed"
    """It has reported nothing, and will not."""
    WAITING = "waiting"
    """It may still report."""


LARGEST_REPORT = 1 << 26
"""Bytes of the report of a run of tens of thousands of VMs."""
FLEET = 1 << 16
"""VMs of a hypervisor, or hypervisors of a run: more than there are anywhere."""
ID = Text("an id of a set", pattern=ID_PATTERN)
ID_OR_NONE = Text("an id of a set", pattern=f"({ID_PATTERN})?")
SET = Fields(
    id=ID,
    started=Time(),
    duration=Number(),
    bytes=Whole(),
    level=Newer(Level),
    consistency=OneOf("crash", "filesystem"),
    chain=Whole(1),
    verified=Text("a depth", pattern="[a-z]{0,32}"),
)
VM = Fields(
    # What the set and the newest one are, nobody adds where the repository cannot be read.
    name=Text("a name", least=1),
    state=OneOf(*STATES, "absent"),
    changed=Flag(),
    error=Said(),
    reason=Text(),
    warnings=Several(Said(), plain=True),
    consistency_reason=Text(),
    frozen_ms=Whole(),
    path=Text(),
    set=Maybe(SET),
    last=Maybe(SET),
    damage=Said(),
    verified_at=Time(empty=True),
)
TOLD: dict[str, Any] = {
    "repository": Text(),
    "id": ID_OR_NONE,
    "written": Time(empty=True),
    "error": Said(),
    "vms": Several(VM, most=FLEET, plain=True),
}
RECORD = Fields(**TOLD)
"""What a hypervisor has told."""
NUMBERS = "hypervisors hypervisors_failed hypervisors_waiting vms published failed cancelled skipped new bytes frozen"
COUNTS: dict[str, Any] = {name: Whole() for name in (*NUMBERS.split(), "verified", "damaged")}
SUMMARY = Fields(**COUNTS, seconds=Number(), began=Time(empty=True))
REPORT = Fields(
    schema=Whole(1),
    id=ID,
    written=Time(),
    summary=SUMMARY,
    hypervisors=Several(Fields(name=Text(), state=OneOf(*HypervisorState), **TOLD), most=FLEET, plain=True),
)


def parse_report(found: Any) -> Mapping[str, Any]:
    """Return the report of a run, without what a later release has added. DocumentError where it is none."""
    check_schema(found)
    return REPORT.read(found)
