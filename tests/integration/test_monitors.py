# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Monitors that are taken, hang, or are none: a bounded wait, and a message that says which."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    partial,
    release,
    start_slowly,
)
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Qmp, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

MODULES = ["drive_backup", "block_job_info", "block_job"]

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


class Impostor:
    """A server on a UNIX socket that says one thing to everybody who connects, and then nothing more."""

    def __init__(self, path: Path, says: bytes, close: bool = False) -> None:
        self.path = path
        self._says = says
        self._close = close
        self._clients: list[socket.socket] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._socket.accept()
                client.sendall(self._says)
                if self._close:
                    client.close()
                else:
                    self._clients.append(client)

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for open_socket in (self._socket, *self._clients):
            open_socket.close()


def _arguments(module: str, monitor: Path, target: Path) -> dict[str, t.Any]:
    given: dict[str, t.Any] = {"monitor": f"unix:{monitor}"}
    if module == "drive_backup":
        given.update(device="drive0", target=str(target))
    if module == "block_job":
        given.update(job_id="j", state="paused")
    return given


@pytest.mark.parametrize("module", first(1, MODULES))
def test_case_33_monitor_held_by_somebody_else(vm: Qemu, target: Path, module: str) -> None:
    holder = Qmp(vm.monitor)
    result = fail(module, _arguments(module, vm.monitor, target))
    holder.close()
    assert str(vm.monitor) in result["msg"]
    assert "another client" in result["msg"]
    assert_absent(target)
    # The module has not stayed in the queue: the next one is served at once.
    Qmp(vm.monitor, timeout=5).close()


def test_case_33_backlog_full_of_clients(vm: Qemu, target: Path) -> None:
    holder = Qmp(vm.monitor)
    queue = []
    with contextlib.suppress(BlockingIOError):
        for _number in range(64):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            queue.append(client)
            client.connect(str(vm.monitor))
    result = fail_backup(vm, target)
    for client in queue:
        client.close()
    holder.close()
    assert str(vm.monitor) in result["msg"]
    assert "another client" in result["msg"]


def test_case_33_a_short_hold_is_waited_for(
    vm: Qemu, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    holder = Qmp(vm.monitor)
    process = start_module("drive_backup", arguments(vm, target))
    # Second in the queue: until the module is there, it would be us whom the next client waits for.
    wait_until(lambda: _waiting(vm.monitor), "the module in the queue")
    holder.close()
    assert process.result()["changed"] is True


def _waiting(path: Path) -> bool:
    with open("/proc/net/unix", encoding="utf-8") as table:
        return any(line.split()[6:] == ["0", str(path)] for line in table)


@pytest.mark.parametrize("module", first(1, MODULES))
def test_monitor_that_never_answers(vm: Qemu, target: Path, module: str) -> None:
    vm.hang()
    result = fail(module, _arguments(module, vm.monitor, target))
    vm.wake()
    assert str(vm.monitor) in result["msg"]
    assert "stopped" in result["msg"]
    assert_absent(target)


@pytest.mark.parametrize(
    ("says", "close"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"{}\n", False),
        (b"", True),
        (b"\xff\xfe\x00\n", False),
        (b"[1]\n", True),
    ],
    ids=["http", "empty-object", "closed", "binary", "list"],
)
def test_socket_that_is_no_monitor(vm: Qemu, directory: Path, target: Path, says: bytes, close: bool) -> None:
    with Impostor(directory / "fake.sock", says, close) as impostor:
        result = fail_backup(vm, target, monitor=str(impostor.path))
    assert str(impostor.path) in result["msg"]
    assert "QMP" in result["msg"]
    assert_absent(target)


def test_socket_that_says_nothing(vm: Qemu, directory: Path, target: Path) -> None:
    with Impostor(directory / "fake.sock", b"") as impostor:
        result = fail_backup(vm, target, monitor=str(impostor.path))
    assert str(impostor.path) in result["msg"]
    assert "no QMP" in result["msg"]


@pytest.mark.slow
def test_monitor_that_greets_and_falls_silent(vm: Qemu, directory: Path, target: Path) -> None:
    with Impostor(directory / "fake.sock", json.dumps(GREETING).encode() + b"\r\n") as impostor:
        result = fail_backup(vm, target, monitor=str(impostor.path))
    assert str(impostor.path) in result["msg"]


def test_file_that_is_no_socket(vm: Qemu, directory: Path, target: Path) -> None:
    plain = directory / "plain"
    plain.touch()
    result = fail_backup(vm, target, monitor=str(plain))
    assert str(plain) in result["msg"]


def test_hmp_monitor(vms: Vms, target: Path, directory: Path) -> None:
    hmp = directory / "hmp"
    vm = vms.start(vms.disk(0), extra=["-monitor", f"unix:{hmp},server=on,wait=off"])
    result = fail_backup(vm, target, monitor=str(hmp))
    assert str(hmp) in result["msg"]
    assert "QMP" in result["msg"]


def test_nobody_listens_on_tcp(vm: Qemu, target: Path) -> None:
    # Bound, and not listening: the port stays ours while the module tries it.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monitor = f"tcp:127.0.0.1:{unused.getsockname()[1]}"
        result = fail_backup(vm, target, monitor=monitor)
    assert monitor in result["msg"]


def test_qemu_hangs_while_it_is_followed(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    process = start_module("drive_backup", arguments(vm, target, speed=SLOW, stall_timeout=3, on_timeout="leave"))
    wait_until(lambda: not process.running or vm.job["offset"] > MIB, "some progress")
    vm.hang()
    result = process.result(timeout=120)
    vm.wake()
    assert result["failed"] is True
    assert "stall_timeout" in result["msg"]
    assert str(vm.monitor) in result["msg"]
    assert partial(target).exists()
    release(vm)
    assert backup(vm, target)["jobs"][0]["state"] == "completed"
    assert_good(target, copy)


def test_qemu_hangs_for_a_while(
    vm: Qemu, directory: Path, target: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    start_slowly(vm, target)
    process = start_module("drive_backup", arguments(vm, target, speed=SLOW))
    wait_until(lambda: not process.running or vm.job["offset"] > MIB, "some progress")
    vm.hang()
    # The module's first try to reach it meanwhile is in the queue.
    wait_until(lambda: _waiting(vm.monitor), "the module in the queue")
    vm.wake()
    release(vm)
    assert process.result()["jobs"][0]["state"] == "completed"
    assert_good(target, copy)


def test_other_vms_do_not_suffer(vms: Vms, target: Path) -> None:
    hanging = vms.start(vms.disk(0), name="hanging")
    working = vms.start(vms.disk(1), name="working")
    hanging.hang()
    found = succeed("vm_info", {"monitors": [str(hanging.monitor), str(working.monitor)]})["vms"]
    hanging.wake()
    by_monitor = {entry["monitor"]: entry for entry in found}
    assert "stopped" in by_monitor[f"unix:{hanging.monitor}"]["error"]
    assert by_monitor[f"unix:{working.monitor}"]["name"] == "working"
    assert backup(working, target, device="drive1")["changed"] is True
