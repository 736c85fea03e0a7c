# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Talk to the guest agent of a domain through libvirt, which holds its channel.

A command that was not answered in time may still be done later: it is in the channel already. What is asked after it
is answered after it.
Reference: libvirt 9.0, virDomainQemuAgentCommand() in libvirt-qemu.h, and virterror.h.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from .._common.errors import AgentError, MonitorError, MonitorGone
from .answers import quoted
from .guest_agent import AgentGone, AgentRefusal, GuestAgent
from .libvirt_connection import OPERATION_INVALID, SYSTEM_ERROR, LibvirtConnection
from .libvirt_domain import LibvirtDomain

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from .address import Address


# virErrorNumber
INTERNAL_ERROR = 1
ARGUMENT_UNSUPPORTED = 74
AGENT_UNRESPONSIVE = 86
AGENT_COMMAND_TIMEOUT = 112
AGENT_COMMAND_FAILED = 113
REFUSED = "QEMU agent command"
"""Part of what libvirt says where the agent has answered with an error, by the code C(INTERNAL_ERROR) before 11.2."""


class BlockingDomain:
    """Calls about a domain in a process without an event loop, which waits for them: as LibvirtDomain, but at once."""

    def __init__(self, address: Address) -> None:
        self.connection = LibvirtConnection(address)

    async def open(self) -> None:
        """Connect, and find the domain."""
        self.connection.open()

    async def close(self) -> None:
        """End the connection."""
        self.connection.close()

    async def call(self, what: str, function: Callable[[], Any]) -> Any:
        """Call C(function). C(what) it does is told where that goes wrong."""
        return self.connection.call(what, function)


class LibvirtAgent(GuestAgent):
    """A conversation with the guest agent of a domain. C(is_alone) says that there is no event loop to wait in."""

    def __init__(self, address: Address, is_alone: bool) -> None:
        super().__init__(str(address))
        self._address = address
        self._is_alone = is_alone
        self._domain: LibvirtDomain | BlockingDomain

    async def __aenter__(self) -> LibvirtAgent:
        try:
            self._domain = BlockingDomain(self._address) if self._is_alone else LibvirtDomain(self._address)
            await self._domain.open()
        except MonitorError as error:
            raise _agent_error(error) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._domain.close()

    def close(self) -> None:
        """End the connection before its time, without an event loop."""
        self._domain.connection.close()

    async def _ask(self, command: str, timeout: float) -> Any:
        seconds = max(1, math.ceil(timeout))
        try:
            told = await self._domain.call(command, lambda: self._command(command, seconds))
        except MonitorError as error:
            raise _agent_error(error) from error
        try:
            return json.loads(told)["return"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._nonsense(command) from None

    def _command(self, command: str, seconds: int) -> str:
        connection = self._domain.connection
        request = json.dumps({"execute": command})
        try:
            return str(connection.qemu.qemuAgentCommand(connection.domain, request, seconds, 0))
        except connection.libvirt.libvirtError as error:
            found = self._refusal(command, seconds, error)
            if found is None:
                raise
            raise found from error

    def _refusal(self, command: str, seconds: int, error: Any) -> AgentError | None:
        """Return what the agent, or its silence, comes to; None for what is libvirt's own."""
        code, said = error.get_error_code(), quoted(error.get_error_message())
        if code == AGENT_COMMAND_FAILED or (code == INTERNAL_ERROR and REFUSED in said):
            return AgentRefusal(f"{self.place}: the guest agent refused {command}: {said}")
        if code in (AGENT_UNRESPONSIVE, AGENT_COMMAND_TIMEOUT):
            return AgentError(
                f"{self.place}: the guest agent did not answer {command} within {seconds} s ({said}): none runs in the"
                " guest, or it hangs"
            )
        if code == ARGUMENT_UNSUPPORTED:
            return AgentError(
                f"{self.place}: libvirt does not hold the channel of a guest agent ({said}): give the domain one"
                " (org.qemu.guest_agent.0), or name the agent's socket"
            )
        # A guest that stands still, or has closed the channel, may go on.
        if code in (INTERNAL_ERROR, SYSTEM_ERROR, OPERATION_INVALID) and self._domain.connection.is_active():
            return AgentError(f"{self.place}: the guest agent cannot be asked {command}: {said}")
        return None


def _agent_error(error: MonitorError) -> AgentError:
    return AgentGone(str(error)) if isinstance(error, MonitorGone) else AgentError(str(error))
