# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold a conversation with one QEMU at the socket of its monitor.

It uses the library qemu.qmp, which no other file imports.
Reference: QEMU Machine Protocol specification, docs/interop/qmp-spec.rst of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from typing import TYPE_CHECKING

from ansible.module_utils.basic import missing_required_lib

from .._common.errors import CommandError, MonitorError, MonitorGone, MonitorTimeout
from .._common.redaction import redact_text
from . import connection
from .answers import quoted, senseless, version_text

if TYPE_CHECKING:
    import socket
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule
    from qemu.qmp import Message

    from .._host.process import Process
    from .address import Address


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

    class LibraryClient(QMPClient):
        """A client that knows which of its questions are open. C(unanswered) are their commands by id, oldest first.

        It leaves out the library's debug log: to format each message for it takes as long as all else.
        """

        def __init__(self) -> None:
            super().__init__("vmfleet")
            # Nobody asks for events, and the library would keep all of them.
            self.events.event_filter = lambda _event: False
            self.unanswered: dict[object, str] = {}

        async def _do_recv(self) -> Message:
            """Receive the next message. Until the conversation has begun, the library is ready for no event.

            QEMU sends them then: before the greeting, while it still counts the client before, and before the answer
            to qmp_capabilities. A client that comes while QEMU starts can be greeted twice.
            """
            while True:
                message = await super()._do_recv()
                # Most messages are answers: to look for what is not in one takes the library long.
                if "id" in message or self.runstate == Runstate.RUNNING:
                    return message
                is_early = "event" in message or ("QMP" in message and self.greeting is not None)
                if not is_early:
                    return message

        def _cb_outbound(self, msg: Message) -> Message:
            # Only what opens the conversation goes without an id.
            if "id" in msg:
                self.unanswered[msg["id"]] = str(msg["execute"])
            return msg

        def _cb_inbound(self, msg: Message) -> Message:
            if self.unanswered:
                if "id" in msg:
                    if self.unanswered.pop(str(msg["id"]), None) is None:
                        raise QMPError(f"it answers a question that nobody has asked: {json.dumps(dict(msg))}")
                elif "event" not in msg and "QMP" not in msg:
                    # The library would drop it, and whoever has asked would wait until the time-out.
                    raise QMPError(f"it does not say which question it answers: {json.dumps(dict(msg))}")
            return msg

except ImportError:
    QMP_IMPORT_ERROR = traceback.format_exc()

COMMAND_TIMEOUT = 30.0
"""Seconds for one command. Only a blocked main loop (a hung disk or target) comes near it."""
_HUNG_UP = (EOFError, OSError, asyncio.TimeoutError)
"""What a conversation ends with when the other side goes."""
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


class QmpClient:
    """A conversation with the QEMU that listens at an address. It takes several questions at a time."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client: LibraryClient | None = None
        self._end: asyncio.Future[None] | None = None

    async def open(self) -> Process | None:
        """Begin the conversation; return the QEMU at the other end, which is unknown over TCP."""
        deadline = time.monotonic() + connection.CONNECT_TIMEOUT
        opened, process = await connection.connect(self.address, deadline)
        try:
            self._client = await self._greet(opened, process, deadline)
        except MonitorError:
            raise
        except Exception as error:
            raise self._bad_greeting(error.exc if isinstance(error, ConnectError) else error) from error
        return process

    async def close(self, is_told: bool) -> None:
        """End the conversation. C(is_told) says that another error is being raised."""
        if self._client is None:
            return
        # A command that has met with the end has told it.
        is_told = is_told or self._end is not None
        cause = await self._disconnect(self._client)
        client, self._client, self._end = self._client, None, None
        # The other side may go after its last answer.
        if not is_told and cause is not None and not isinstance(cause, _HUNG_UP):
            raise self._unreadable(client, cause) from cause

    @property
    def version(self) -> str:
        """Return QEMU's version, such as C(7.2.22)."""
        greeting = self._require_client().greeting
        if greeting is None:
            raise MonitorError(f"{self.address}: the monitor sent no greeting")
        try:
            return version_text(greeting.QMP.version)
        except ValueError as error:
            raise self._bad_greeting(QMPError("its greeting has no version of QEMU")) from error

    async def execute(self, command: str, arguments: dict[str, Any] | None, fd: int | None = None) -> Any:
        """Run one QMP command and return its C(return) member. The open file C(fd) goes with it."""
        client = self._require_client()
        if fd is not None:
            await self._send_file(client, command, fd)
        try:
            return await asyncio.wait_for(client.execute(command, arguments), COMMAND_TIMEOUT)
        except asyncio.TimeoutError:
            raise MonitorTimeout(
                f"{self.address}: no answer to {command} within {COMMAND_TIMEOUT:g} s: QEMU's main loop is blocked,"
                " usually by a hung disk or backup target"
            ) from None
        except ExecuteError as error:
            said = redact_text(str(error))
            raise CommandError(str(self.address), command, error.error_class, said) from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise await self._ended(client, command) from error
        except QMPError as error:
            raise senseless(self.address, command, error) from error

    async def _send_file(self, client: LibraryClient, command: str, fd: int) -> None:
        try:
            client.send_fd_scm(fd)
        except (StateError, ConnectionError) as error:
            raise await self._ended(client, command) from error
        except OSError as error:
            raise MonitorError(f"{self.address}: cannot hand an open file to QEMU: {error.strerror}") from error

    async def _greet(self, opened: socket.socket, process: Process | None, deadline: float) -> LibraryClient:
        """Begin the conversation, or close the connection: left open, it would take the place of the next client."""
        client = LibraryClient()
        greeting = asyncio.ensure_future(client.connect(opened))
        try:
            await asyncio.wait({greeting}, timeout=max(0.1, deadline - time.monotonic()))
            if not greeting.done():
                # Our own connection still stands in the queue, which is how the cases are told from each other.
                raise MonitorTimeout(connection.no_greeting(self.address, process))
            greeting.result()
        finally:
            if client.runstate.name != "RUNNING":
                greeting.cancel()
                await asyncio.gather(greeting, return_exceptions=True)
                opened.close()
        return client

    def _require_client(self) -> LibraryClient:
        if self._client is None:
            raise MonitorError(f"{self.address}: not connected")
        return self._client

    async def _disconnect(self, client: LibraryClient) -> BaseException | None:
        """End the conversation, and return what had ended it before that, if anything did.

        Several commands that were under way may ask for that; the library can be asked only once.
        """
        if self._end is None:
            self._end = asyncio.ensure_future(client.disconnect())
        await asyncio.wait({self._end}, timeout=COMMAND_TIMEOUT)
        return self._end.exception() if self._end.done() else asyncio.TimeoutError()

    async def _ended(self, client: LibraryClient, command: str) -> MonitorError:
        """Return what has ended the conversation, as C(command) has met with it."""
        cause = await self._disconnect(client)
        if cause is not None and not isinstance(cause, _HUNG_UP):
            return self._unreadable(client, cause)
        return MonitorGone(
            f"{self.address}: the connection broke off during {command}: QEMU has ended or closed its monitor"
        )

    def _unreadable(self, client: LibraryClient, cause: BaseException) -> MonitorError:
        """Return the error for what cannot be read. QEMU answers in order: it belongs to the oldest question."""
        question = next(iter(client.unanswered.values()), "")
        what = f"the answer to {question}" if question else "what QEMU sent unasked"
        # StreamReader.readline() raises this for a line that is too long.
        if isinstance(cause.__context__, asyncio.LimitOverrunError):
            return MonitorError(
                f"{self.address}: {what} is longer than qemu.qmp can read (10 MiB), because its disks have too many"
                " layers most often: merge their snapshots (virsh blockcommit, or block-commit of QEMU)"
            )
        return MonitorError(f"{self.address}: {what} cannot be read: {_told(cause)}")

    def _bad_greeting(self, error: Exception) -> MonitorError:
        if isinstance(error, (EOFError, ConnectionError)):
            return MonitorGone(
                f"{self.address}: closed without a QMP greeting: QEMU is ending, or this is no QMP monitor"
            )
        return MonitorError(
            f"{self.address}: what answers there is not a QMP monitor ({_told(error)}); name the socket of -qmp"
            " mode=control"
        )


def _told(error: BaseException) -> str:
    """Return what an error says. Of one that is not the library's, the kind says more than the words, most often."""
    return quoted(error if isinstance(error, QMPError) else f"{type(error).__name__}: {error}")
