# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read what a domain of libvirt says of its own backup, in its C(<metadata>), and let it stand for what is general.

What the inventory says of this very VM stands above it. What cannot be meant is refused with its element: a word that
nobody reads would be a disk that nobody has excluded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._qemu.address import FoundBy
from .._repository.documents import Level
from .model import Quiesce

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .._qemu.domain_xml import Note
    from .model import Request


SKIP = {"yes": True, "no": False}
ATTRIBUTES = {"level": tuple(Level), "quiesce": tuple(Quiesce), "skip": tuple(SKIP)}
"""The attributes of C(<backup>), and what each may be."""


@dataclass(frozen=True)
class DomainPolicy:
    """What a domain says of its own backup; None where it says nothing."""

    level: Level | None = None
    quiesce: Quiesce | None = None
    exclude_disks: tuple[str, ...] | None = None
    skip: bool = False


def read_policy(found: Sequence[Note]) -> DomainPolicy:
    """Read the elements of a domain that speak of its backup; BackupError with what is wrong with them."""
    if len(found) > 1:
        raise _refusal(f"has {len(found)} elements <backup>; leave one")
    if not found:
        return DomainPolicy()
    backup = found[0]
    _refuse_unknown("<backup>", (name for name, _value in backup.attributes), ATTRIBUTES)
    _refuse_text("<backup>", backup)
    said = dict(backup.attributes)
    for name, value in said.items():
        if value not in ATTRIBUTES[name]:
            raise _refusal(f"<backup {name}={value!r}>: {name} is one of: {', '.join(ATTRIBUTES[name])}")
    excluded = tuple(_excluded(child) for child in backup.children)
    return DomainPolicy(
        level=Level(said["level"]) if "level" in said else None,
        quiesce=Quiesce(said["quiesce"]) if "quiesce" in said else None,
        exclude_disks=excluded or None,
        skip=SKIP[said.get("skip", "no")],
    )


def apply_policy(request: Request, policy: DomainPolicy) -> Request:
    """Return a request with what the domain says, where the inventory says nothing of this VM."""
    # What is listed is meant to be backed up.
    request = replace(request, skip=policy.skip and request.found_by != FoundBy.LISTED)
    said: dict[str, Any] = {
        "wanted": policy.level,
        "quiesce": policy.quiesce,
        "exclude_disks": policy.exclude_disks,
    }
    return replace(
        request, **{name: value for name, value in said.items() if value is not None and name not in request.given}
    )


def _excluded(child: Note) -> str:
    if child.name != "exclude":
        raise _refusal(f"<backup> has an element <{child.name[:60]}>, which is unknown; it may have: <exclude>")
    _refuse_unknown("<exclude>", (name for name, _value in child.attributes), ("disk",))
    _refuse_text("<exclude>", child)
    disk = dict(child.attributes).get("disk", "")
    if not disk or child.children:
        raise _refusal("<exclude> names no disk; write <exclude disk='vdb'/>")
    return disk


def _refuse_unknown(element: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = next((name for name in names if name not in known), "")
    if unknown:
        raise _refusal(
            f"{element} has an attribute {unknown[:60]!r}, which is unknown; it may have: {', '.join(known)}"
        )


def _refuse_text(element: str, note: Note) -> None:
    if note.text:
        raise _refusal(f"{element} has a text, {note.text[:60]!r}, which nobody reads")


def _refusal(what: str) -> BackupError:
    return BackupError(
        f"the domain's metadata on its backup: {what}. See `virsh dumpxml`, and correct it with `virsh metadata`"
    )
