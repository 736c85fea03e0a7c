# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Conversations over real sockets with servers of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import Message, QMPClient

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import (
    CommandError,
    MonitorError,
    MonitorGone,
    MonitorTimeout,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import connection, qmp_client
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address, parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor

if TYPE_CHECKING:
    from pathlib import Path


GREETING = {
    "QMP": {
        "version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"},
        "capabilities": ["oob"],
    }
}


Answer = Callable[[str, dict[str, Any]], "dict[str, Any] | None"]


class Server:
    """A QMP server for one client after the other; what it does not answer, C(None), it hangs up on."""

    def __init__(self, listener: socket.socket, answer: Answer, greeting: bytes) -> None:
        self._listener = listener
        self._answer = answer
        self._greeting = greeting
        self.received: list[dict[str, Any]] = []
        self.inodes: list[int] = []
        self.served = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            self.served.set()
            # A client may have left before its turn came.
            with client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(self._greeting)
                self._converse(client)

    def _converse(self, client: socket.socket) -> None:
        text = ""
        while True:
            try:
                data, fds, _flags, _address = socket.recv_fds(client, 65536, 4)
            except OSError:
                return
            for fd in fds:
                self.inodes.append(os.fstat(fd).st_ino)
                os.close(fd)
            if not data:
                return
            # Messages follow each other without anything in between; a blank carries each file descriptor.
            text = (text + data.decode()).lstrip()
            with contextlib.suppress(ValueError):
                while text:
                    request, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:].lstrip()
                    answer = self._execute(request["execute"], request.get("arguments", {}))
                    if answer is None:
                        return
                    client.sendall(json.dumps({**answer, "id": request.get("id")}).encode() + b"\n")

    def _execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        if command == "qmp_capabilities":
            return {"return": {}}
        self.received.append({"execute": command, "arguments": arguments})
        return self._answer(command, arguments)

    def close(self) -> None:
        # A blocked accept() ends with the shutdown only.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def no_answer(_command: str, _arguments: dict[str, Any]) -> None:
    return None


@pytest.fixture
def path() -> Iterator[str]:
    """A socket's path; those have 107 bytes only."""
    with tempfile.TemporaryDirectory(prefix="vmfleet-") as directory:
        yield f"{directory}/web01.qmp"


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def listen(path: str, resources: ExitStack) -> Callable[[int], socket.socket]:
    def make(backlog: int = 5) -> socket.socket:
        listener = resources.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(backlog)
        return listener

    return make


@pytest.fixture
def serve(listen: Callable[[int], socket.socket], resources: ExitStack) -> Callable[..., Server]:
    def make(
        answer: Answer = no_answer, greeting: bytes = json.dumps(GREETING).encode() + b"\n", backlog: int = 5
    ) -> Server:
        server = Server(listen(backlog), answer, greeting)
        resources.callback(server.close)
        return server

    return make


@pytest.fixture
def client(path: str, resources: ExitStack) -> Callable[[], None]:
    """Connects another client."""

    def connect() -> None:
        resources.enter_context(socket.socket(socket.AF_UNIX)).connect(path)

    return connect


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(qmp_client, "COMMAND_TIMEOUT", 0.2)


def converse(address: str, *commands: str) -> tuple[Monitor, list[Any]]:
    """Connect, execute, and disconnect."""

    async def run() -> tuple[Monitor, list[Any]]:
        async with Monitor(parse_address(address)) as monitor:
            return monitor, [await monitor.execute(command) for command in commands]

    return asyncio.run(run())


@pytest.mark.usefixtures("impatient")
class TestNoGreeting:
    """What keeps a monitor from greeting is told from the kernel's list of sockets."""

    @staticmethod
    def refused(path: str) -> str:
        with pytest.raises(MonitorTimeout) as refused:
            converse(path)
        assert str(refused.value).startswith(f"unix:{path}: no QMP greeting within 0.2 s: ")
        return str(refused.value)

    def test_another_client_holds_it(
        self, path: str, listen: Callable[[int], socket.socket], client: Callable[[], None]
    ) -> None:
        listener = listen(5)
        client()
        with listener.accept()[0]:
            assert "another client holds this monitor" in self.refused(path)

    @pytest.mark.parametrize("held", [True, False])
    def test_backlog_is_full(
        self, path: str, listen: Callable[[int], socket.socket], client: Callable[[], None], held: bool
    ) -> None:
        listener = listen(0)
        with ExitStack() as accepted:
            if held:
                client()
                accepted.enter_context(listener.accept()[0])
            client()
            reason = "another client holds this monitor" if held else "QEMU does not accept connections"
            assert reason in self.refused(path)

    def test_qemu_does_not_accept(self, path: str, listen: Callable[[int], socket.socket]) -> None:
        listen(5)
        assert self.refused(path).endswith("blocked by a hung disk or target")

    def test_qemu_is_stopped(
        self, path: str, listen: Callable[[int], socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listen(5)
        monkeypatch.setattr(Process, "stopped", True)
        assert self.refused(path).endswith(f"(process {os.getpid()} is stopped)")

    def test_accepted_in_silence(self, path: str, listen: Callable[[int], socket.socket], resources: ExitStack) -> None:
        listener = listen(5)
        thread = threading.Thread(target=lambda: resources.enter_context(listener.accept()[0]))
        thread.start()
        assert "it accepted the connection and sent nothing" in self.refused(path)
        thread.join(10)

    def test_nothing_is_left_in_the_queue(self, path: str, listen: Callable[[int], socket.socket]) -> None:
        listener = listen(5)
        self.refused(path)
        with listener.accept()[0] as abandoned:
            assert abandoned.recv(1) == b""

    def test_tcp_tells_both_possibilities(self, resources: ExitStack) -> None:
        listener = resources.enter_context(socket.create_server(("127.0.0.1", 0)))
        with pytest.raises(MonitorTimeout, match=r"another client holds this monitor.*, or QEMU does not accept"):
            converse(f"tcp:127.0.0.1:{listener.getsockname()[1]}")


class TestConnect:
    def test_no_such_socket(self, path: str) -> None:
        with pytest.raises(MonitorGone, match="there is no such socket: the VM is off"):
            converse(path)

    def test_nobody_listens(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        with pytest.raises(MonitorGone, match="nobody listens there: the VM is off"):
            converse(path)

    def test_nobody_listens_over_tcp(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(MonitorGone, match=f"^tcp:127.0.0.1:{port}: nobody listens there"):
            converse(f"tcp:127.0.0.1:{port}")

    def test_unknown_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_args: Any, **_options: Any) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        with pytest.raises(MonitorError, match=r"^tcp:hv:4444: cannot connect: Name or service not known$"):
            converse("tcp:hv:4444")

    def test_no_socket_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(MonitorGone, match="nobody listens there"):
            converse(str(tmp_path / "file"))

    def test_path_that_no_socket_can_have(self) -> None:
        with pytest.raises(MonitorError, match="cannot connect: AF_UNIX path too long"):
            converse("/" + "x" * 200)

    @pytest.mark.parametrize(
        ("greeting", "kind", "reason"),
        [
            (b"SSH-2.0-OpenSSH_9.2\r\n", MonitorError, "what answers there is not a QMP monitor"),
            (b'{"return": {}}\n', MonitorError, "what answers there is not a QMP monitor"),
            (b"", MonitorGone, "closed without a QMP greeting"),
        ],
        ids=["text", "guest agent", "end"],
    )
    def test_no_qmp_monitor(
        self,
        greeting: bytes,
        kind: type[MonitorError],
        reason: str,
        path: str,
        serve: Callable[..., Server],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if not greeting:
            monkeypatch.setattr(Server, "_converse", lambda _self, _client: None)
        serve(greeting=greeting)
        with pytest.raises(kind, match=reason) as refused:
            converse(path)
        assert refused.type is kind

    def test_unix(self, path: str, serve: Callable[..., Server]) -> None:
        serve(lambda _command, _arguments: {"return": {"status": "running"}})
        monitor, (status,) = converse(f"unix:{path}", "query-target")
        assert status == {"status": "running"}
        assert monitor.process == Process.of(os.getpid())
        assert monitor.passes_fds

    def test_tcp(self, resources: ExitStack) -> None:
        listener = resources.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = Server(listener, lambda _command, _arguments: {"return": []}, json.dumps(GREETING).encode() + b"\n")
        resources.callback(server.close)
        monitor, (jobs,) = converse(f"tcp:127.0.0.1:{listener.getsockname()[1]}", "query-iothreads")
        assert jobs == []
        assert monitor.process is None
        assert not monitor.passes_fds

    def test_monitor_is_free_for_the_next_one(self, path: str, serve: Callable[..., Server]) -> None:
        serve(lambda _command, _arguments: {"return": 1})
        for _dummy in range(2):
            assert converse(path, "query-target")[1] == [1]

    def test_full_backlog_is_waited_for(self, path: str, serve: Callable[..., Server], resources: ExitStack) -> None:
        with ExitStack() as others:
            server = serve(lambda _command, _arguments: {"return": 1}, backlog=0)
            # The first one is served, the second one fills the backlog.
            for _dummy in range(2):
                others.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
                server.served.wait(10)
            leave = threading.Timer(0.2, others.pop_all().close)
        leave.start()
        resources.callback(leave.join)
        assert converse(path, "query-target")[1] == [1]

    def test_nothing_is_executed_without_connection(self) -> None:
        monitor = Monitor(Address(path="/run/web01.qmp"))
        with pytest.raises(MonitorError, match=r"^unix:/run/web01\.qmp: not connected$"):
            asyncio.run(monitor.execute("query-target"))


class TestExecute:
    def test_version(self, path: str, serve: Callable[..., Server]) -> None:
        serve()

        async def version() -> str:
            async with Monitor(parse_address(path)) as monitor:
                return monitor.version

        assert asyncio.run(version()) == "7.2.22"

    def test_changes_are_recorded_and_queries_are_not(self, path: str, serve: Callable[..., Server]) -> None:
        serve(lambda _command, _arguments: {"return": {}})
        monitor, _answers = converse(path, "query-target", "qom-list-types", "stop", "cont")
        assert monitor.commands == [{"execute": "stop", "arguments": {}}, {"execute": "cont", "arguments": {}}]

    def test_refusal(self, path: str, serve: Callable[..., Server]) -> None:
        error = {"class": "DeviceNotActive", "desc": "Job 'j0' not found "}
        serve(lambda _command, _arguments: {"error": error})
        with pytest.raises(CommandError) as refused:
            converse(path, "block-job-cancel")
        assert str(refused.value) == f"unix:{path}: QEMU refused block-job-cancel: Job 'j0' not found"
        assert refused.value.error_class == "DeviceNotActive"
        assert refused.value.description == "Job 'j0' not found"
        assert refused.value.command == "block-job-cancel"

    def test_refusal_tells_no_secret(self, path: str, serve: Callable[..., Server]) -> None:
        said = "Could not open 'nbd://me:hunter2@host/a': Permission denied"
        serve(lambda _command, _arguments: {"error": {"class": "GenericError", "desc": said}})
        with pytest.raises(CommandError, match=r"refused blockdev-add: Could not open .*: Perm") as refused:
            converse(path, "blockdev-add")
        assert "hunter2" not in str(refused.value) + refused.value.description

    @pytest.mark.usefixtures("impatient")
    def test_no_answer(self, path: str, serve: Callable[..., Server]) -> None:
        go_on = threading.Event()

        def hang(_command: str, _arguments: dict[str, Any]) -> None:
            go_on.wait(30)

        serve(hang)
        try:
            with pytest.raises(MonitorTimeout, match=r"no answer to query-mice within 0\.2 s"):
                converse(path, "query-mice")
        finally:
            go_on.set()

    def test_connection_breaks_off(self, path: str, serve: Callable[..., Server]) -> None:
        serve()
        with pytest.raises(MonitorGone, match="the connection broke off during quit"):
            converse(path, "quit")

    def test_connection_has_broken_off(self, path: str, serve: Callable[..., Server]) -> None:
        serve()

        async def twice() -> None:
            async with Monitor(parse_address(path)) as monitor:
                for _dummy in range(2):
                    with pytest.raises(MonitorGone):
                        await monitor.execute("quit")

        asyncio.run(twice())

    def test_files_are_handed_over_as_one_set(self, path: str, serve: Callable[..., Server], tmp_path: Path) -> None:
        server = serve(lambda _command, _arguments: {"return": {"fdset-id": 7, "fd": 20}})
        files = [tmp_path / "a", tmp_path / "b"]

        async def hand_over() -> int:
            with ExitStack() as opened:
                fds = [opened.enter_context(open(file, "wb")).fileno() for file in files]
                async with Monitor(parse_address(path)) as monitor:
                    fdset = await monitor.add_fdset(fds, "vmfleet:db:1")
                    await monitor.remove_fdset(fdset)
                    return fdset

        assert asyncio.run(hand_over()) == 7
        assert server.inodes == [file.stat().st_ino for file in files]
        assert server.received == [
            {"execute": "add-fd", "arguments": {"opaque": "vmfleet:db:1"}},
            {"execute": "add-fd", "arguments": {"opaque": "vmfleet:db:1", "fdset-id": 7}},
            {"execute": "remove-fd", "arguments": {"fdset-id": 7}},
        ]

    def test_first_file_of_a_set_is_taken_back_where_the_next_is_refused(
        self, path: str, serve: Callable[..., Server], tmp_path: Path
    ) -> None:
        """A security module may let QEMU have the one that is open to read only."""
        refused = {"error": {"class": "GenericError", "desc": "No file descriptor supplied via SCM_RIGHTS"}}

        def answer(_command: str, arguments: dict[str, Any]) -> dict[str, Any]:
            return (
                refused if "opaque" in arguments and "fdset-id" in arguments else {"return": {"fdset-id": 7, "fd": 20}}
            )

        server = serve(answer)

        async def hand_over() -> None:
            with (tmp_path / "a").open("wb") as file:
                async with Monitor(parse_address(path)) as monitor:
                    await monitor.add_fdset([file.fileno(), file.fileno()], "vmfleet:db:1")

        with pytest.raises(CommandError, match="SCM_RIGHTS"):
            asyncio.run(hand_over())
        assert server.received[-1] == {"execute": "remove-fd", "arguments": {"fdset-id": 7}}

    @pytest.mark.parametrize("noticed", [True, False])
    def test_connection_breaks_off_before_a_file_is_sent(
        self, noticed: bool, path: str, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        serve()

        def break_off(_client: Any, _fd: int) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

        async def hand_over() -> None:
            async with Monitor(parse_address(path)) as monitor:
                if noticed:
                    with pytest.raises(MonitorGone):
                        await monitor.execute("quit")
                else:
                    monkeypatch.setattr(QMPClient, "send_fd_scm", break_off)
                with pytest.raises(MonitorGone, match="the connection broke off during add-fd: QEMU has ended"):
                    await monitor.add_fdset([0], "vmfleet:db:1")

        asyncio.run(hand_over())

    def test_messages_are_not_formatted_for_a_log(
        self, path: str, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_message: object) -> str:
            raise AssertionError("formatted")

        serve(lambda _command, _arguments: {"return": 1})
        monkeypatch.setattr(Message, "__str__", refuse)
        assert converse(path, "query-target")[1] == [1]

    def test_set_without_files_is_a_mistake(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            asyncio.run(Monitor(Address(path="/run/web01.qmp")).add_fdset([], "x"))
