# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hold a conversation with one QEMU: commands, and files that are handed over.

How it is reached, at the socket of its monitor or through libvirt, is a matter of the client below.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import CommandError, MonitorError, MonitorTimeout
from .._common.redaction import redact_values
from .answers import Odd, check_answer, senseless
from .qmp_client import QmpClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence
    from types import TracebackType
    from typing import Any, TypeVar

    from .._host.process import Process
    from .address import Address
    from .libvirt_client import LibvirtClient
    from .libvirt_domain import LibvirtDomain

    Client = QmpClient | LibvirtClient
    T = TypeVar("T")


LOOK_TIMEOUT = 90.0
"""Seconds for all questions of one look at a VM."""


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
        self._client: Client | None = None

    async def __aenter__(self) -> Monitor:
        client: Client = self._libvirt_client() if self.address.domain else QmpClient(self.address)
        self.process = await client.open()
        self._client = client
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close(kind is not None)

    @property
    def version(self) -> str:
        """Return QEMU's version, such as C(7.2.22)."""
        return self._require_client().version

    @property
    def libvirt(self) -> LibvirtDomain | None:
        """The domain of libvirt through which QEMU is reached; None where it is reached itself."""
        client = self._require_client()
        return None if isinstance(client, QmpClient) else client.domain

    @property
    def passes_fds(self) -> bool:
        """Return whether file descriptors can be handed to this QEMU. A storage daemon has them from its start on."""
        return not self.address.port and not self.address.daemon

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """Run one QMP command and return its C(return) member. The open file C(fd) goes with it.

        Raises CommandError, MonitorTimeout, MonitorGone, and MonitorError.
        """
        client = self._require_client()
        if not command.startswith(("query-", "qom-")):
            self.commands.append({"execute": command, "arguments": redact_values(arguments or {})})
        answer = await client.execute(command, arguments, fd)
        try:
            check_answer(command, answer)
        except Odd as odd:
            raise self.senseless(command, str(odd)) from None
        return answer

    def senseless(self, command: str, why: object) -> MonitorError:
        """Return the error for an answer that was read, but tells nothing. The conversation can go on."""
        return senseless(self.address, command, why)

    async def within(self, looking: Awaitable[T]) -> T:
        """Look at a VM by many questions, in a time that has an end, however slowly each is answered."""
        try:
            return await asyncio.wait_for(looking, LOOK_TIMEOUT)
        except asyncio.TimeoutError:
            raise MonitorTimeout(
                f"{self.address}: QEMU did not answer all questions within {LOOK_TIMEOUT:g} s: it answers too slowly"
            ) from None

    async def add_fdset(self, fds: Sequence[int], opaque: str) -> int:
        """Hand open files to QEMU as one fdset; returns its id. QEMU needs one fd per access mode that it will use."""
        fdset: int | None = None
        for fd in fds:
            arguments: dict[str, Any] = {"opaque": opaque}
            if fdset is not None:
                arguments["fdset-id"] = fdset
            try:
                fdset = (await self.execute("add-fd", arguments, fd))["fdset-id"]
            except CommandError:
                # A security module may let QEMU have one that is open to read, and not one to write.
                if fdset is not None:
                    await self.remove_fdset(fdset)
                raise
        if fdset is None:
            raise ValueError("an fdset needs at least one file descriptor")
        return fdset

    async def remove_fdset(self, fdset: int) -> None:
        """Take an fdset back. A job that has opened a file through it is not disturbed."""
        await self.execute("remove-fd", {"fdset-id": fdset})

    def _libvirt_client(self) -> LibvirtClient:
        # Where there is no domain, it need not be loaded, and compiled.
        from .libvirt_client import LibvirtClient  # noqa: PLC0415

        return LibvirtClient(self.address)

    def _require_client(self) -> Client:
        if self._client is None:
            raise MonitorError(f"{self.address}: not connected")
        return self._client
