# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Freeze a guest's file systems so that they do not stay frozen, whatever is killed.

The module starts a guard, a process of its own that alone talks to the agent, and freezes. A pair of sockets
connects the two. It is closed when the module ends or is killed: then the guard thaws, and tries again until the guest
is seen thawed. Where the guard is killed, the module sees the pair closed, and thaws in its place. Where both are
killed, the set's intent tells a later run to thaw.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import socket as sockets
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import AgentError, Refused
from .._host.process import PROC_FDS
from .address import LIBVIRT, parse_address
from .guest_agent import THAW_TIMEOUT, Agent, AgentGone, AgentRefusal, wait_alone, wait_in_loop
from .libvirt_agent import LibvirtAgent

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from types import TracebackType
    from typing import Any, NoReturn

    from .guest_agent import GuestAgent, Wait


HOLD_LIMIT = 60.0
"""Seconds after which a guard thaws unasked, for a module that hangs: longer than any start of jobs may take."""
THAW_LIMIT = 300.0
"""Seconds for which a guard goes on trying to thaw."""
RETRY_INTERVAL = 0.5
"""Seconds between two attempts to thaw, in which other clients of the agent get their turn."""
GUARD_TIMEOUT = 30.0
"""Seconds for a word of the guard while it freezes: longer than all its own time limits together."""
ANOTHER_PYTHON = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import importlib
importlib.import_module(sys.argv[2]).be_guard(*sys.argv[3:])
"""
"""What a guard begins as that must not have the module's memory."""


@dataclass(frozen=True)
class AgentPlace:
    """Where a guest agent is: C(name) is the path of its socket, or C(libvirt:NAME) where libvirt holds its channel.

    C(libvirt_uri) is which libvirt, and empty for a socket.
    """

    name: str
    libvirt_uri: str = ""

    @property
    def is_domain(self) -> bool:
        """Return whether libvirt holds the channel."""
        return self.name.startswith(LIBVIRT)

    def agent(self, wait: Wait = wait_in_loop) -> GuestAgent:
        """Return a conversation that is still to be begun; all waiting is done by C(wait)."""
        if not self.is_domain:
            return Agent(self.name, wait)
        try:
            return LibvirtAgent(parse_address(self.name, "agent", self.libvirt_uri), wait is wait_alone)
        except Refused as error:
            raise AgentError(str(error)) from error


async def check(place: AgentPlace) -> None:
    """Raise AgentError where a guest cannot be frozen: no agent, none that freezes, or frozen by somebody else."""
    async with place.agent() as agent:
        await agent.require_freezable()


async def thaw(place: AgentPlace) -> None:
    """Thaw a guest that a dead module of ours has left frozen; raises AgentError unless it is seen thawed."""
    await _thaw(place, wait_in_loop, THAW_TIMEOUT)


class Freezer:
    """Freezes a guest's file systems, as an async context manager.

    Entering raises AgentError if that fails. Leaving thaws, and raises nothing when that is not seen.
    """

    def __init__(self, place: AgentPlace) -> None:
        self.frozen_ms = 0
        """From the sending of the freeze to the answer to the thaw."""
        self.filesystems = 0
        self.held = False
        """Whether they were still frozen when asked to thaw. If not, the guest may have written in between."""
        self.thaw_error = ""
        """Why the guest was not seen thawed, after a failed entering too; empty where it was, or was never frozen."""
        self._place = place
        self._channel: sockets.socket
        self._since = 0.0

    async def __aenter__(self) -> Freezer:
        self._channel = _start_guard(self._place)
        self.thaw_error = (
            f"{self._place.name}: the guest's file systems may still be frozen; a guard process tries to thaw them for"
            f" {THAW_LIMIT:g} s"
        )
        try:
            await self._freeze()
        except BaseException:
            self._channel.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._channel.shutdown(sockets.SHUT_WR)
            await self._see_thaw()
        finally:
            self._channel.close()

    async def _freeze(self) -> None:
        word = await self._hear(GUARD_TIMEOUT)
        if "since" not in word:
            if not word.get("silent"):
                self.thaw_error = ""
            raise AgentError(word.get("error", f"{self._place.name}: the guard process died before it froze the guest"))
        self._since = word["since"]
        word = await self._hear(GUARD_TIMEOUT)
        if "filesystems" in word:
            self.filesystems = word["filesystems"]
            return
        if not word.get("silent"):
            await self._see_thaw()
        raise AgentError(word.get("error", f"{self._place.name}: the guard process died while it froze the guest"))

    async def _see_thaw(self) -> None:
        word = await self._hear(THAW_TIMEOUT) or await self._thaw_in_its_place()
        if "thawed" in word:
            self.held = word["held"]
            self.frozen_ms = math.ceil((word["thawed"] - self._since) * 1000)
            self.thaw_error = ""
        elif not word.get("silent"):
            self.thaw_error = word["error"]

    async def _thaw_in_its_place(self) -> dict[str, Any]:
        try:
            count = await _thaw(self._place, wait_in_loop, THAW_TIMEOUT)
        except AgentError as error:
            return {"error": str(error)}
        return {"thawed": time.monotonic(), "held": count > 0}

    async def _hear(self, seconds: float) -> dict[str, Any]:
        """Return the guard's next word; an empty one from a guard that is dead."""
        if not await wait_in_loop(self._channel, seconds):
            return {
                "silent": True,
                "error": f"{self._place.name}: the guard process did not answer within {seconds:g} s",
            }
        word: dict[str, Any] = json.loads(self._channel.recv(65536) or b"{}")
        return word


async def _thaw(place: AgentPlace, wait: Wait, limit: float) -> int:
    """Try until the guest is seen thawed; return how many file systems were frozen."""
    deadline = time.monotonic() + limit
    while True:
        try:
            async with place.agent(wait) as agent:
                return await agent.thaw() if await agent.frozen() else 0
        except AgentGone:
            # Without its QEMU the guest has ended.
            raise
        except AgentError:
            if time.monotonic() >= deadline:
                raise
        await wait(None, RETRY_INTERVAL)


def _start_guard(place: AgentPlace) -> sockets.socket:
    """Start a guard; return the module's end of the pair that connects them."""
    # Of the module's own directory, too, which the guard leaves.
    search = json.dumps([os.path.abspath(each) for each in sys.path])
    another = [sys.executable, "-I", "-S", "-B", "-c", ANOTHER_PYTHON, search, __name__]
    try:
        ours, guards = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        with guards, _signals_blocked():
            child = os.fork()
            if not child:
                _become_guard(place, guards, another)
    except OSError as error:
        raise AgentError(f"{place.name}: cannot start a guard process for the guest: {error.strerror}") from error
    # Where SIGCHLD is ignored, nothing is left to wait for.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    return ours


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block all signals: no handler of the module may run in its child. There they stay blocked, except SIGKILL."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become_guard(place: AgentPlace, channel: sockets.socket, another: list[str]) -> NoReturn:
    """Live as the guard, and never return to the module's code: its locks and connections are not the guard's.

    libvirt has threads in the module, and what they were at when this process was forked is not undone here. So a guard
    that talks to it begins anew, by the command C(another).
    """
    try:
        # An object that is collected would close a file by its number, which may be the guard's by now.
        gc.disable()
        # The guard is a child's child, so that nobody has to wait for its end: the module may end before.
        if not os.fork():
            # What the module was packed in, where that is in memory only.
            packed = [int(each[len(PROC_FDS) :]) for each in sys.path if each.startswith(PROC_FDS)]
            _detach(channel.fileno(), *packed)
            if place.is_domain:
                channel.set_inheritable(True)
                os.execv(another[0], [*another, place.name, place.libvirt_uri, str(channel.fileno())])
            _run(_guard(place, channel))
    finally:
        os._exit(0)


def be_guard(name: str, libvirt_uri: str, fd: str) -> None:
    """Live as the guard in a process that has begun anew."""
    with sockets.socket(fileno=int(fd)) as channel:
        _run(_guard(AgentPlace(name, libvirt_uri), channel))


def _detach(*kept: int) -> None:
    """Let go of all that belongs to the module: its session, working directory and open files."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in {0, 1, 2}.difference(kept):
        os.dup2(null, fd)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *kept}:
        # One of them has listed the others, and is closed already.
        with contextlib.suppress(OSError):
            os.close(fd)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what waits by wait_alone only, and therefore needs no event loop."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)


async def _guard(place: AgentPlace, channel: sockets.socket) -> None:
    """Freeze, and thaw when the module says so, has ended, or hangs."""
    try:
        async with place.agent(wait_alone) as agent:
            await agent.require_freezable()
            _tell(channel, since=time.monotonic())
            if await wait_alone(channel, 0):
                # The module has ended, or waits no longer.
                return
            in_time = await _hold(agent, channel)
            count = await _thaw_at_last(agent, place)
    except AgentError as error:
        _tell(channel, error=str(error))
    else:
        _tell(channel, thawed=time.monotonic(), held=in_time and count > 0)


async def _hold(agent: GuestAgent, channel: sockets.socket) -> bool:
    """Freeze until the module's word; False if that failed or took too long."""
    try:
        count = await agent.freeze()
    except AgentError as error:
        _tell(channel, error=str(error), silent=not isinstance(error, AgentRefusal))
        return False
    _tell(channel, filesystems=count)
    return await wait_alone(channel, HOLD_LIMIT)


async def _thaw_at_last(agent: GuestAgent, place: AgentPlace) -> int:
    try:
        # This is right behind a freeze without an answer, too: the agent thaws after it has frozen, however late.
        return await agent.thaw()
    except AgentError:
        agent.close()
    return await _thaw(place, wait_alone, THAW_LIMIT)


def _tell(channel: sockets.socket, **word: Any) -> None:
    # A module that is dead does not hear it.
    with contextlib.suppress(OSError):
        channel.send(json.dumps(word).encode())
