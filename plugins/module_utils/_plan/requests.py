# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a request of each VM that is asked for. One that is reached in several ways is one VM.

What is listed stands above what is found, and libvirt above a socket.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .._qemu.address import FoundBy
from .domain_policy import apply_policy, read_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .._qemu.discovery import Discovery
    from .._repository.documents import Manifest
    from .model import Observation, Request, VmPlan


def requests_for(listed: Iterable[Request], general: Request, found: Discovery) -> list[Request]:
    """Return the requests that are listed, and one like C(general) for each further monitor that was found."""
    others = (
        replace(general, monitor=str(address), libvirt_uri=address.uri, found_by=way)
        for address, way in found.ways.items()
        if way != FoundBy.LISTED
    )
    # Each monitor has one spelling.
    return [
        *(replace(one, monitor=str(one.address), libvirt_uri=one.address.uri) for one in listed),
        *others,
    ]


def known_name(request: Request) -> str:
    """Return what a VM is called, as far as that is known before it is asked."""
    return request.name or request.address.domain or ""


def with_policy(request: Request, found: Discovery, seen: Observation) -> Request:
    """Return a request with what its domain itself says of its backup; BackupError where that makes no sense."""
    entry = found.domains.get(request.address)
    if entry is None:
        if seen.vm and seen.vm.domain and found.failure:
            raise BackupError(f"what the domain says of its backup is not known: {found.failure}")
        return request
    if entry.error:
        raise BackupError(entry.error)
    return apply_policy(request, read_policy(entry.policies))


def with_new_name(seen: Observation, request: Request, found: Discovery, sets: Sequence[Manifest]) -> Observation:
    """Add what a domain is called now that has had C(sets) under a name of which libvirt has none any more."""
    address = request.address
    if seen.vm or not (address.domain and sets) or address in found.domains:
        return seen
    uuid = sets[-1].vm.uuid
    name = next((entry.name for entry in found.domains.values() if uuid and entry.uuid == uuid), "")
    if not name:
        return seen
    told = (
        f"{address}: libvirt has no domain of this name, and the one that had it ({uuid}) is {name} now. To continue"
        f" its sets, list it as name: {request.name}, monitor: libvirt:{name}; to begin new ones, name it {name}"
    )
    return replace(seen, error=told)


def reached_once(
    requests: Sequence[Request], plans: Iterable[VmPlan], processes: Mapping[str, tuple[int, ...]]
) -> tuple[VmPlan, ...]:
    """Return the plans without those of VMs that are in there by a better way. C(processes) are known ones' QEMUs."""
    pairs = list(zip(requests, plans))
    return tuple(
        plan
        for request, plan in pairs
        if not any(better.found_by < request.found_by and _is_same(plan, other, processes) for better, other in pairs)
    )


def _is_same(one: VmPlan, other: VmPlan, processes: Mapping[str, tuple[int, ...]]) -> bool:
    process, others = processes.get(one.monitor), processes.get(other.monitor)
    if process and others:
        return process == others
    # One that does not answer is known by its name alone.
    return one.name == other.name and (one.identity == other.identity or not (one.identity and other.identity))
