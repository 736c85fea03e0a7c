# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Monitors that give the answers of a real QEMU, except for one that is odd, and a table of such answers.

They stand in for what no real QEMU says: it takes a broken or a hostile one.
"""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
import time
import typing as t
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

VERSIONS = ("7.2", "11.1")
DATA = Path(__file__).parents[1] / "data" / "qmp"
TOO_LONG = 11 << 20
"""Bytes of a line that the library does not read."""

Reply = dict[str, t.Any]
Lie = t.Callable[[Reply], "Reply | bytes | t.Iterator[bytes] | None"]
"""Takes the honest message, and returns what is said in its place; None hangs up, and no bytes are silence."""


@cache
def _read(version: str) -> str:
    return (DATA / f"{version}.json").read_text()


def recorded(version: str) -> dict[str, t.Any]:
    """The answers of a version, by command and arguments."""
    answers: dict[str, t.Any] = json.loads(_read(version))
    return answers


@dataclass(frozen=True)
class Odd:
    """A lie about each answer to `command`; `greeting` is one too. `served` says that it is harmless."""

    command: str
    lie: Lie
    version: str = "7.2"
    served: bool = False
    slow: bool = False
    """Whether only a time-out shows it."""


class Liar:
    """A monitor at `path` that tells the lie, unless it is to be honest for now. A process, as each QEMU is one."""

    def __init__(self, path: Path, odd: Odd | None = None, name: str = "", honest: bool = False) -> None:
        self.path = path
        self._odd = odd
        self._answers = recorded(odd.version if odd else VERSIONS[0])
        if name:
            # What a VM is known by.
            self._answers["query-name {}"] = {"name": name}
            self._answers["query-uuid {}"] = {"UUID": "00000000-0000-0000-0000-000000000000"}
            # One that is busy is not backed up.
            self._answers.update({"query-block-jobs {}": [], "query-jobs {}": []})
        context = get_context("fork")
        self._honest = context.Event()
        if honest:
            self._honest.set()
        self._listens = context.Event()
        self._process = context.Process(target=self._serve, daemon=True)

    def lie(self) -> None:
        """Be honest no more."""
        self._honest.clear()

    def __enter__(self) -> Liar:
        self._process.start()
        assert self._listens.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.join()

    def _serve(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen(16)
            self._listens.set()
            while True:
                client, _address = listener.accept()
                threading.Thread(target=self._converse, args=(client,), daemon=True).start()

    def _converse(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if not self._say(client, "greeting", self._answers["greeting"]):
                return
            text = ""
            while True:
                data, fds, _flags, _address = socket.recv_fds(client, 65536, 4)
                for fd in fds:
                    socket.close(fd)
                if not data:
                    return
                text = (text + data.decode()).lstrip()
                with contextlib.suppress(json.JSONDecodeError):
                    while text:
                        request, end = json.JSONDecoder().raw_decode(text)
                        text = text[end:].lstrip()
                        if not self._answer(client, request):
                            return

    def _answer(self, client: socket.socket, request: Reply) -> bool:
        command, arguments = request["execute"], request.get("arguments", {})
        key = f"{command} {json.dumps(arguments, sort_keys=True)}"
        reply: Reply = {"return": copy.deepcopy(self._answers.get(key, {}))}
        if command == "add-fd":
            reply = {"return": {"fdset-id": 1, "fd": 9}}
        elif key not in self._answers and command.startswith(("query-", "qom-")):
            reply = {"error": {"class": "GenericError", "desc": f"nobody has recorded {key}"}}
        if "id" in request:
            reply["id"] = request["id"]
        return self._say(client, command, reply)

    def _say(self, client: socket.socket, command: str, reply: Reply) -> bool:
        said: t.Any = reply
        if self._odd and self._odd.command == command and not self._honest.is_set():
            said = self._odd.lie(copy.deepcopy(reply))
        if said is None:
            return False
        if isinstance(said, dict):
            said = json.dumps(said).encode() + b"\n"
        for piece in [said] if isinstance(said, bytes) else said:
            client.sendall(piece)
        return True


def put(value: t.Any, *path: str | int) -> Lie:
    """A lie: this value at a place of the answer."""

    def lie(reply: Reply) -> Reply:
        place: t.Any = reply
        steps = ("return", *path)
        for step in steps[:-1]:
            place = place[step]
        place[steps[-1]] = value
        return reply

    return lie


def take(*path: str | int) -> Lie:
    """A lie: a member of the answer is missing."""

    def lie(reply: Reply) -> Reply:
        place = reply["return"]
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]
        return reply

    return lie


def say(text: bytes) -> Lie:
    """A lie: these bytes, with ID for the question's own."""
    return lambda reply: text.replace(b"ID", json.dumps(reply.get("id")).encode())


def nothing(_reply: Reply) -> None:
    """Hang up."""


def nested(depth: int) -> Lie:
    """A lie: lists within lists."""
    return say(b'{"return": ' + b"[" * depth + b"]" * depth + b', "id": ID}\n')


def flood(reply: Reply) -> t.Iterator[bytes]:
    """Events without an end."""
    del reply
    event = b'{"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}}\n' * 100
    while True:
        yield event


def drip(reply: Reply) -> t.Iterator[bytes]:
    """The answer, byte by byte, too slowly to ever come."""
    for byte in json.dumps(reply).encode():
        yield bytes((byte,))
        time.sleep(1)


def half(reply: Reply) -> t.Iterator[bytes]:
    """Half of the answer, and no more."""
    text = json.dumps(reply).encode()
    yield text[: len(text) // 2]


def cut_off(reply: Reply) -> t.Iterator[bytes]:
    """Half of the answer, and then the end."""
    yield from half(reply)
    raise ConnectionError


def nodes(change: t.Callable[[list[dict[str, t.Any]]], list[dict[str, t.Any]]]) -> Lie:
    """A lie about the block graph."""

    def lie(reply: Reply) -> Reply:
        reply["return"] = change(reply["return"])
        return reply

    return lie


def _chain(found: list[dict[str, t.Any]], length: int, **others: t.Any) -> list[dict[str, t.Any]]:
    """Nodes that build on each other."""
    first = found[0]
    return [
        *found,
        *(
            {
                **first,
                "node-name": f"x{number}",
                "image": {**first["image"], "filename": f"/x{number}"},
                "backing_file": f"/x{number + 1}",
                "children": [{"child": "backing", "node-name": f"x{number + 1}"}],
                **others,
            }
            for number in range(length)
        ),
    ]


def _circle(kind: str, driver: str) -> t.Callable[[list[dict[str, t.Any]]], list[dict[str, t.Any]]]:
    """Three nodes, each of which builds on the next."""

    def change(found: list[dict[str, t.Any]]) -> list[dict[str, t.Any]]:
        first = found[0]
        return [
            *found,
            *(
                {
                    **first,
                    "node-name": f"x{number}",
                    "drv": driver,
                    "children": [{"child": kind, "node-name": f"x{(number + 1) % 3}"}],
                }
                for number in range(3)
            ),
        ]

    return change


NODES = "query-named-block-nodes"
QOM_GET = "qom-get"
ODD: dict[str, Odd] = {
    # The name, the state
    "no object": Odd("query-name", put([])),
    "nothing at all": Odd("query-name", put(None)),
    "name is null": Odd("query-name", put(None, "name")),
    "name is a number": Odd("query-name", put(7, "name")),
    "name is a list": Odd("query-name", put(["web01"], "name")),
    "name is an object": Odd("query-name", put({"name": "web01"}, "name")),
    "name is half a character": Odd("query-name", put("web\ud800", "name")),
    "name with a zero": Odd("query-name", put("web\0", "name")),
    "name of control characters": Odd("query-name", put("a\x1b[2J\u202e\n\tb", "name"), served=True),
    "no name": Odd("query-name", put({}), served=True),
    "no uuid": Odd("query-uuid", put({})),
    "uuid is null": Odd("query-uuid", put(None, "UUID")),
    "no status": Odd("query-status", take("status")),
    "status is a list": Odd("query-status", put(["running"], "status")),
    "running is a text": Odd("query-status", put("yes", "running")),
    # Disks
    "devices are null": Odd("query-block", put(None)),
    "devices are an object": Odd("query-block", put({"device": "drive0"})),
    "device is a number": Odd("query-block", put(7, 0)),
    "medium is a list": Odd("query-block", put([], 0, "inserted")),
    "medium is null": Odd("query-block", put(None, 0, "inserted")),
    "medium without a node": Odd("query-block", put({}, 0, "inserted")),
    "medium of a node that is not there": Odd("query-block", put("gone", 0, "inserted", "node-name"), served=True),
    "removable is null": Odd("query-block", put(None, 0, "removable")),
    "device's id is a number": Odd("query-block", put(1, 0, "qdev")),
    "no backend's name": Odd("query-block", take(0, "device")),
    "nodes are null": Odd(NODES, put(None)),
    "nodes are a text": Odd(NODES, put("nodes")),
    "no nodes": Odd(NODES, put([]), served=True),
    "node without an image": Odd(NODES, take(0, "image")),
    "image is a text": Odd(NODES, put("/images/x", 0, "image")),
    "node's name is a list": Odd(NODES, put([], 0, "node-name")),
    "size beyond 64 bits": Odd(NODES, put(1 << 70, 0, "image", "virtual-size")),
    "size below zero": Odd(NODES, put(-1, 0, "image", "virtual-size")),
    "size is a fraction": Odd(NODES, put(1.5, 0, "image", "virtual-size")),
    "size is true": Odd(NODES, put(True, 0, "image", "virtual-size")),
    "size is a text": Odd(NODES, put("67108864", 0, "image", "virtual-size")),
    "size is no number": Odd(NODES, put(float("nan"), 0, "image", "virtual-size")),
    "size is endless": Odd(NODES, put(float("inf"), 0, "image", "virtual-size")),
    "allocation is null": Odd(NODES, put(None, 0, "image", "actual-size")),
    "file name is a number": Odd(NODES, put(3, 0, "image", "filename")),
    "backing file is an object": Odd(NODES, put({}, 0, "image", "full-backing-filename")),
    "snapshots are a number": Odd(NODES, put(2, 0, "image", "snapshots")),
    "details are a list": Odd(NODES, put([], 0, "image", "format-specific")),
    "version of the format is a number": Odd(NODES, put({"data": {"compat": 1.1}}, 0, "image", "format-specific")),
    "driver is a number": Odd(NODES, put(7, 0, "drv")),
    "file is null": Odd(NODES, put(None, 0, "file")),
    "read-only is a text": Odd(NODES, put("no", 0, "ro")),
    "bitmaps are an object": Odd(NODES, put({}, 0, "dirty-bitmaps")),
    "bitmap is null": Odd(NODES, put([None], 0, "dirty-bitmaps")),
    "bitmap without a size": Odd(NODES, put([{"name": "b"}], 0, "dirty-bitmaps")),
    "children are null": Odd(NODES, put(None, 0, "children"), "11.1"),
    "no children": Odd(NODES, take(0, "children"), "11.1"),
    "child without a node": Odd(NODES, put([{"child": "file"}], 0, "children"), "11.1"),
    "files in a circle": Odd(NODES, nodes(_circle("file", "qcow2")), "11.1"),
    "filters in a circle": Odd(NODES, nodes(_circle("file", "throttle")), "11.1"),
    "layers in a circle": Odd(NODES, nodes(_circle("backing", "qcow2")), "11.1", served=True),
    "each node twice": Odd(NODES, nodes(lambda found: found * 2), "11.1", served=True),
    "very many layers": Odd(NODES, nodes(lambda found: _chain(found, 4000)), "11.1"),
    "very many layers, an older QEMU": Odd(NODES, nodes(lambda found: _chain(found, 4000))),
    "very many disks": Odd(NODES, nodes(lambda found: _chain(found, 4000, children=[])), "11.1"),
    "very many nodes of one file": Odd(
        NODES, nodes(lambda found: _chain(found, 4000, image=found[0]["image"], backing_file=found[0]["file"]))
    ),
    "statistics are null": Odd("query-blockstats", put(None)),
    "parent is a list": Odd("query-blockstats", put([], 0, "parent")),
    # Jobs
    "jobs are null": Odd("query-block-jobs", put(None)),
    "job is a list": Odd("query-block-jobs", put([[]])),
    "offset below zero": Odd("query-block-jobs", put(-1, 0, "offset")),
    "speed is a fraction": Odd("query-block-jobs", put(0.5, 0, "speed")),
    "length is a text": Odd("query-block-jobs", put("0", 0, "len")),
    "length beyond 64 bits": Odd("query-block-jobs", put(1 << 64, 0, "len")),
    "job's state is null": Odd("query-block-jobs", put(None, 0, "io-status")),
    "job's error is an object": Odd("query-block-jobs", put({}, 0, "error")),
    "job without an id": Odd("query-jobs", put([{"status": "running"}])),
    "job's id is a list": Odd("query-jobs", put([{"id": [], "status": "running", "type": "backup"}])),
    # Files that were handed over, and the device tree
    "fdset without files": Odd("query-fdsets", put([{"fdset-id": 1, "fds": None}])),
    "fdset's id is a text": Odd("query-fdsets", put([{"fdset-id": "1", "fds": []}])),
    "tag is a number": Odd("query-fdsets", put([{"fdset-id": 1, "fds": [{"opaque": 1}]}])),
    "devices' names are an object": Odd("qom-list", put({})),
    "device's type is null": Odd("qom-list", put(None, 0, "type")),
    "property is a number": Odd(QOM_GET, put(7)),
    "property is a list": Odd(QOM_GET, put([])),
    "channels are null": Odd("query-chardev", put(None)),
    "channel's name is a list": Odd("query-chardev", put([], 0, "label")),
    "channel's file is null": Odd("query-chardev", put(None, 0, "filename")),
    "nobody knows who is connected": Odd("query-chardev", take(0, "frontend-open")),
    # What is no answer
    "too long": Odd("query-status", say(b'{"return": "' + b"x" * TOO_LONG + b'", "id": ID}\n')),
    "too deep": Odd("query-status", nested(100_000)),
    "a number of many digits": Odd("query-status", say(b'{"return": ' + b"9" * 5000 + b', "id": ID}\n')),
    "no JSON": Odd("query-status", say(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    "no UTF-8": Odd("query-status", say(b'{"return": "\xff\xfe", "id": ID}\n')),
    "a list": Odd("query-status", say(b"[]\n")),
    "another's id": Odd("query-status", say(b'{"return": {}, "id": "other"}\n')),
    "id is a list": Odd("query-status", say(b'{"return": {}, "id": ["other"]}\n')),
    "no id": Odd("query-status", say(b'{"return": {}}\n')),
    "answer and error": Odd(
        "query-status", say(b'{"return": {}, "error": {"class": "GenericError", "desc": "x"}, "id": ID}\n')
    ),
    "neither answer nor error": Odd("query-status", say(b'{"id": ID}\n')),
    "error is a text": Odd("query-status", say(b'{"error": "no", "id": ID}\n')),
    "error of no class": Odd("query-status", say(b'{"error": {"desc": "no"}, "id": ID}\n')),
    "error of an unknown class": Odd("query-status", say(b'{"error": {"class": "Odd", "desc": "no"}, "id": ID}\n')),
    "an event without a name": Odd("query-status", say(b'{"event": null, "id": ID}\n'), slow=True),
    "hangs up": Odd("query-status", nothing),
    "hangs up in mid-answer": Odd(NODES, cut_off),
    # Greetings
    "no greeting, the end": Odd("greeting", nothing),
    "half a greeting, the end": Odd("greeting", cut_off),
    "greeting is a list": Odd("greeting", say(b"[]\n")),
    "greeting is null": Odd("greeting", say(b'{"QMP": null}\n')),
    "version is a text": Odd("greeting", say(b'{"QMP": {"version": "7.2", "capabilities": []}}\n')),
    "version of null": Odd("greeting", say(b'{"QMP": {"version": {"qemu": null}, "capabilities": []}}\n')),
    "version below zero": Odd(
        "greeting",
        say(b'{"QMP": {"version": {"qemu": {"major": -7, "minor": 2, "micro": 0}}, "capabilities": []}}\n'),
    ),
    "capabilities are a number": Odd("greeting", say(b'{"QMP": {"version": {}, "capabilities": 7}}\n')),
    "capabilities are refused": Odd("qmp_capabilities", say(b'{"error": {"class": "GenericError", "desc": "no"}}\n')),
    "capabilities are answered oddly": Odd("qmp_capabilities", say(b'{"QMP": {}, "return": 7}\n')),
    # Silence
    "no greeting": Odd("greeting", say(b""), slow=True),
    "half a greeting": Odd("greeting", half, slow=True),
    "no answer": Odd("query-status", say(b""), slow=True),
    "half an answer": Odd(NODES, half, slow=True),
    "byte by byte": Odd("query-status", drip, slow=True),
    "events in place of an answer": Odd("query-status", flood, slow=True),
    "events in place of a greeting": Odd("greeting", flood, slow=True),
}
"""Odd answers by what is odd about them."""
