# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A synchronous QMP client: the modules' word is checked with something that shares no code with them."""

from __future__ import annotations

import json
import socket
import typing as t

if t.TYPE_CHECKING:
    from pathlib import Path


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """One connection to a monitor; events that arrive meanwhile are kept in `events`."""

    def __init__(self, path: Path, timeout: float = 30) -> None:
        self.events: list[dict[str, t.Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        # A client that comes while QEMU starts is not always greeted: it has to try again.
        self._socket.settimeout(min(timeout, 5))
        try:
            self._socket.connect(str(path))
            # For reading only: a stream for both forgets with each write what it has read ahead.
            self._stream = self._socket.makefile("r", encoding="utf-8")
            self.greeting = self._receive()
            self.execute("qmp_capabilities")
            self._socket.settimeout(timeout)
        except BaseException:
            self._socket.close()
            raise

    def _receive(self) -> dict[str, t.Any]:
        line = self._stream.readline()
        if not line:
            raise ConnectionError("QEMU closed the monitor")
        message: dict[str, t.Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: t.Any) -> t.Any:
        """Send one command (underscores in the names of arguments stand for dashes) and return its result."""
        renamed = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": renamed}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            reply = self._receive()
            if "QMP" in reply:
                # A client that comes while QEMU starts can be greeted twice.
                continue
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise QmpError(reply["error"]["desc"])
            else:
                return reply["return"]

    def wait_for(self, event: str, timeout: float = 30) -> dict[str, t.Any]:
        """Wait for an event, or take the first of its kind that has come already; `timeout` is for each message."""
        self._socket.settimeout(timeout)
        while True:
            for number, kept in enumerate(self.events):
                if kept["event"] == event:
                    return self.events.pop(number)
            self.events.append(self._receive())

    def pass_file(self, path: Path, opaque: str) -> None:
        """Hand an open file to QEMU, as an fdset of its own."""
        with path.open("rb") as file:
            message = json.dumps({"execute": "add-fd", "arguments": {"opaque": opaque}})
            socket.send_fds(self._socket, [message.encode()], [file.fileno()])
            while "return" not in self._receive():
                pass

    def close(self) -> None:
        """Let go of the monitor, so that another client is greeted."""
        self._stream.close()
        self._socket.close()
