# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Talk to the guest agent of a VM, at its socket.

Reference: QEMU 7.2, docs/interop/qemu-ga.rst and qga/qapi-schema.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

from .._common.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Any

    Wait = Callable[["socket.socket | None", float], Awaitable[bool]]


ANSWER_TIMEOUT = 5.0
"""Seconds for what an agent answers at once; whether one is there at all shows in no other way."""
FREEZE_TIMEOUT = 10.0
"""Seconds for freezing: the guest writes out first what it has in memory."""
THAW_TIMEOUT = 10.0
ANSWER_LIMIT = 1 << 20
"""Bytes of one answer. The longest, to guest-info, has some thousands."""
MOST_FILE_SYSTEMS = 1 << 20
REASON_LIMIT = 500
"""Characters of the agent's own words in a message."""
RETRY_INTERVAL = 0.05
"""Seconds between attempts to enter a full backlog."""


class AgentRefusal(AgentError):
    """The agent has answered, but not done what it was asked for."""


class AgentGone(AgentError):
    """Nobody serves the agent's socket: the VM is off."""


async def wait_in_loop(connection: socket.socket | None, seconds: float) -> bool:
    """Wait so many seconds for something to read, or for the end; return whether it came. No connection: just wait."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[bool] = loop.create_future()

    def settle(value: bool) -> None:
        if not readable.done():
            readable.set_result(value)

    # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that meets with what it waits for.
    timer = loop.call_later(seconds, settle, False)
    if connection:
        loop.add_reader(connection, settle, True)
    try:
        return await readable
    finally:
        timer.cancel()
        if connection:
            loop.remove_reader(connection)


async def wait_alone(connection: socket.socket | None, seconds: float) -> bool:
    """Wait as wait_in_loop() does, in a process without an event loop, which blocks."""
    poll = select.poll()
    if connection:
        poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class GuestAgent:
    """What is said to a guest agent, and understood of it, however it is reached. An async context manager.

    C(place) is where it is. An agent serves one client at a time: hold it briefly.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    async def __aenter__(self) -> GuestAgent:
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation: the agent is free for its next client."""
        raise NotImplementedError

    async def _ask(self, command: str, timeout: float) -> Any:
        """Say a command and return what comes back; AgentRefusal where the agent has answered that it will not."""
        raise NotImplementedError

    async def require_freezable(self) -> None:
        """Raise AgentError where freezing, or the thawing that has to follow, is not to be had."""
        if await self.frozen():
            raise AgentError(
                f"{self.place}: another program has frozen the guest's file systems, and they stay frozen. If no other"
                " backup runs, thaw them (guest-fsfreeze-thaw)"
            )
        info = await self._ask("guest-info", ANSWER_TIMEOUT)
        try:
            enabled = {entry["name"] for entry in info["supported_commands"] if entry["enabled"]}
        except (KeyError, TypeError):
            raise self._nonsense("guest-info") from None
        missing = {"guest-fsfreeze-freeze", "guest-fsfreeze-thaw"} - enabled
        if missing:
            raise AgentError(
                f"{self.place}: the guest agent does not offer {' and '.join(sorted(missing))}: allow it in the agent's"
                " configuration, or back this VM up without freezing"
            )

    async def frozen(self) -> bool:
        """Return whether file systems were frozen through the agent, by whomever. It does not know of fsfreeze(8)."""
        status = await self._ask("guest-fsfreeze-status", ANSWER_TIMEOUT)
        if status not in ("frozen", "thawed"):
            raise self._nonsense("guest-fsfreeze-status")
        return bool(status == "frozen")

    async def freeze(self) -> int:
        """Freeze all file systems and return their number, which is never 0."""
        count = await self._count("guest-fsfreeze-freeze", FREEZE_TIMEOUT)
        if not count:
            raise AgentRefusal(f"{self.place}: the guest agent found no file system that can be frozen")
        return count

    async def thaw(self) -> int:
        """Thaw all file systems and return how many were frozen.

        The answer to a freeze may still be owed: an agent works through its commands one by one.
        """
        return await self._count("guest-fsfreeze-thaw", THAW_TIMEOUT)

    async def _count(self, command: str, timeout: float) -> int:
        count = await self._ask(command, timeout)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < MOST_FILE_SYSTEMS:
            raise self._nonsense(command)
        return count

    def _nonsense(self, command: str) -> AgentError:
        return AgentError(f"{self.place}: what answers {command} there is no guest agent")


class Agent(GuestAgent):
    """A conversation with a guest agent at its socket.

    All waiting is done by C(wait), so that the same words serve in an event loop and without one.
    """

    def __init__(self, path: str, wait: Wait = wait_in_loop) -> None:
        super().__init__(path)
        self.path = path
        self._wait = wait
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.setblocking(False)
        self._lines: deque[bytes] = deque()
        self._unfinished = b""
        self._owed = 0

    async def __aenter__(self) -> Agent:
        deadline = time.monotonic() + ANSWER_TIMEOUT
        try:
            await self._connect(deadline)
            await self._synchronize(deadline)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    async def _connect(self, deadline: float) -> None:
        while True:
            try:
                return self._connection.connect(self.path)
            except BlockingIOError:
                # The backlog is full of clients that wait for their turn.
                if time.monotonic() >= deadline:
                    raise AgentError(self._no_agent()) from None
                await self._wait(None, RETRY_INTERVAL)
            except (FileNotFoundError, ConnectionRefusedError):
                raise AgentGone(
                    f"{self.path}: nobody listens there: the VM is off, or the socket of its guest agent is elsewhere"
                ) from None
            except OSError as error:
                raise AgentError(f"{self.path}: cannot connect: {error.strerror or error}") from error

    async def _synchronize(self, deadline: float) -> None:
        """Read over what the agent still answers to earlier clients."""
        number = int.from_bytes(os.urandom(4), "big")
        # This byte, which is in no JSON, ends what an earlier client has left half said.
        self._send({"execute": "guest-sync", "arguments": {"id": number}}, prefix=b"\xff")
        while (await self._answer(deadline, self._no_agent())).get("return") != number:
            pass
        self._owed = 0

    async def _ask(self, command: str, timeout: float) -> Any:
        self._send({"execute": command})
        deadline = time.monotonic() + timeout
        answer: dict[str, Any] = {}
        while self._owed:
            silence = f"{self.path}: the guest agent did not answer {command} within {timeout:g} s"
            answer = await self._answer(deadline, silence)
            self._owed -= 1
        if "return" not in answer:
            raise AgentRefusal(f"{self.path}: the guest agent refused {command}: {_reason(answer)}")
        return answer["return"]

    def _send(self, request: dict[str, Any], prefix: bytes = b"") -> None:
        try:
            # Never more than what fits into the buffer of a new connection.
            self._connection.sendall(prefix + json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._broken(error) from error
        self._owed += 1

    async def _answer(self, deadline: float, silence: str) -> dict[str, Any]:
        """Return the next answer, and skip what is none: the guest may send anything, for ever, and is not trusted."""
        while True:
            while self._lines:
                answer = _parsed(self._lines.popleft())
                if answer:
                    return answer
            left = deadline - time.monotonic()
            if left <= 0 or not await self._wait(self._connection, left):
                raise AgentError(silence)
            self._read()

    def _read(self) -> None:
        try:
            data = self._connection.recv(65536)
        except OSError as error:
            raise self._broken(error) from error
        if not data:
            raise self._broken("closed by the other side")
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._lines.extend(lines)
        if len(self._unfinished) > ANSWER_LIMIT:
            raise AgentError(f"{self.path}: what answers there is no guest agent")

    def _no_agent(self) -> str:
        return (
            f"{self.path}: no guest agent answers within {ANSWER_TIMEOUT:g} s: none runs in the guest, or another"
            " client (libvirt, another backup, an open shell) holds its socket, which serves one at a time; find"
            " that with `ss -xp`"
        )

    def _broken(self, error: object) -> AgentError:
        return AgentError(f"{self.path}: the connection to the guest agent broke off: {error}")


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        # Some guests tell errors in a character set of their own.
        message = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    is_answer = isinstance(message, dict) and ("return" in message or "error" in message)
    return message if is_answer else {}


def _reason(answer: dict[str, Any]) -> str:
    error = answer["error"]
    return str(error.get("desc", error) if isinstance(error, dict) else error)[:REASON_LIMIT]
