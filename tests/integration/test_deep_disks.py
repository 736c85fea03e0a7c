# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disks with very many layers, as snapshots leave them that nobody merges: what is asked about them stays small."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import typing as t
from collections import Counter

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import graph
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.agent_channel import find_agent
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, layered, patterned, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

SIZE = 8 * MIB
LAYERS = 130
DISKS = 3
DEPTHS = (30, 60, 120)

LIMIT = 4.4
"""How much larger the answers may be of four times as many layers. Where they grow with the square, it is 16."""


class CountingMonitor(Monitor):
    """A monitor that counts how many bytes of JSON the answers to each question have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bytes: Counter[str] = Counter()

    async def execute(self, command: str, arguments: dict[str, t.Any] | None = None) -> t.Any:
        answer = await super().execute(command, arguments)
        self.bytes[command] += len(json.dumps(answer))
        return answer


def disks_of(*images: Path) -> list[Disk]:
    """One disk for each image."""
    return [Disk(image, id=f"drive{number}", node=f"n{number}") for number, image in enumerate(images)]


def answers_of(vm: Qemu, layers: int) -> Counter[str]:
    """How many bytes QEMU sends for one look at a VM, by question."""

    async def look() -> Counter[str]:
        async with CountingMonitor(parse_address(str(vm.monitor))) as monitor:
            found = await inspect_vm(monitor)
            await find_agent(monitor)
            assert [len(disk.layers) for disk in found.disks] == [layers - 1] * len(vm.disks)
            return monitor.bytes

    return asyncio.run(look())


@pytest.mark.parametrize("shared", [False, True], ids=["one disk", "two disks on one base"])
def test_answers_grow_with_the_number_of_layers(directory: Path, shared: bool) -> None:
    """Two disks on one base are what file names alone do not tell apart: an older QEMU has to be asked more."""
    images = layered(directory, "a", max(DEPTHS), SIZE)
    found = {}
    for layers in DEPTHS:
        tops = [images[layers - 1]]
        if shared:
            tops = [create(directory / f"top{number}", SIZE, backing=images[layers - 2]) for number in range(2)]
        with Qemu(*disks_of(*tops)) as vm:
            found[layers] = answers_of(vm, layers)
    for layers in DEPTHS:
        found[layers]["all"] = sum(found[layers].values())
    questions = sorted(found[max(DEPTHS)], key=lambda question: found[max(DEPTHS)][question])
    print(f"{'bytes of layers:':26}" + "".join(f"{layers:>10}" for layers in DEPTHS))
    for question in questions:
        print(f"{question:26}" + "".join(f"{found[layers][question]:>10}" for layers in DEPTHS))
    for question in questions:
        assert found[120][question] <= LIMIT * found[30][question], question


def test_names_of_files_tell_the_same_as_statistics(vms: Vms, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older QEMU is asked without need, where its graph is a plain one."""
    named = patterned(directory / "named.qcow2", size=SIZE)
    storage = {"driver": "file", "filename": str(named), "node-name": "storage"}
    vm = vms.start(
        *disks_of(layered(directory, "a", 4, SIZE)[-1]),
        vms.disk(7, size=SIZE, format="raw"),
        vms.disk(8, size=SIZE, id=None, read_only=True),
        Disk(named, id=None, node="format", file=storage),
    )

    async def look() -> Vm:
        async with Monitor(parse_address(str(vm.monitor))) as monitor:
            return await inspect_vm(monitor)

    by_names = asyncio.run(look())
    monkeypatch.setattr(graph, "_below_by_file_name", lambda _nodes: None)
    assert by_names == asyncio.run(look())
    assert {disk.name for disk in by_names.disks} == {"drive0", "drive7", "n8", "format"}


def frozen(vm: Qemu, directory: Path, step: str) -> dict[str, Path]:
    return {disk.name: vm.freeze(disk, directory / f"{step}-{vm.pid}-{disk.name}") for disk in vm.disks}


def test_a_vm_with_very_many_layers_is_backed_up_beside_another(vms: Vms, directory: Path) -> None:
    tops = []
    for number in range(DISKS):
        *lower, top = layered(directory, f"disk{number}-", LAYERS, SIZE, seed=number)
        write(lower[LAYERS // 2], f"write -P {17 + number} 1M 512k")
        write(top, f"write -P {33 + number} 1280k 512k")
        tops.append(top)
    deep = vms.start(*disks_of(*tops), name="deep")
    good = vms.start(vms.disk(9, size=SIZE), name="good")

    told = succeed("vm_info", {"monitors": [str(deep.monitor), str(good.monitor)]})["vms"]
    depths = {vm["name"]: [len(disk["layers"]) for disk in vm["disks"]] for vm in told}
    assert depths == {"deep": [LAYERS - 1] * DISKS, "good": [0]}

    sets = Sets(directory / "repository")
    copies = {vm: frozen(vm, directory, "one") for vm in (deep, good)}
    sets.back_up(deep, good, id="one")
    for vm, name in ((deep, "deep"), (good, "good")):
        sets.assert_good(name, copies[vm], "one")
        for disk in vm.disks:
            vm.write(disk.name, 99, 2 * MIB, MIB)
    copies = {vm: frozen(vm, directory, "two") for vm in (deep, good)}
    sets.back_up(deep, good, id="two")
    for vm, name in ((deep, "deep"), (good, "good")):
        sets.assert_good(name, copies[vm], "two", dict.fromkeys(copies[vm], "incremental"))


class EndlessQemu:
    """A monitor like QEMU's, whose answers about block nodes are longer than 10 MiB.

    QEMU itself comes to that with tens of thousands of layers only.
    """

    ANSWERS: t.ClassVar[dict[str, t.Any]] = {
        "qmp_capabilities": {},
        "query-name": {"name": "endless"},
        "query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"},
        "query-status": {"status": "running", "running": True, "singlestep": False},
        "query-block-jobs": [],
        "query-jobs": [],
        "query-fdsets": [],
    }
    VERSION: t.ClassVar[dict[str, t.Any]] = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> EndlessQemu:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        # Only this wakes one who waits in accept().
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                client, _address = self._socket.accept()
            except OSError:
                return
            # The client leaves in the middle of the answer.
            with client, contextlib.suppress(ConnectionError):
                self._send(client, {"QMP": {"version": self.VERSION, "capabilities": []}})
                self._converse(client)

    def _converse(self, client: socket.socket) -> None:
        text = ""
        while data := client.recv(65536):
            text += data.decode()
            while text:
                request, end = json.JSONDecoder().raw_decode(text)
                text = text[end:]
                answer = self.ANSWERS.get(request["execute"], "x" * (11 * MIB))
                self._send(client, {"return": answer, "id": request.get("id")})

    def _send(self, client: socket.socket, message: dict[str, t.Any]) -> None:
        client.sendall(json.dumps(message).encode() + b"\n")


def test_a_vm_whose_answer_is_too_long_fails_alone(vms: Vms, directory: Path) -> None:
    good = vms.start(vms.disk(0, size=SIZE), name="good")
    copies = frozen(good, directory, "copy")
    sets = Sets(directory / "repository")
    with EndlessQemu(good.directory / "endless.qmp") as endless:
        told = f"unix:{endless.path}: the answer to query-named-block-nodes is longer than qemu.qmp can read (10 MiB)"
        monitors = [f"unix:{endless.path}", f"unix:{good.monitor}"]

        first, second = succeed("vm_info", {"monitors": monitors})["vms"]
        assert first["error"].startswith(told)
        assert (second["error"], second["name"]) == ("", "good")

        plan = sets.plan(*monitors)["plan"]
        bad, fine = plan["vms"]
        assert (bad["name"], bad["action"], fine["action"]) == ("endless", "fail", "start")
        assert bad["reason"].startswith(told)

        result = fail("backup_set", {"plan": plan})
        assert [vm["state"] for vm in result["vms"]] == ["failed", "published"]
        assert result_of(result, "endless")["error"].startswith(told)
    sets.assert_good("good", copies)


def test_the_layers_are_what_qemu_img_makes(directory: Path) -> None:
    """They are written by the tests themselves, as there are hundreds of them."""
    images = layered(directory, "a", 5, SIZE)
    told = json.loads(qemu_img("info", "--backing-chain", "--output=json", images[-1]))
    assert [image["filename"] for image in told] == [str(image) for image in reversed(images)]
