# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe how a VM is built, so that it can be built again from its backup: the content of C(vm.json).

Secrets are taken out: a backup is read by more people than a hypervisor's process list.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from .._common.device_names import FLASH
from .._common.errors import CommandError
from .._common.formats import COLLECTION_VERSION, SCHEMA, utc_now
from .._common.redaction import Redaction, redact
from .tpm import LOST, describe_stored, describe_tpm

if TYPE_CHECKING:
    from typing import Any

    from .address import Address
    from .libvirt_domain import LibvirtDomain
    from .model import Disk, Vm
    from .monitor import Monitor


MACHINE = "-machine"
CHILD = re.compile(r"child<(.+)>")


async def describe_vm(monitor: Monitor, vm: Vm) -> dict[str, Any]:
    """Describe how C(vm) is built. What a VM does not have, or its QEMU does not tell, is null or empty.

    C(removed) lists what has been taken out, and so has to be set again by whoever builds the VM again.
    C(command_line) is what QEMU was started with, C(devices) what there is now; null where the process is unknown.
    C(domain) is what libvirt knows of it, where it was reached through libvirt.
    """
    machine, bios, kvm, memory, cpus, named, unnamed, chardevs = await monitor.within(
        asyncio.gather(
            _ask(monitor, "qom-get", path="/machine", property="type"),
            _ask(monitor, "qom-get", path="/machine", property="firmware"),
            _ask(monitor, "query-kvm"),
            _ask(monitor, "query-memory-size-summary"),
            _cpus(monitor),
            _devices(monitor, "/machine/peripheral"),
            _devices(monitor, "/machine/peripheral-anon"),
            _ask(monitor, "query-chardev"),
        )
    )
    # Nobody knows it over TCP, and the process may be none that can be seen.
    arguments = vm.process.arguments if vm.process else []
    command_line, removed = redact(arguments)
    # A few of its questions are for libvirt, which answers one at a time.
    domain = await _describe_domain(monitor.libvirt, removed) if monitor.libvirt else None
    tpm = await describe_tpm(monitor, vm, removed)
    return {
        **_head(vm),
        "machine": machine[: -len(MACHINE)] if machine and machine.endswith(MACHINE) else machine,
        # Without KVM it may be TCG or Xen.
        "accelerator": "kvm" if kvm and kvm["enabled"] else None,
        "memory": memory["base-memory"] + memory.get("plugged-memory", 0) if memory else None,
        "cpus": cpus,
        "firmware": {"bios": bios or None, "flash": [disk.name for disk in vm.disks if FLASH.match(disk.qdev)]},
        "command_line": command_line if arguments else None,
        "disks": [_disk(disk, vm, removed) for disk in vm.disks],
        "devices": named + [{**device, "id": ""} for device in unnamed],
        "chardevs": [_chardev(entry, removed) for entry in chardevs or []],
        "domain": domain,
        "tpm": tpm,
        "removed": removed,
    }


def describe_files(vm: Vm) -> dict[str, Any]:
    """Describe a VM that is off, of which only the disks are known."""
    removed: list[str] = []
    return {
        **_head(vm),
        **dict.fromkeys(("machine", "accelerator", "memory", "command_line", "domain", "tpm")),
        "cpus": {"count": 0, "type": None},
        "firmware": {"bios": None, "flash": []},
        "disks": [_disk(disk, vm, removed) for disk in vm.disks],
        "devices": [],
        "chardevs": [],
        "removed": removed,
    }


async def describe_shut_off(address: Address, vm: Vm, last: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Describe a domain that is shut off: as C(last) says that it was, but as it is defined now.

    Return also what may be wrong in that.
    """
    from .domain_config import DOMAIN  # noqa: PLC0415 (as below)
    from .libvirt_domain import LibvirtDomain  # noqa: PLC0415

    known = last or describe_files(vm)
    removed = [entry for entry in known.get("removed", ()) if not entry.startswith((DOMAIN, LOST))]
    libvirt = LibvirtDomain(address)
    await libvirt.open()
    try:
        domain = await _describe_domain(libvirt, removed)
    finally:
        await libvirt.close()
    doubts: list[str] = []
    tpm = await describe_stored(vm, address.uri, known.get("tpm"), removed, doubts)
    return {**known, "domain": domain, "tpm": tpm, "removed": removed}, doubts


async def _describe_domain(libvirt: LibvirtDomain, removed: list[str]) -> dict[str, Any]:
    # Only a domain has XML: for others, what reads it need not be loaded, and compiled.
    from .domain_config import describe_domain  # noqa: PLC0415

    return await describe_domain(libvirt, removed)


def _head(vm: Vm) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "collection": COLLECTION_VERSION,
        "taken": utc_now(),
        "name": vm.name,
        "uuid": vm.uuid,
        "qemu": vm.version,
    }


async def _ask(monitor: Monitor, command: str, **arguments: str) -> Any:
    """Return QEMU's answer; None where this VM has no such thing."""
    try:
        return await monitor.execute(command, arguments)
    except CommandError:
        return None


async def _cpus(monitor: Monitor) -> dict[str, Any]:
    found = await _ask(monitor, "query-cpus-fast") or []
    kind = await _ask(monitor, "qom-get", path=found[0]["qom-path"], property="type") if found else None
    return {"count": len(found), "type": kind}


async def _devices(monitor: Monitor, container: str) -> list[dict[str, str]]:
    entries = await _ask(monitor, "qom-list", path=container) or []
    children = ((entry["name"], CHILD.fullmatch(entry["type"])) for entry in entries)
    return [{"id": name, "type": child[1]} for name, child in children if child]


def _disk(disk: Disk, vm: Vm, removed: list[str]) -> dict[str, Any]:
    redaction = Redaction(f"disk {disk.name}", removed)
    return {
        "name": disk.name,
        "node": disk.node,
        "qdev": disk.qdev,
        "device": disk.device,
        "driver": disk.driver,
        "file": redaction.name("file", disk.filename),
        "backing_file": redaction.name("backing_file", disk.backing_file),
        "layers": [redaction.name("layers", layer.filename) for layer in vm.chain(disk)[1:]],
        "virtual_size": disk.virtual_size,
        "read_only": disk.read_only,
        "removable": disk.removable,
    }


def _chardev(entry: dict[str, Any], removed: list[str]) -> dict[str, str]:
    redaction = Redaction("chardev {}".format(entry["label"]), removed)
    return {"label": entry["label"], "filename": redaction.text("filename", entry["filename"])}
