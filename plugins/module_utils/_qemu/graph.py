# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask QEMU how its block nodes are put together: devices, filters, images, their backing files and the files below.

Reference: QEMU QMP Reference Manual 7.2, chapter "Block devices".
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .answers import STATISTICS, Odd

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .monitor import Monitor


FILTERS = frozenset({"copy-before-write", "copy-on-read", "compress", "throttle"})
"""Drivers that only pass requests on. A bitmap put on one of them is lost: the node below is what we work with."""
CHILDREN = (10, 1)
"""The first version of QEMU that names the children of a node."""
FLAT_DEVICES = (11, 0)
"""The first version whose query-block can leave out the backing files."""
FILE_DRIVERS = frozenset({"file", "host_device", "host_cdrom"})
DEEPEST = 64
"""How many nodes there may be between an image and its file: one or two are the rule."""
MOST_LAYERS = 1 << 20
"""How many layers all nodes may have together: those of 1,400 layers of one disk. QEMU opens some hundreds."""
GRAPH_ATTEMPTS = 20
"""How often the block graph is asked for until its parts fit together: once and again is the rule."""


@dataclass
class Graph:
    """The block graph of one moment: C(devices) of query-block, C(nodes) by name.

    C(below) is the node that a node reads its data from: its file, or what it filters. C(backing) is that of its
    backing file, or all that it may be where QEMU does not tell. C(used) are all nodes that others read through.
    """

    devices: list[dict[str, Any]]
    nodes: dict[str, dict[str, Any]]
    below: dict[str, str] = field(default_factory=dict)
    backing: dict[str, list[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def filter_path(self, node_name: str) -> list[str]:
        """Return the filters on top of a node, and the first node below them."""
        path = [node_name]
        while self.nodes[path[-1]]["drv"] in FILTERS and self.below.get(path[-1]) in self.nodes:
            self._descend(path)
        return path

    def file_of(self, node_name: str) -> str:
        """Return the file of an image; empty for one that is only a part of a file."""
        path = [node_name]
        while self.below.get(path[-1]) in self.nodes and not _is_window(self.nodes[path[-1]]):
            self._descend(path)
        file = self.nodes[path[-1]]
        return "" if _is_window(file) else str(file["file"])

    def _descend(self, path: list[str]) -> None:
        """Add the node below the last one."""
        path.append(self.below[path[-1]])
        if len(path) > DEEPEST:
            raise Odd(f"lists layers below node {path[0]} without an end")

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Return the layers below each node, top first."""
        direct = {upper: self._layer(lower) for upper, lower in self.backing.items()}
        found: dict[str, tuple[str, ...]] = {}
        room = MOST_LAYERS
        for start in self.nodes:
            path: list[str] = []
            name = start
            # An entry ends the walk, so that names that lead in a circle do so as well.
            while name not in found:
                found[name] = ()
                path.append(name)
                name = next(iter(direct.get(name, ())), name)
            for upper in reversed(path):
                if direct.get(upper):
                    lower = dict.fromkeys((*direct[upper], *found[direct[upper][0]]))
                    lower.pop(upper, None)
                    found[upper] = tuple(lower)
                    room -= len(lower)
                    if room < 0:
                        raise Odd(f"lists more layers than QEMU can open: {len(lower)} below {upper}")
        return found

    def _layer(self, backing: Iterable[str]) -> list[str]:
        """Return the nodes below the filters, of those that may be a backing file."""
        return [self.filter_path(name)[-1] for name in backing if name in self.nodes]


async def query_graph(monitor: Monitor) -> Graph:
    """Return the block graph, from answers that grow with the number of its nodes and no faster.

    A job that ends takes its filter node along: answers that do not fit together for that are asked for again.
    """
    version = tuple(int(number) for number in monitor.version.split("."))
    ask = _query_children if version >= CHILDREN else _query_file_names
    # Without C(flat), the entry of each node, or device, would tell of all its backing files again.
    devices_asked = {"flat": True} if version >= FLAT_DEVICES else {}
    for _attempt in range(GRAPH_ATTEMPTS):
        graph, fits = await ask(monitor, devices_asked)
        if fits:
            break
    return graph


async def _query_children(monitor: Monitor, devices_asked: dict[str, Any]) -> tuple[Graph, bool]:
    """Return the graph as QEMU tells it, and whether its parts fit together."""
    before, nodes, devices = await asyncio.gather(
        monitor.execute("query-block", devices_asked),
        monitor.execute("query-named-block-nodes", {"flat": True}),
        monitor.execute("query-block", devices_asked),
    )
    graph = Graph(devices, {node["node-name"]: node for node in nodes})
    for name, node in graph.nodes.items():
        if "children" not in node:
            raise Odd(f"lists no children of {name}")
        for child in node["children"]:
            graph.used.add(child["node-name"])
            if child["child"] == "file":
                graph.below[name] = child["node-name"]
            elif child["child"] == "backing":
                graph.backing[name] = [child["node-name"]]
    return graph, _shown(before) == _shown(devices) and _shown(devices) <= set(graph.nodes)


async def _query_file_names(monitor: Monitor, devices_asked: dict[str, Any]) -> tuple[Graph, bool]:
    """Return the graph as far as an older QEMU tells it, and whether its parts fit together.

    It tells the names of files only. Where they are not enough, statistics name the nodes: of the whole answer, these
    are the larger half.
    """
    nodes, devices = await asyncio.gather(
        monitor.execute("query-named-block-nodes", {"flat": True}),
        monitor.execute("query-block", devices_asked),
    )
    below = _below_by_file_name(nodes)
    known = {node["node-name"] for node in nodes}
    if below is None:
        stats = await monitor.execute("query-blockstats", {"query-nodes": True})
        named = {entry.get("node-name", ""): entry.get("parent", {}).get("node-name", "") for entry in stats}
        below = {name: lower for name, lower in named.items() if lower}
        known = set(named)
    graph = Graph(devices, {node["node-name"]: node for node in nodes}, below, _backing_by_file_name(nodes, below))
    if any(len(found) != 1 for found in graph.backing.values()):
        # This answer doubles with each filter on the way down, and so is asked for only where it is needed.
        for device in await monitor.execute("query-blockstats"):
            upper = device
            while "backing" in upper:
                lower = upper["backing"]
                STATISTICS(lower)
                if upper.get("node-name") in graph.backing and "node-name" in lower:
                    graph.backing[upper["node-name"]] = [lower["node-name"]]
                upper = lower
    graph.used.update(below.values(), *graph.backing.values())
    return graph, _shown(devices) | graph.used <= set(graph.nodes) == known


def _shown(devices: list[dict[str, Any]]) -> set[str]:
    """Return the nodes that guest devices see."""
    return {entry["inserted"]["node-name"] for entry in devices if "inserted" in entry}


def _below_by_file_name(nodes: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return for each image the node of its file; None where names do not tell.

    An image has the name of the node below it. They tell where each name is that of one file and of one image at most:
    never with a filter, nor with anything else between an image and its file.
    """
    files: dict[str, str] = {}
    images: dict[str, str] = {}
    for node in nodes:
        name = node["image"]["filename"]
        kind = files if node["drv"] in FILE_DRIVERS else images
        has_data_file = "data-file" in node["image"].get("format-specific", {}).get("data", {})
        if name in kind or node["drv"] in FILTERS or has_data_file:
            return None
        kind[name] = node["node-name"]
    return {image: files[name] for name, image in images.items()} if images.keys() <= files.keys() else None


def _backing_by_file_name(nodes: list[dict[str, Any]], below: dict[str, str]) -> dict[str, list[str]]:
    """Return for each node with a backing file the nodes that have that file open."""
    openers: dict[str, list[str]] = {}
    for node in nodes:
        openers.setdefault(node["image"]["filename"], []).append(node["node-name"])
    backing = {}
    room = MOST_LAYERS
    for node in nodes:
        # A filter shows what it filters as its backing file.
        if "backing_file" in node and node["drv"] not in FILTERS:
            found = openers.get(node["backing_file"], [])
            room -= len(found)
            if room < 0:
                raise Odd(f"tells of {len(found)} nodes that have {node['backing_file']} open")
            # A format, the filter on top of it and the protocol below it have one file name.
            inner = {node["node-name"], *(below.get(opener) for opener in found)}
            backing[node["node-name"]] = [opener for opener in found if opener not in inner]
    return backing


def _is_window(node: dict[str, Any]) -> bool:
    """Return whether a raw node shows only a part of its file (C(offset), C(size)): another may show the next part."""
    name = node["image"]["filename"]
    if node["drv"] != "raw" or not name.startswith("json:"):
        return False
    try:
        options = json.loads(name[len("json:") :])
    except ValueError:
        # QEMU cuts a name of 4096 bytes short: which part of what it shows cannot be told then.
        return True
    return "offset" in options or "size" in options
