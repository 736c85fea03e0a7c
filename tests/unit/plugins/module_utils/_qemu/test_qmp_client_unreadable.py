# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Conversations with servers whose answers cannot be read: each ends with an error of that monitor, told plainly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from qemu.qmp import QMPClient

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import MonitorError, MonitorGone
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.tests.unit.plugins.module_utils._qemu.test_monitor import Server, no_answer

VERSION = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}
GREETING = {"QMP": {"version": VERSION, "capabilities": []}}

TOO_LONG = b'{"return": "' + b"x" * (11 << 20) + b'"}\n'
LEFT_OFF = None
"""Instead of an answer: the server hangs up."""


class RawServer(Server):
    """A QMP server that gives to each question the next of C(answers), as it stands; C(%s) becomes the question's id.

    An answer may be several lines. Without one, the server says nothing.
    """

    def __init__(self, path: str, answers: list[bytes | None], greeting: bytes) -> None:
        self._answers = answers
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        super().__init__(listener, no_answer, greeting)

    def _converse(self, client: socket.socket) -> None:
        text = ""
        while data := client.recv(65536):
            # A blank carries each file descriptor.
            text = (text + data.decode()).lstrip()
            while text:
                request, end = json.JSONDecoder().raw_decode(text)
                text = text[end:]
                if request["execute"] == "qmp_capabilities":
                    client.sendall(b'{"return": {}}\n')
                    continue
                answer = self._answers.pop(0) if self._answers else b""
                if answer is None:
                    return
                client.sendall(answer.replace(b"%s", json.dumps(request["id"]).encode()))


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Begins to serve, and returns the monitor's address."""
    with contextlib.ExitStack() as stack:

        def begin(*answers: bytes | None, greeting: Any = None) -> str:
            # A socket's path has 107 bytes only.
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmfleet-"))
            path = f"{directory}/web01.qmp"
            said = greeting if isinstance(greeting, bytes) else json.dumps(greeting or GREETING).encode() + b"\n"
            stack.callback(RawServer(path, list(answers), said).close)
            return f"unix:{path}"

        yield begin


def good(value: Any = 1) -> bytes:
    return b'{"return": %s, "id": %%s}\n' % json.dumps(value).encode()


def ask(address: str, *commands: str) -> list[Any]:
    """Ask one question after the other."""

    async def run() -> list[Any]:
        async with Monitor(parse_address(address)) as monitor:
            return [await monitor.execute(command) for command in commands]

    return asyncio.run(run())


def refused(address: str, *commands: str) -> str:
    """What is told of questions whose answers cannot be read."""
    with pytest.raises(MonitorError) as error:
        ask(address, *commands)
    assert error.type is MonitorError
    text = str(error.value)
    assert text.startswith(f"{address}: ")
    assert "\n" not in text
    assert len(text) < 500
    return text[len(address) + 2 :]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (TOO_LONG, "is longer than qemu.qmp can read (10 MiB), because its disks have too many layers most often"),
        (b"HTTP/1.1 200 OK\r\n", "cannot be read: Failed to deserialize QMP message. raw bytes were: b'HTTP/1.1"),
        (b'{"return": "\xff\xfe", "id": %s}\n', "cannot be read: UnicodeDecodeError: 'utf-8' codec can't decode byte"),
        (b"[" * 300_000 + b"\n", "cannot be read: RecursionError: "),
        (b"[1]\n", "cannot be read: QMP message is not a JSON object. json value was: [ 1 ]"),
        (b'{"return": 1}\n', 'cannot be read: it does not say which question it answers: {"return": 1}'),
        (
            b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}\n',
            'cannot be read: it does not say which question it answers: {"error": {"class": "GenericError", ',
        ),
        (b'{"return": 1, "id": ["not", "ours"]}\n', "cannot be read: it answers a question that nobody has"),
    ],
    ids=["too long", "no json", "no utf-8", "deep", "no object", "no id", "error without id", "strange id"],
)
@pytest.mark.parametrize("before", [0, 2])
def test_the_question_is_named(serve: Serve, answer: bytes, reason: str, before: int) -> None:
    commands = ["query-version", "query-target", "query-mice", "query-iothreads"]
    told = refused(serve(*[good()] * before, answer), *commands[: before + 2])
    assert told.startswith(f"the answer to {commands[before]} {reason}")


def test_the_question_is_named_among_many_at_once(serve: Serve) -> None:
    address = serve(good(), good(), TOO_LONG)
    commands = ["query-version", "query-balloon", "query-migrate", "query-iothreads", "query-rocker"]

    async def run() -> list[Any]:
        async with Monitor(parse_address(address)) as monitor:
            asked = [asyncio.ensure_future(monitor.execute(command)) for command in commands]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            with pytest.raises(MonitorError, match="the answer to query-migrate is longer"):
                await monitor.execute("query-target")
            return answers

    answers = asyncio.run(run())
    assert answers[:2] == [1, 1]
    assert [type(answer) for answer in answers[2:]] == [MonitorError] * 3
    assert {str(answer) for answer in answers[2:]} == {str(answers[2])}
    assert "the answer to query-migrate is longer" in str(answers[2])


@pytest.mark.parametrize(
    "answer", [b'{"error": {"class": 1, "desc": 2}, "id": %s}\n', b'{"id": %s}\n'], ids=["error", "nothing"]
)
def test_an_answer_that_makes_no_sense_ends_only_its_question(serve: Serve, answer: bytes) -> None:
    address = serve(answer, good(2))

    async def run() -> Any:
        async with Monitor(parse_address(address)) as monitor:
            with pytest.raises(MonitorError, match="the answer to query-mice makes no sense: QMP"):
                await monitor.execute("query-mice")
            return await monitor.execute("query-target")

    assert asyncio.run(run()) == 2


def test_what_was_sent_unasked_is_told_at_the_end(serve: Serve) -> None:
    """The answers are there, but somebody has to know."""
    told = refused(serve(good() + b"nonsense\n"), "query-target")
    assert told.startswith("what QEMU sent unasked cannot be read: Failed to deserialize")


def test_an_error_of_the_caller_comes_before_what_cannot_be_read(serve: Serve) -> None:
    address = serve(good() + b"nonsense\n")

    async def run() -> None:
        async with Monitor(parse_address(address)) as monitor:
            await monitor.execute("query-target")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(run())


def test_a_server_that_goes_after_the_last_answer_is_no_error(serve: Serve) -> None:
    address = serve(good(), LEFT_OFF)

    async def run() -> Any:
        async with Monitor(parse_address(address)) as monitor:
            answer = await monitor.execute("query-target")
            with pytest.raises(MonitorGone, match="the connection broke off during query-mice: QEMU has ended"):
                await monitor.execute("query-mice")
            return answer

    assert asyncio.run(run()) == 1


EVENT = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 1}}\n'


def test_events_are_no_answers(serve: Serve) -> None:
    assert ask(serve(EVENT + good() + EVENT, good(2)), "query-target", "query-target") == [1, 2]


def test_two_greetings(serve: Serve) -> None:
    greeting = json.dumps(GREETING).encode() + b"\n"
    assert ask(serve(good(), greeting=greeting * 2), "query-target") == [1]
    assert ask(serve(greeting + good()), "query-target") == [1]


@pytest.mark.parametrize("before", [2, 0])
@pytest.mark.parametrize("after", [2, 0])
def test_events_before_the_conversation_has_begun(serve: Serve, before: int, after: int) -> None:
    """QEMU sends them there now and then, and it is the same QEMU, on the same connection."""
    greeting = EVENT * before + json.dumps(GREETING).encode() + b"\n" + EVENT * after
    assert ask(serve(good(), good(2), greeting=greeting), "query-target", "query-target") == [1, 2]


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b'{"QMP": ' + b"[" * 300_000 + b"\n", "RecursionError"),
        (b'{"QMP": "\xff"}\n', "UnicodeDecodeError"),
        (b"x" * (11 << 20), "ValueError"),
        (b"x" * 1000 + b"\n", "Did not understand Greeting: Failed to deserialize QMP message. raw bytes were"),
    ],
    ids=["deep", "no utf-8", "too long", "long"],
)
def test_what_greets_is_no_monitor(serve: Serve, greeting: bytes, reason: str) -> None:
    told = refused(serve(greeting=greeting), "query-target")
    assert told.startswith(f"what answers there is not a QMP monitor ({reason}")
    assert told.endswith("; name the socket of -qmp mode=control")


@pytest.mark.parametrize("version", [{}, {"qemu": {"major": 7}}, {"qemu": {"major": "a", "minor": 1, "micro": 1}}])
def test_a_greeting_without_a_version(serve: Serve, version: dict[str, Any]) -> None:
    address = serve(greeting={"QMP": {"version": version, "capabilities": []}})

    async def run() -> str:
        async with Monitor(parse_address(address)) as monitor:
            return monitor.version

    with pytest.raises(MonitorError, match="not a QMP monitor \\(its greeting has no version of QEMU\\)"):
        asyncio.run(run())


def hand_over(address: str) -> MonitorError:
    """What is told of a file that cannot be handed over."""

    async def run() -> MonitorError:
        async with Monitor(parse_address(address)) as monitor:
            with pytest.raises(MonitorError) as error:
                await monitor.add_fdset([0], "vmfleet:db:1")
            return error.value

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "fdset-id is missing"),
        ([], "it is no object"),
        ({"fdset-id": None}, "fdset-id is no size or number"),
        ({"fdset-id": True}, "fdset-id is no size or number"),
    ],
)
def test_no_fdset(serve: Serve, value: Any, reason: str) -> None:
    assert str(hand_over(serve(good(value)))).endswith(f": the answer to add-fd makes no sense: {reason}")


def test_a_file_that_cannot_be_sent_is_not_called_a_qemu_gone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_client: Any, _fd: int) -> None:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    monkeypatch.setattr(QMPClient, "send_fd_scm", refuse)
    error = hand_over(serve())
    assert not isinstance(error, MonitorGone)
    assert str(error).endswith("cannot hand an open file to QEMU: Too many references: cannot splice")


def test_no_more_open_files(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    def refuse(*_args: Any) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    address = serve()

    async def run() -> None:
        monkeypatch.setattr("socket.socket", refuse)
        async with Monitor(parse_address(address)):
            pass

    with pytest.raises(MonitorError, match="cannot connect: Too many open files"):
        asyncio.run(run())


def test_a_name_that_no_host_can_have() -> None:
    assert "cannot connect: " in refused(f"tcp:{'x' * 70}.example.org:4444", "query-target")
