# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A guest agent from a script, which really listens."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = ("guest-sync", "guest-info", "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw")
WHILE_FROZEN = ("guest-sync", "guest-info", "guest-fsfreeze-status", "guest-fsfreeze-thaw")
FILE_SYSTEMS = 2


class HangUp(Exception):
    """The channel is closed instead of an answer."""


class ScriptedAgent:
    """An agent behind its channel in QEMU: one client at a time, one command after the other, whoever has sent it.

    What a command does otherwise is in C(script): a list of functions, each for one time, that return the whole
    answer (as bytes, if it is not to be JSON), or None for none. C(commands) lists what the agent was asked, C(clients)
    the processes that did, C(stale) is what the next client gets to hear first.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.frozen = False
        self.script: dict[str, list[Any]] = {}
        self.commands: list[str] = []
        self.clients: list[int] = []
        self.stale = b""
        self._half = b""
        self.connection: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> ScriptedAgent:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End, as with QEMU."""
        with contextlib.suppress(OSError):
            # Only this wakes one who waits in accept(). The second time, there is nothing to shut.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def idle(self) -> bool:
        """Whether no client is left."""
        return self.connection is None

    @property
    def unread(self) -> bytes:
        """What the client has sent and the agent not come to yet."""
        assert self.connection
        try:
            return self.connection.recv(65536, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def _serve(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connection = connection
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            self.clients.append(struct.unpack("3i", credentials)[0])
            # A client may go without having read everything.
            with connection, contextlib.suppress(HangUp, ConnectionError):
                self._talk(connection)
            self.connection = None

    def _talk(self, connection: socket.socket) -> None:
        self._say(connection, self.stale)
        for line in connection.makefile("rb"):
            said, self._half = self._half + line, b""
            if not said.endswith(b"\n"):
                self._half = said
                return
            broken, reset, command = said.rpartition(b"\xff")
            if reset:
                # The agent's parser begins anew, and takes that for an error, whatever was said before.
                self._say(
                    connection, _line({"error": {"class": "GenericError", "desc": f"JSON parse error {broken!r}"}})
                )
            request = json.loads(command)
            self.commands.append(request["execute"])
            answer = self._answer(request)
            if answer is not None:
                self._say(connection, _line(answer))

    def _say(self, connection: socket.socket, words: bytes) -> None:
        self.stale = b""
        try:
            connection.sendall(words)
        except OSError:
            self.stale = words

    def _answer(self, request: dict[str, Any]) -> Any:
        command = request["execute"]
        if self.script.get(command):
            return self.script[command].pop(0)(self)
        if self.frozen and command not in WHILE_FROZEN:
            return refusal("the agent is in frozen state")(self)
        if command == "guest-sync":
            return {"return": request["arguments"]["id"]}
        return {"return": getattr(self, command.rpartition("-")[2])()}

    def info(self) -> dict[str, Any]:
        """guest-info."""
        commands = [{"name": name, "enabled": not self.frozen or name in WHILE_FROZEN} for name in COMMANDS]
        return {"version": "7.2.22", "supported_commands": commands}

    def status(self) -> str:
        """guest-fsfreeze-status."""
        return "frozen" if self.frozen else "thawed"

    def freeze(self) -> int:
        """guest-fsfreeze-freeze."""
        self.frozen = True
        return FILE_SYSTEMS

    def thaw(self) -> int:
        """guest-fsfreeze-thaw."""
        count = FILE_SYSTEMS if self.frozen else 0
        self.frozen = False
        return count


def _line(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n"


def says(answer: Any) -> Any:
    """A command that does nothing and is answered so."""
    return lambda _agent: answer


def refusal(reason: str) -> Any:
    """A command that is refused."""
    return says({"error": {"class": "GenericError", "desc": reason}})


def silence(_agent: ScriptedAgent) -> None:
    """A command that does nothing and is not answered."""


def hang_up(_agent: ScriptedAgent) -> None:
    """A command that does nothing and breaks the connection."""
    raise HangUp


def mute_freeze(agent: ScriptedAgent) -> None:
    """A freeze that is not answered."""
    agent.freeze()
