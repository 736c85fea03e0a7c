# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask QEMU about a VM, and read its answers into the model.

Reference: QEMU QMP Reference Manual 7.2, chapters "Block devices" and "VM run state".
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .._common.device_names import qdev_id
from .._common.redaction import redact_name
from .._host.process import machine_id
from .answers import Odd
from .graph import FILE_DRIVERS, query_graph
from .jobs import merge_jobs
from .model import LIBVIRT_NODE, NO_UUID, TARGET_NODE, Bitmap, Disk, Vm

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .._host.process import Process
    from .graph import Graph
    from .monitor import Monitor


MOST_DISKS = 1000


async def inspect_vm(monitor: Monitor, name: str = "", known: Vm | None = None) -> Vm:
    """Ask a VM for everything that a backup needs to know. C(name) overrules the VM's own name.

    C(known) is the same process, with its status and jobs of just now: it is not asked for these, nor who it is.
    """
    try:
        vm = await monitor.within(_inspect_again(monitor, known) if known else _inspect_vm(monitor, name))
    except Odd as odd:
        raise monitor.senseless("query-named-block-nodes", str(odd)) from None
    if monitor.libvirt:
        from . import domain, domain_disks  # noqa: PLC0415 (for others, what reads XML need not be loaded, and compiled)

        vm = domain_disks.with_domain(vm, await domain.read_domain(monitor.libvirt))
    return vm


async def query_disks(monitor: Monitor) -> tuple[Disk, ...]:
    """Ask a VM for its disks, and for nothing else: what has no other image on top."""
    try:
        disks, _others = disks_of(await monitor.within(query_graph(monitor)))
    except Odd as odd:
        raise monitor.senseless("query-named-block-nodes", str(odd)) from None
    return disks


async def _inspect_vm(monitor: Monitor, name: str) -> Vm:
    # One after the other would cost a round trip each; QEMU answers them in order.
    named, uuid, status, graph, block_jobs, jobs, fdsets = await asyncio.gather(
        monitor.execute("query-name"),
        monitor.execute("query-uuid"),
        monitor.execute("query-status"),
        query_graph(monitor),
        monitor.execute("query-block-jobs"),
        monitor.execute("query-jobs"),
        monitor.execute("query-fdsets"),
    )
    own_name = name or named.get("name")
    vm_uuid = "" if uuid["UUID"] == NO_UUID else uuid["UUID"]
    return Vm(
        name=own_name or monitor.address.stem,
        uuid=vm_uuid,
        # Two VMs that nobody has named may have sockets of one file name, in different directories.
        identity=vm_uuid or f"{machine_id()}:{own_name or monitor.address}",
        status=status["status"],
        version=monitor.version,
        jobs=merge_jobs(block_jobs, jobs),
        process=monitor.process,
        monitor=str(monitor.address),
        **_devices(graph, fdsets, monitor.process),
    )


async def _inspect_again(monitor: Monitor, known: Vm) -> Vm:
    fdsets, graph = await asyncio.gather(monitor.execute("query-fdsets"), query_graph(monitor))
    return replace(known, **_devices(graph, fdsets, monitor.process))


def _devices(graph: Graph, fdsets: list[dict[str, Any]], process: Process | None) -> dict[str, Any]:
    """Return what a VM has, as the fields of its model."""
    disks, other_nodes = disks_of(graph)
    return {
        "disks": disks,
        "other_nodes": other_nodes,
        "empty": tuple(
            entry["device"] or qdev_id(entry.get("qdev", "")) or entry.get("qdev", "")
            for entry in graph.devices
            if "inserted" not in entry
        ),
        "fdsets": {entry["fdset-id"]: tuple(fd.get("opaque", "") for fd in entry["fds"]) for entry in fdsets},
        "files": _files(graph.nodes.values(), process),
        "target_nodes": tuple(name for name in graph.nodes if TARGET_NODE.fullmatch(name)),
    }


def disks_of(graph: Graph) -> tuple[tuple[Disk, ...], tuple[Disk, ...]]:
    """Return the VM's disks (those of devices first, in QEMU's order), and the nodes that others are made of."""
    layers = graph.layers()
    sizes = {name: node["image"].get("actual-size") for name, node in graph.nodes.items()}
    encrypted = {name for name, node in graph.nodes.items() if node["image"].get("encrypted", False)}

    def disk_of(node_name: str, name: str, **others: Any) -> Disk:
        lower = layers[node_name]
        held = [sizes[layer] for layer in (node_name, *lower)]
        return read_disk(
            graph.nodes[node_name],
            name,
            layers=lower,
            backing_format=graph.nodes[lower[0]]["drv"] if lower else "",
            layer_size=held[0],
            actual_size=None if None in held else sum(held),
            encrypted=not encrypted.isdisjoint((node_name, *lower)),
            file=redact_name(graph.file_of(node_name)),
            **others,
        )

    disks: dict[str, Disk] = {}
    for number, entry in enumerate(graph.devices):
        inserted = entry.get("inserted")
        if inserted and inserted["node-name"] in graph.nodes:
            *filters, node_name = graph.filter_path(inserted["node-name"])
            own_name = _own_name(entry, graph.nodes[node_name])
            disk = disk_of(
                node_name,
                own_name or f"disk{number}",
                filters=tuple(filters),
                device=entry["device"],
                qdev=entry.get("qdev", ""),
                removable=entry["removable"],
                stable_name=bool(own_name),
            )
            disks.setdefault(node_name, disk)
    taken = {*disks, *(name for disk in disks.values() for name in disk.filters)}
    # A bare -blockdev that nothing reads through is a disk as well, below the filter of its job where there is one.
    for top in graph.nodes:
        *filters, node_name = graph.filter_path(top)
        # What libvirt has made for no device is the rest of a detached disk, or what it copies to.
        is_none = node_name.startswith("#") or TARGET_NODE.fullmatch(node_name) or LIBVIRT_NODE.fullmatch(node_name)
        if top not in graph.used and top not in taken and not is_none:
            disks.setdefault(node_name, disk_of(node_name, node_name, filters=tuple(filters)))
            taken.update((*filters, node_name))
    if len(disks) > MOST_DISKS:
        raise Odd(f"tells of {len(disks)} disks")
    # A file node without a name of its own is left out: its image stands for it, and each layer has one.
    others = (
        disk_of(name, "" if name.startswith("#") else name)
        for name, node in graph.nodes.items()
        if name not in taken and not (name.startswith("#") and node["drv"] in FILE_DRIVERS)
    )
    return tuple(disks.values()), tuple(others)


def read_disk(node: dict[str, Any], name: str, **others: Any) -> Disk:
    """Return the disk of a node. C(others) are fields of it that the node alone does not tell."""
    image = node["image"]
    return Disk(
        name=name,
        node=node["node-name"],
        driver=node["drv"],
        filename=redact_name(image["filename"]),
        backing_file=redact_name(image.get("full-backing-filename", image.get("backing-filename", ""))),
        virtual_size=image["virtual-size"],
        read_only=node["ro"],
        keeps_bitmaps=_keeps_bitmaps(node),
        snapshots=len(image.get("snapshots", [])),
        data_file=redact_name(image.get("format-specific", {}).get("data", {}).get("data-file", "")),
        bitmaps=tuple(_bitmap(entry) for entry in node.get("dirty-bitmaps", []) if entry.get("name")),
        **others,
    )


def _keeps_bitmaps(node: dict[str, Any]) -> bool:
    """Return whether QEMU can store bitmaps in this node's image, and only QEMU writes its data.

    Those of a read-only one would be accepted and then lost. A raw data file can be written without its qcow2 image.
    """
    details = node["image"].get("format-specific", {}).get("data", {})
    old = details.get("compat", "0.10") == "0.10"
    return node["drv"] == "qcow2" and not node["ro"] and not old and not details.get("data-file-raw", False)


def _bitmap(entry: dict[str, Any]) -> Bitmap:
    return Bitmap(
        name=entry["name"],
        count=entry["count"],
        granularity=entry["granularity"],
        recording=entry["recording"],
        busy=entry["busy"],
        persistent=entry["persistent"],
        inconsistent=entry.get("inconsistent", False),
    )


def _own_name(entry: dict[str, Any], node: dict[str, Any]) -> str:
    """Return the backend's name, else the device's id, else the node's; empty where none lasts beyond one boot."""
    named = "" if node["node-name"].startswith("#") else str(node["node-name"])
    return entry["device"] or qdev_id(entry.get("qdev", "")) or named


def _files(nodes: Iterable[dict[str, Any]], process: Process | None) -> tuple[str, ...]:
    found = []
    for node in nodes:
        path = node["file"]
        if not path.startswith("/") and node["drv"] not in FILE_DRIVERS:
            # The node stands for several files, which have nodes of their own, or for one on another machine.
            continue
        if not path.startswith("/") and process is not None:
            # QEMU tells a relative name as it was given; it counts from QEMU's own working directory.
            path = os.path.join(f"/proc/{process.pid}/cwd", path)
        found.append(path)
    return tuple(dict.fromkeys(found))
