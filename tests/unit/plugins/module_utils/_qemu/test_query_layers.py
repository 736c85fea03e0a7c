# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The layers of a VM's disks, from QEMU's answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    answers,
    device,
    inspect,
    monitor,
)

FILE = Node("#file", "file")


@pytest.mark.parametrize("unknown", ["layer", "base"])
def test_size_of_a_chain_is_unknown_where_that_of_one_image_is(unknown: str) -> None:
    base = Node("#base", filename="/images/base.qcow2", actual=None if unknown == "base" else MIB)
    top = Node("n0", backing=base, actual=None if unknown == "layer" else MIB)
    (found,) = inspect([top, base], [device("n0", "drive0")]).disks
    assert found.actual_size is None
    assert found.layer_size == (None if unknown == "layer" else MIB)


ROOT = Node("#root", "raw", filename="/images/root.raw", below="#rootfile", actual=4 * MIB)
ROOT_FILE = Node("#rootfile", "file", filename="/images/root.raw")
MIDDLE = Node("middle", filename="json:{middle}", below="#middlefile", backing=ROOT, actual=2 * MIB)
MIDDLE_FILE = Node("#middlefile", "file", filename="/images/middle.qcow2")
TOP = Node("n0", filename="/images/top.qcow2", below="#file", backing=MIDDLE, actual=MIB)
CHAIN = [FILE, TOP, MIDDLE_FILE, MIDDLE, ROOT_FILE, ROOT]
ROOT_AGAIN = Node("#again", "raw", filename="/images/root.raw", below="#againfile", actual=4 * MIB)
ROOT_AGAIN_FILE = Node("#againfile", "file", filename="/images/root.raw")
OTHER = Node("n1", filename="/images/other.qcow2", below="#otherfile", backing=ROOT_AGAIN)
OTHER_FILE = Node("#otherfile", "file", filename="/images/other.qcow2")
SHARED = [*CHAIN, OTHER_FILE, OTHER, ROOT_AGAIN_FILE, ROOT_AGAIN]
THROTTLED = Node("thr", "throttle", filename="json:{thr}", below="middle")
JOB = Node("#cbw", "copy-before-write", filename="/images/top.qcow2", below="n0")


@pytest.mark.parametrize("version", ["7.2.22", "10.0.13", "10.1.0", "11.1.3"])
@pytest.mark.parametrize(
    ("nodes", "devices", "expected"),
    [
        pytest.param(CHAIN, [device("n0", "drive0")], {"n0": ("middle", "#root")}, id="chain"),
        pytest.param(CHAIN, [], {"n0": ("middle", "#root")}, id="chain without a device"),
        pytest.param(list(reversed(CHAIN)), [device("n0", "drive0")], {"n0": ("middle", "#root")}, id="in any order"),
        pytest.param([*CHAIN, JOB], [device("#cbw", "drive0")], {"n0": ("middle", "#root")}, id="running job"),
        pytest.param(
            [THROTTLED, *(replace(node, backing=THROTTLED) if node is TOP else node for node in CHAIN)],
            [device("n0", "drive0")],
            {"n0": ("middle", "#root")},
            id="filter between two layers",
        ),
        pytest.param(
            [*CHAIN, OTHER_FILE, replace(OTHER, backing=ROOT)],
            [device("n0", "drive0"), device("n1", "drive1")],
            {"n0": ("middle", "#root"), "n1": ("#root",)},
            id="one node below two disks",
        ),
        pytest.param(
            SHARED,
            [device("n0", "drive0"), device("n1", "drive1")],
            {"n0": ("middle", "#root"), "n1": ("#again",)},
            id="one file below two disks",
        ),
    ],
)
def test_layers_of_a_disk(
    nodes: list[Node], devices: list[dict[str, Any]], expected: dict[str, tuple[str, ...]], version: str
) -> None:
    by_name = {node.name: node for node in nodes}
    shown = [by_name[entry["inserted"]["node-name"]] for entry in devices]

    def stats(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [node.stats() for node in nodes] if arguments else [node.stats(nested=True) for node in shown]

    told = [node.query(tuple(map(int, version.split(".")))) for node in nodes]
    given = answers(nodes, devices, query_named_block_nodes=told, query_blockstats=stats)
    found = asyncio.run(inspect_vm(monitor(FakeMonitor(given, version=version))))
    assert {disk.node: disk.layers for disk in found.disks} == expected
    sizes = {"n0": 7 * MIB, "n1": 4 * MIB + 200704}
    assert {disk.node: disk.actual_size for disk in found.disks} == {name: sizes[name] for name in expected}


def test_layers_are_all_that_they_may_be_where_qemu_does_not_tell() -> None:
    found = inspect(SHARED, [], query_blockstats=lambda arguments: [n.stats() for n in SHARED] if arguments else [])
    assert {disk.node: set(disk.layers) for disk in found.disks} == {
        "n0": {"middle", "#root", "#again"},
        "n1": {"#root", "#again"},
    }


def test_file_names_that_lead_in_a_circle_end_somewhere() -> None:
    # QEMU cuts long json: names: those of several layers may become one.
    lower = Node("n1", filename="json:{cut", backing=Node("", filename="json:{cut"))
    upper = Node("n0", filename="json:{cut", backing=lower)
    found = inspect([upper, lower], [], query_blockstats=lambda a: [upper.stats(), lower.stats()] if a else [])
    assert {disk.node: disk.layers for disk in (*found.disks, *found.other_nodes)}["n0"] == ("n1",)


@pytest.mark.parametrize("version", ["7.2.22", "11.1.3"])
def test_no_answer_tells_of_a_node_twice(version: str) -> None:
    told = [node.query(tuple(map(int, version.split(".")))) for node in CHAIN]
    fake = FakeMonitor(
        answers(CHAIN, [device("n0", "drive0")], query_named_block_nodes=told),
        version=version,
    )
    asyncio.run(inspect_vm(monitor(fake)))
    asked = [arguments for command, arguments in fake.sent if command == "query-named-block-nodes"]
    assert asked == [{"flat": True}]
    assert ("query-blockstats", {}) not in fake.sent
