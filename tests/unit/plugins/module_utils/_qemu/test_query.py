# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The read model of a VM, from QEMU's answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import query
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import NO_UUID
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.plugins.modules.vm_info import returned
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, SIZE, UUID, bitmap, disk
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    answers,
    bitmap_entry,
    block_job,
    device,
    inspect,
    jobs,
    monitor,
)

VD0 = "/machine/peripheral/vd0/virtio-backend"
ANONYMOUS = "/machine/peripheral-anon/device[1]/virtio-backend"
FILE = Node("#file", "file")
N0 = Node("n0", below="#file")
BASE = Node("#base", filename="/images/base.qcow2", below="#basefile", read_only=True)


@pytest.mark.parametrize(
    ("nodes", "devices", "expected"),
    [
        pytest.param([FILE, N0], [device("n0", "drive0", VD0)], [("drive0", "n0", ())], id="backend"),
        pytest.param([FILE, N0], [device("n0", "", VD0)], [("vd0", "n0", ())], id="device alone"),
        pytest.param([FILE, N0], [device("n0", "", ANONYMOUS)], [("n0", "n0", ())], id="device without id"),
        pytest.param(
            [FILE, N0],
            [device("n0", "", "sata0")],
            [("sata0", "n0", ())],
            id="device told by its id, as those of SATA and SCSI",
        ),
        pytest.param(
            [FILE, Node("#node", below="#file")],
            [device(backend="cd0"), device("#node", "", ANONYMOUS)],
            [("disk1", "#node", ())],
            id="nothing named",
        ),
        pytest.param(
            [FILE, Node("#node", below="#file")],
            [device("#node", "virtio0", ANONYMOUS)],
            [("virtio0", "#node", ())],
            id="node without name",
        ),
        pytest.param(
            [FILE, N0, Node("thr", "throttle", below="n0")],
            [device("thr", "", VD0)],
            [("vd0", "n0", ("thr",))],
            id="throttle",
        ),
        pytest.param(
            [FILE, N0, Node("#cbw", "copy-before-write", below="n0")],
            [device("#cbw", "drive0", VD0)],
            [("drive0", "n0", ("#cbw",))],
            id="running job",
        ),
        pytest.param(
            [FILE, N0, Node("#cbw", "copy-before-write", below="n0"), Node("thr", "throttle", below="#cbw")],
            [device("thr", "drive0", VD0)],
            [("drive0", "n0", ("thr", "#cbw"))],
            id="running job below a throttle",
        ),
        pytest.param([FILE, N0], [], [("n0", "n0", ())], id="node alone"),
        pytest.param(
            [Node("#cbw", "copy-before-write", below="n0"), FILE, N0],
            [],
            [("n0", "n0", ("#cbw",))],
            id="node alone with a running job",
        ),
        pytest.param(
            [N0, Node("#cbw", "copy-before-write", below="n0"), FILE],
            [],
            [("n0", "n0", ("#cbw",))],
            id="node alone with a running job, listed after it",
        ),
        pytest.param([Node("protocol", "file"), Node("n0", below="protocol")], [], [("n0", "n0", ())], id="named file"),
        pytest.param(
            [FILE, Node("n0", below="#file", backing=BASE), Node("#basefile", "file"), BASE],
            [device("n0", "drive0")],
            [("drive0", "n0", ())],
            id="backing file",
        ),
        pytest.param(
            [
                FILE,
                Node("n0", below="#file", backing=Node("base", filename="/images/base.qcow2")),
                Node("base", filename="/images/base.qcow2", read_only=True),
            ],
            [device("n0", "", VD0)],
            [("vd0", "n0", ())],
            id="backing file with a node name",
        ),
        pytest.param(
            [FILE, N0, Node("n1")],
            [device("n1", "drive1"), device("n0", "drive0"), device("n0", "again")],
            [("drive1", "n1", ()), ("drive0", "n0", ())],
            id="two disks in QEMU's order, one of them in two devices",
        ),
        pytest.param([FILE, N0], [device("gone", "drive0")], [("n0", "n0", ())], id="node that has just gone"),
        pytest.param([], [device(backend="cd0", removable=True)], [], id="drive without medium"),
    ],
)
def test_disks_are_found_below_their_filters(
    nodes: list[Node], devices: list[dict[str, Any]], expected: list[tuple[str, str, tuple[str, ...]]]
) -> None:
    found = inspect(nodes, devices)
    assert [(disk.name, disk.node, disk.filters) for disk in found.disks] == expected
    assert [disk.stable_name for disk in found.disks] == [name != "disk1" for name, _node, _filters in expected]
    others = {node.node for node in found.other_nodes}
    in_disks = {name for disk in found.disks for name in (disk.node, *disk.filters)}
    # What is only a file, without a name, is told by the image in it.
    files = {node.name for node in nodes if node.name.startswith("#") and node.driver == "file"}
    assert others == {node.name for node in nodes} - in_disks - files


def test_disk_has_what_qemu_tells_of_its_node() -> None:
    base = Node("#base", "raw", filename="/images/base.raw", actual=MIB)
    image = Node(
        "n0",
        below="#file",
        filename="/images/top.qcow2",
        backing=base,
        actual=65536,
        read_only=True,
        bitmaps=[bitmap_entry("b0"), bitmap_entry("")],
    )
    (found,) = inspect([FILE, image, base], [device("n0", "cd0", "cdrom", removable=True)]).disks
    assert found == disk(
        "cd0",
        "n0",
        qdev="cdrom",
        filename="/images/top.qcow2",
        file="/images/web01.qcow2",
        backing_file="/images/base.raw",
        backing_format="raw",
        layers=("#base",),
        layer_size=65536,
        actual_size=MIB + 65536,
        read_only=True,
        removable=True,
        keeps_bitmaps=False,
        bitmaps=(bitmap("b0"),),
    )


@pytest.mark.parametrize(
    ("node", "keeps"),
    [
        (Node("n0"), True),
        (Node("n0", read_only=True), False),
        (Node("n0", "raw"), False),
        (Node("n0", "vmdk"), False),
        (Node("n0", specific={"compat": "0.10", "refcount-bits": 16}), False),
        (Node("n0", specific={"compat": "1.1", "data-file": "/images/data", "data-file-raw": False}), True),
        (Node("n0", specific={"compat": "1.1", "data-file": "/images/data", "data-file-raw": True}), False),
    ],
    ids=["qcow2", "read-only", "raw", "vmdk", "old qcow2", "data file", "raw data file"],
)
def test_images_that_bitmaps_can_be_stored_in(node: Node, keeps: bool) -> None:
    (found,) = inspect([node], [device("n0", "drive0")]).disks
    assert found.keeps_bitmaps is keeps


def test_empty_drives_are_told_by_name() -> None:
    found = inspect([], [device(backend="cd0"), device(qdev=VD0), device(qdev="cdrom"), device(qdev=ANONYMOUS)])
    assert found.empty == ("cd0", "vd0", "cdrom", ANONYMOUS)


def test_graph_is_asked_for_again_when_a_filter_has_gone_meanwhile() -> None:
    idle, busy = [FILE, N0], [FILE, N0, Node("#cbw", "copy-before-write", below="n0")]
    lists = iter([[node.query() for node in nodes] for nodes in (busy, idle, idle, idle)])
    blocks = iter([[device("#cbw", "drive0")], [device("n0", "drive0")]])
    fake = FakeMonitor(answers(idle, [], query_named_block_nodes=lists, query_block=blocks))
    found = asyncio.run(inspect_vm(monitor(fake)))
    assert [(disk.name, disk.node, disk.filters) for disk in found.disks] == [("drive0", "n0", ())]
    assert fake.names().count("query-block") == 2


@pytest.mark.parametrize(
    ("given", "named", "address", "expected"),
    [
        ("mine", {"name": "web01"}, "/run/qemu/s.qmp", "mine"),
        ("", {"name": "web01"}, "/run/qemu/s.qmp", "web01"),
        ("", {}, "/run/qemu/db01.qmp", "db01"),
        ("", {}, "127.0.0.1", "tcp:127.0.0.1:4444"),
    ],
)
def test_name_of_a_vm(given: str, named: dict[str, str], address: str, expected: str) -> None:
    fake = FakeMonitor(answers([], [], query_name=named), address=address)
    assert asyncio.run(inspect_vm(monitor(fake), given)).name == expected


@pytest.mark.parametrize(
    ("uuid", "expected"), [(UUID, (UUID, UUID)), (NO_UUID, ("", "0123456789abcdef:web01"))], ids=["uuid", "none"]
)
def test_identity_of_a_vm(uuid: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "machine_id", lambda: "0123456789abcdef")
    found = inspect([], [], query_uuid={"UUID": uuid})
    assert (found.uuid, found.identity) == expected


def test_vm_as_a_return_value() -> None:
    fdsets = [
        {"fdset-id": 3, "fds": [{"fd": 20, "opaque": "vmfleet:db:1"}, {"fd": 21}]},
        {"fdset-id": 4, "fds": []},
    ]
    fake = FakeMonitor(
        answers([N0], [device("n0", "drive0"), device(backend="cd0")], query_fdsets=fdsets)
        | jobs(block_job("j0", offset=SIZE // 4)),
        process=Process(4711, 99),
    )
    found = asyncio.run(inspect_vm(monitor(fake)))
    assert found.fdsets == {3: ("vmfleet:db:1", ""), 4: ()}
    value = returned(found)
    assert (value["pid"], value["status"], value["version"]) == (4711, "running", "7.2.22")
    assert [entry["node"] for entry in value["disks"]] == ["n0"]
    assert [(entry["stable_name"], entry["keeps_bitmaps"]) for entry in value["disks"]] == [(True, True)]
    assert value["empty"] == ["cd0"]
    assert [(entry["id"], entry["percent"]) for entry in value["jobs"]] == [("j0", 25.0)]


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (Process(4711, 99), ("/proc/4711/cwd/web01.qcow2", "/images/base.qcow2")),
        (None, ("web01.qcow2", "/images/base.qcow2")),
    ],
)
def test_image_files_count_from_qemus_own_directory(process: Process | None, expected: tuple[str, ...]) -> None:
    nodes = [Node("n0", filename="web01.qcow2"), Node("#file", "file", filename="web01.qcow2"), BASE]
    found = asyncio.run(inspect_vm(monitor(FakeMonitor(answers(nodes, []), process=process))))
    assert found.files == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, ""),
        ({"recording": False}, "is disabled"),
        ({"busy": True, "recording": False}, "is in use"),
        ({"inconsistent": True, "recording": False}, "is inconsistent"),
    ],
)
def test_bitmap_that_no_increment_can_rest_on(values: dict[str, bool], reason: str) -> None:
    found = inspect([Node("n0", bitmaps=[bitmap_entry("b0", **values)])], []).disks[0].bitmap("b0")
    assert found
    assert found.unusable.startswith(reason)
    assert bool(found.unusable) == bool(reason)


AGAIN = Node("#other", "file")


@pytest.mark.parametrize(
    ("nodes", "asked"),
    [
        pytest.param([FILE, N0], False, id="an image in a file"),
        pytest.param(
            [FILE, N0, Node("#basefile", "file", filename="/images/base.qcow2"), BASE], False, id="two of them"
        ),
        pytest.param([FILE, N0, Node("f0", "throttle", below="n0")], True, id="a filter"),
        pytest.param([FILE, N0, Node("raw0", "raw", below="n0")], True, id="an image in an image"),
        pytest.param([FILE, N0, AGAIN], True, id="a file that is open twice"),
        pytest.param([FILE, N0, AGAIN, Node("n1", below="#other")], True, id="two images on one file"),
        pytest.param([Node("#dbg", "blkdebug", filename="blkdebug::/a"), Node("n0", below="#dbg")], True, id="no file"),
        pytest.param([FILE, Node("n0", below="#file", specific={"data-file": "/d"})], True, id="data elsewhere"),
    ],
)
def test_statistics_are_asked_for_where_names_of_files_do_not_tell(nodes: list[Node], asked: bool) -> None:
    """They are the larger half of all that an older QEMU tells of its nodes."""
    fake = FakeMonitor(answers(nodes, []))
    asyncio.run(inspect_vm(monitor(fake)))
    assert ("query-blockstats" in [command for command, _arguments in fake.sent]) is asked
