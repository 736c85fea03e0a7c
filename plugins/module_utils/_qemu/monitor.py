# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A QMP monitor: connect, execute, pass file descriptors. The only file that imports qemu.qmp.

Reference: QEMU Machine Protocol specification, docs/interop/qmp-spec.rst of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import socket
import struct
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ansible.module_utils.basic import missing_required_lib

from .._common.errors import CommandError, MonitorError, MonitorGone, MonitorTimeout, Refused
from .._host.process import Process

QMP_IMPORT_ERROR: str | None = None
try:
    from qemu.qmp import (
        ConnectError,
        ExecInterruptedError,
        ExecuteError,
        QMPClient,
        QMPError,
        Runstate,
        StateError,
    )

    class _Client(QMPClient):
        """A client that knows which of its questions are open. C(unanswered) are their commands by id, oldest first.

        It leaves out the library's debug log: to format each message for it takes as long as all else.
        """

        def __init__(self) -> None:
            super().__init__("vmfleet")
            self.unanswered: dict[object, str] = {}

        async def _do_recv(self) -> Message:
            """Receive the next message. Until the conversation has begun, the library is ready for no event.

            QEMU sends them then: before the greeting, while it still counts the client before, and before the answer
            to qmp_capabilities. A client that comes while QEMU starts can be greeted twice.
            """
            while True:
                message = await super()._do_recv()
                is_early = "event" in message or ("QMP" in message and self.greeting is not None)
                if not is_early or self.runstate == Runstate.RUNNING:
                    return message

        def _cb_outbound(self, msg: Message) -> Message:
            # Only what opens the conversation goes without an id.
            if "id" in msg:
                self.unanswered[msg["id"]] = str(msg["execute"])
            return msg

        def _cb_inbound(self, msg: Message) -> Message:
            if self.unanswered and "event" not in msg and "QMP" not in msg:
                if "id" not in msg:
                    # The library would drop it, and the question would wait for its answer until its time is over.
                    raise QMPError(f"it does not tell which question it answers: {json.dumps(dict(msg))}")
                self.unanswered.pop(msg["id"], None)
            return msg

except ImportError:
    QMP_IMPORT_ERROR = traceback.format_exc()

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule
    from qemu.qmp import Message


CONNECT_TIMEOUT = 10.0
"""Seconds for the connection and the greeting: QEMU needs milliseconds, a monitor that is taken never sends one."""
COMMAND_TIMEOUT = 30.0
"""Seconds for one command. Only a blocked main loop (a hung disk or target) comes near it."""
QUOTE_LIMIT = 200
"""Characters of what cannot be read that a message quotes."""
RETRY_INTERVAL = 0.05
"""Seconds between attempts to enter a full backlog."""
# qemu.qmp logs each failure that it also raises; the exception is enough.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False


def require_qmp(module: AnsibleModule) -> None:
    """Fail with Ansible's own words for a missing library unless qemu.qmp can be imported."""
    if QMP_IMPORT_ERROR is not None:
        module.fail_json(
            msg=missing_required_lib("qemu.qmp", url="https://gitlab.com/qemu-project/python-qemu-qmp"),
            exception=QMP_IMPORT_ERROR,
        )


@dataclass(frozen=True)
class Address:
    """Where a monitor listens: a UNIX socket's path, or a TCP host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return ("tcp:[%s]:%d" if ":" in self.host else "tcp:%s:%d") % (self.host, self.port)


def parse_address(text: str, option: str = "monitor") -> Address:
    """Read C(unix:/path), C(/path) or C(tcp:host:port); anything else is Refused under the name of C(option)."""
    if text.startswith("libvirt:"):
        raise Refused(
            option,
            f"{text!r}: libvirt addresses are not supported yet; give the domain a monitor of its own"
            " (qemu:commandline with -qmp) and name its socket. Where AppArmor is on, it needs a rule for that socket,"
            " or the domain does not start any more: see 'Domains of libvirt' in the guide 'Getting started'",
        )
    if text.startswith("tcp:"):
        match = re.fullmatch(r"tcp:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", text)
        if not match or not 0 < int(match.group("port")) < 65536:
            raise Refused(option, f"{text!r} is not of the form tcp:HOST:PORT")
        return Address(host=match.group("v6") or match.group("host"), port=int(match.group("port")))
    path = text[len("unix:") :] if text.startswith("unix:") else text
    if not path.startswith("/"):
        raise Refused(option, f"{text!r} is neither unix:/PATH (or an absolute path) nor tcp:HOST:PORT")
    return Address(path=path)


_HUNG_UP = (EOFError, OSError, asyncio.TimeoutError)
"""What a conversation ends with when the other side goes."""


@dataclass
class Monitor:
    """A conversation with one QEMU, as an async context manager.

    A monitor serves one client at a time: hold it briefly, and never while waiting for a job.
    C(commands) lists what was sent, queries left out.
    """

    address: Address
    commands: list[dict[str, Any]] = field(default_factory=list)
    process: Process | None = None
    """The QEMU at the other end; unknown over TCP."""

    def __post_init__(self) -> None:
        self._client: _Client | None = None
        self._end: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Monitor:
        deadline = time.monotonic() + CONNECT_TIMEOUT
        connection = await self._connect(deadline)
        try:
            self._client = await self._greet(connection, deadline)
        except MonitorError:
            raise
        except Exception as error:
            raise self._bad_greeting(error.exc if isinstance(error, ConnectError) else error) from error
        return self

    async def _greet(self, connection: socket.socket, deadline: float) -> _Client:
        """Begin the conversation, or close the connection: left open, it would take the place of the next client."""
        client = _Client()
        greeting = asyncio.ensure_future(client.connect(connection))
        try:
            await asyncio.wait({greeting}, timeout=max(0.1, deadline - time.monotonic()))
            if not greeting.done():
                # Asked while our own connection still stands in the queue: that is what tells the cases apart.
                raise MonitorTimeout(self._no_greeting())
            greeting.result()
        finally:
            if client.runstate.name != "RUNNING":
                greeting.cancel()
                await asyncio.gather(greeting, return_exceptions=True)
                connection.close()
        return client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is None:
            return
        # What a command has met with has been raised there.
        is_told = kind is not None or self._end is not None
        cause = await self._disconnect(self._client)
        client, self._client, self._end = self._client, None, None
        # That the other side has gone after its last answer is its own affair.
        if not is_told and cause is not None and not isinstance(cause, _HUNG_UP):
            raise self._unreadable(client, cause) from cause

    @property
    def version(self) -> str:
        """QEMU's version, such as C(7.2.22)."""
        greeting = self._require_client().greeting
        if greeting is None:
            raise MonitorError(f"{self.address}: the monitor sent no greeting")
        try:
            numbers: Any = greeting.QMP.version["qemu"]
            return "{:d}.{:d}.{:d}".format(numbers["major"], numbers["minor"], numbers["micro"])
        except (LookupError, TypeError, ValueError) as error:
            raise self._bad_greeting(QMPError("its greeting tells no version of QEMU")) from error

    @property
    def passes_fds(self) -> bool:
        """Whether file descriptors can be handed to this QEMU (SCM_RIGHTS exists on UNIX sockets only)."""
        return bool(self.address.path)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one QMP command and return its C(return) member; raises CommandError, MonitorTimeout, MonitorGone."""
        client = self._require_client()
        if not command.startswith(("query-", "qom-")):
            self.commands.append({"execute": command, "arguments": arguments or {}})
        try:
            return await asyncio.wait_for(client.execute(command, arguments), COMMAND_TIMEOUT)
        except asyncio.TimeoutError:
            raise MonitorTimeout(
                f"{self.address}: no answer to {command} within {COMMAND_TIMEOUT:g} s: QEMU's main loop is blocked,"
                " by a hung disk or backup target most often"
            ) from None
        except ExecuteError as error:
            raise CommandError(str(self.address), command, error.error_class, str(error)) from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise await self._ended(client, command) from error
        except QMPError as error:
            # Read, but not understood; the conversation can go on.
            raise MonitorError(f"{self.address}: the answer to {command} makes no sense: {_quoted(error)}") from error

    async def add_fdset(self, fds: Sequence[int], opaque: str) -> int:
        """Hand open files to QEMU as one fdset; returns its id. QEMU needs one fd per access mode that it will use."""
        fdset: int | None = None
        for fd in fds:
            client = self._require_client()
            try:
                client.send_fd_scm(fd)
            except (StateError, ConnectionError) as error:
                raise await self._ended(client, "add-fd") from error
            except OSError as error:
                raise MonitorError(f"{self.address}: cannot hand an open file to QEMU: {error.strerror}") from error
            arguments: dict[str, Any] = {"opaque": opaque}
            if fdset is not None:
                arguments["fdset-id"] = fdset
            answer = await self.execute("add-fd", arguments)
            try:
                fdset = int(answer["fdset-id"])
            except (LookupError, TypeError, ValueError) as error:
                raise MonitorError(f"{self.address}: the answer to add-fd names no fdset: {_quoted(answer)}") from error
        if fdset is None:
            raise ValueError("an fdset needs at least one file descriptor")
        return fdset

    async def remove_fdset(self, fdset: int) -> None:
        """Take an fdset back. A job that has opened a file through it is not disturbed."""
        await self.execute("remove-fd", {"fdset-id": fdset})

    def _require_client(self) -> _Client:
        if self._client is None:
            raise MonitorError(f"{self.address}: not connected")
        return self._client

    async def _disconnect(self, client: _Client) -> BaseException | None:
        """End the conversation, and return what had ended it before that, if anything did.

        Several commands that were under way may ask for that; the library can be asked only once.
        """
        if self._end is None:
            self._end = asyncio.ensure_future(client.disconnect())
        await asyncio.wait({self._end}, timeout=COMMAND_TIMEOUT)
        return self._end.exception() if self._end.done() else asyncio.TimeoutError()

    async def _connect(self, deadline: float) -> socket.socket:
        if not self.address.path:
            return await self._connect_tcp(deadline)
        while True:
            try:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            except OSError as error:
                raise self._unreachable(error) from error
            connection.setblocking(False)
            try:
                connection.connect(self.address.path)
            except BlockingIOError:
                # The backlog is full of clients that wait for their turn.
                connection.close()
                if time.monotonic() >= deadline:
                    raise MonitorTimeout(self._no_greeting()) from None
                await asyncio.sleep(RETRY_INTERVAL)
            except OSError as error:
                connection.close()
                raise self._unreachable(error) from error
            else:
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                self.process = Process.of(struct.unpack("3i", credentials)[0])
                return connection

    async def _connect_tcp(self, deadline: float) -> socket.socket:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
            connection = socket.socket(found[0][0], socket.SOCK_STREAM)
            connection.setblocking(False)
        except UnicodeError as error:
            raise MonitorError(f"{self.address}: cannot connect: {error}") from error
        except OSError as error:
            raise self._unreachable(error) from error
        try:
            await asyncio.wait_for(loop.sock_connect(connection, found[0][4]), max(0.1, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            connection.close()
            raise MonitorTimeout(f"{self.address}: no connection within {CONNECT_TIMEOUT:g} s") from None
        except OSError as error:
            connection.close()
            raise self._unreachable(error) from error
        return connection

    async def _ended(self, client: _Client, command: str) -> MonitorError:
        """What has ended the conversation, which C(command) has met with."""
        cause = await self._disconnect(client)
        if cause is not None and not isinstance(cause, _HUNG_UP):
            return self._unreadable(client, cause)
        return MonitorGone(
            f"{self.address}: the connection broke off during {command}: QEMU has ended or closed its monitor"
        )

    def _unreadable(self, client: _Client, cause: BaseException) -> MonitorError:
        """What came cannot be read. QEMU answers in order: it came in answer to the oldest open question."""
        question = next(iter(client.unanswered.values()), "")
        what = f"the answer to {question}" if question else "what QEMU sent unasked"
        # How StreamReader.readline() tells of a line that is too long.
        if isinstance(cause.__context__, asyncio.LimitOverrunError):
            return MonitorError(
                f"{self.address}: {what} is longer than qemu.qmp can read (10 MiB), because its disks have too many"
                " layers most often: merge their snapshots (virsh blockcommit, or block-commit of QEMU)"
            )
        return MonitorError(f"{self.address}: {what} cannot be read: {_quoted(cause)}")

    def _unreachable(self, error: OSError) -> MonitorError:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            reason = "there is no such socket" if error.errno == errno.ENOENT else "nobody listens there"
            return MonitorGone(f"{self.address}: {reason}: the VM is off, or its monitor is elsewhere")
        return MonitorError(f"{self.address}: cannot connect: {error.strerror or error}")

    def _bad_greeting(self, error: Exception) -> MonitorError:
        if isinstance(error, (EOFError, ConnectionError)):
            return MonitorGone(
                f"{self.address}: closed without a QMP greeting: QEMU is ending, or this is no QMP monitor"
            )
        return MonitorError(
            f"{self.address}: what answers there is not a QMP monitor ({_quoted(error)}); name the socket of -qmp"
            " mode=control"
        )

    def _no_greeting(self) -> str:
        """Why there was no greeting, as far as the kernel's list of sockets can tell."""
        start = f"{self.address}: no QMP greeting within {CONNECT_TIMEOUT:g} s: "
        held = (
            "another client holds this monitor, which serves one at a time; find it with `ss -xp`"
            " (libvirt, another backup, an open shell), or give the VM a second -qmp socket"
        )
        frozen = "QEMU does not accept connections: it is stopped, or its main loop is blocked by a hung disk or target"
        other = "the connection was accepted in silence: this is no QMP monitor, or its QEMU hangs"
        if not self.address.path:
            return f"{start}{held}, or {frozen}"
        stopped = f" (process {self.process.pid} is stopped)" if self.process and self.process.stopped else ""
        accepted, waiting = _clients(self.address.path)
        if accepted is None:
            return f"{start}{held}, or {frozen}"
        if not waiting:
            return start + other + stopped
        return start + (held if accepted else frozen) + stopped


def _quoted(what: object) -> str:
    """What was said, in one line of a length that can be printed: it may be anything, and megabytes of it."""
    kind = f"{type(what).__name__}: " if isinstance(what, Exception) and not isinstance(what, QMPError) else ""
    text = kind + " ".join(str(what).split())
    return text if len(text) <= QUOTE_LIMIT else text[:QUOTE_LIMIT] + "..."


def _clients(path: str) -> tuple[int | None, int]:
    """How many clients the socket at C(path) serves, and how many wait to be accepted (unix(7), net/unix/af_unix.c).

    None where the kernel does not show it: it is of another network namespace, or has another path there.
    """
    counts = {"03": 0, "02": 0}
    is_shown = False
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
            lines = table.readlines()
    except OSError:
        return None, 0
    for line in lines:
        columns = line.split(maxsplit=7)
        if len(columns) == 8 and columns[7].rstrip("\n") == path:
            is_shown = True
            if columns[5] in counts:
                counts[columns[5]] += 1
    return counts["03"] if is_shown else None, counts["02"]
