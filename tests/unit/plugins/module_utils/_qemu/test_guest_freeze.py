# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Freezing a guest: whatever happens, it is thawed, and what others froze stays frozen."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import AgentError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import guest_agent, guest_freeze
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_freeze import AgentPlace, Freezer, check, thaw
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import (
    FILE_SYSTEMS,
    ScriptedAgent,
    hang_up,
    mute_freeze,
    refusal,
    says,
    silence,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

FREEZE = "guest-fsfreeze-freeze"
THAW = "guest-fsfreeze-thaw"
STATUS = "guest-fsfreeze-status"

MODULE = """
import asyncio, signal, sys
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_freeze import AgentPlace, Freezer
async def main():
    async with Freezer(AgentPlace(sys.argv[1])):
        print("frozen", flush=True)
        await asyncio.sleep(3600)
# Under nohup(1), and in the background of a shell, these are passed on as ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.run(main())
"""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[ScriptedAgent]:
    """An agent that does as it is told. After the test no guard is left."""
    with ScriptedAgent(tmp_path / "agent") as agent:
        yield agent
        wait_until(lambda: not guards(agent), "the end of the guards")


def guards(agent: ScriptedAgent) -> list[int]:
    """The agent's clients that live and are not this process."""
    return [pid for pid in agent.clients if pid != os.getpid() and alive(pid)]


def alive(pid: int) -> bool:
    process = Process.of(pid)
    return process is not None and process.alive


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For agents that are silent at some point."""
    for module, name in [
        (guest_agent, "FREEZE_TIMEOUT"),
        (guest_agent, "THAW_TIMEOUT"),
        (guest_freeze, "THAW_TIMEOUT"),
        (guest_freeze, "RETRY_INTERVAL"),
    ]:
        monkeypatch.setattr(module, name, 0.2)


async def nothing() -> None:
    """What is done while the guest is frozen."""


def freeze(agent: ScriptedAgent, body: Callable[[], Awaitable[None]] = nothing) -> Freezer:
    """Freeze for the time of C(body), and return what is known afterwards."""

    async def scenario() -> Freezer:
        async with Freezer(AgentPlace(agent.path)) as freezer:
            assert agent.frozen
            assert freezer.filesystems == FILE_SYSTEMS
            assert freezer.frozen_ms == 0
            await body()
        return freezer

    return asyncio.run(scenario())


def fail(agent: ScriptedAgent, message: str) -> Freezer:
    """Fail to freeze, and return what is known afterwards."""
    freezer = Freezer(AgentPlace(agent.path))

    async def scenario() -> None:
        with pytest.raises(AgentError, match=message):
            async with freezer:
                pytest.fail("not frozen")

    asyncio.run(scenario())
    return freezer


def assert_thawed(agent: ScriptedAgent, freezer: Freezer, held: bool = True) -> None:
    """The guest is thawed, and the module knows it."""
    assert not agent.frozen
    assert freezer.thaw_error == ""
    assert freezer.held is held
    assert freezer.frozen_ms > 0


def test_guest_that_can_be_frozen(agent: ScriptedAgent) -> None:
    asyncio.run(check(AgentPlace(agent.path)))
    assert FREEZE not in agent.commands
    wait_until(lambda: agent.idle, "the end of the connection")


@pytest.mark.parametrize(
    ("command", "answer", "message"),
    [
        ("guest-sync", silence, "no guest agent answers within"),
        ("guest-sync", hang_up, "the connection to the guest agent broke off"),
        (STATUS, silence, f"did not answer {STATUS} within"),
        (STATUS, refusal("The command has been disabled"), f"refused {STATUS}: The command has been disabled"),
        (
            STATUS,
            says({"return": "frozen"}),
            "another program has frozen the guest's file systems, and they stay frozen",
        ),
        (STATUS, says({"return": ["odd"]}), "is no guest agent"),
        ("guest-info", says({"return": {"supported_commands": []}}), f"does not offer {FREEZE} and {THAW}"),
        (
            "guest-info",
            says({"return": {"supported_commands": [{"name": FREEZE, "enabled": True}, {"name": THAW, "enabled": 0}]}}),
            f"does not offer {THAW}",
        ),
        ("guest-info", says({"return": None}), "is no guest agent"),
    ],
    ids=["silent", "hangs up", "mute", "disabled", "frozen", "odd status", "incapable", "thaw disabled", "odd info"],
)
def test_guest_that_cannot_be_frozen(
    agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch, command: str, answer: Any, message: str
) -> None:
    monkeypatch.setattr(guest_agent, "ANSWER_TIMEOUT", 0.2 if answer is silence else 60.0)
    agent.script[command] = [answer]
    with pytest.raises(AgentError, match=message):
        asyncio.run(check(AgentPlace(agent.path)))
    agent.script[command] = [answer]
    freezer = fail(agent, message)
    assert freezer.thaw_error == ""
    assert FREEZE not in agent.commands
    assert THAW not in agent.commands
    wait_until(lambda: agent.idle, "the end of the connections")


@pytest.mark.parametrize("ended", [True, False])
def test_vm_that_is_off(tmp_path: Path, ended: bool) -> None:
    agent = ScriptedAgent(tmp_path / "agent")
    if ended:
        Path(agent.path).unlink()
    agent._listener.close()
    for ask in (check, thaw):
        with pytest.raises(AgentError, match="nobody listens there: the VM is off"):
            asyncio.run(ask(AgentPlace(agent.path)))
    assert fail(agent, "nobody listens there").thaw_error == ""


def test_freezing(agent: ScriptedAgent) -> None:
    freezer = freeze(agent)
    assert_thawed(agent, freezer)
    assert agent.commands[-2:] == [FREEZE, THAW]
    assert len(agent.clients) == 1
    assert agent.clients[0] != os.getpid()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert freezer._channel.fileno() == -1
    wait_until(lambda: agent.idle, "the end of the connection")


def test_answers_to_earlier_clients_are_skipped(agent: ScriptedAgent) -> None:
    agent.stale = b'turn": 5}\n{"return": "frozen"}\n{"error": {"desc": "x"}}\n[]\n'
    asyncio.run(check(AgentPlace(agent.path)))
    agent.stale = b'{"return": "frozen"}\n'
    assert_thawed(agent, freeze(agent))


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
def test_exception_while_frozen(agent: ScriptedAgent, error: type[BaseException]) -> None:
    async def body() -> None:
        raise error

    with pytest.raises(error):
        freeze(agent, body)
    assert not agent.frozen


@pytest.mark.parametrize("orphaned", [False, True])
def test_event_loop_goes_on(agent: ScriptedAgent, orphaned: bool) -> None:
    go_on = {command: threading.Event() for command in (FREEZE, THAW)}

    def waiting(command: str, act: Callable[[ScriptedAgent], int]) -> Any:
        def answer(agent: ScriptedAgent) -> dict[str, int]:
            go_on[command].wait()
            return {"return": act(agent)}

        return answer

    agent.script = {FREEZE: [waiting(FREEZE, ScriptedAgent.freeze)], THAW: [waiting(THAW, ScriptedAgent.thaw)]}

    async def bystander() -> None:
        for command, event in go_on.items():
            while command not in agent.commands:
                await asyncio.sleep(0.001)
            event.set()

    async def scenario() -> Freezer:
        other = asyncio.ensure_future(bystander())
        async with Freezer(AgentPlace(agent.path)) as freezer:
            if orphaned:
                kill(agent.clients[0])
        await other
        return freezer

    assert_thawed(agent, asyncio.run(scenario()))


def test_refused_freeze(agent: ScriptedAgent) -> None:
    agent.script[FREEZE] = [refusal("failed to freeze /data")]
    freezer = fail(agent, f"refused {FREEZE}: failed to freeze /data")
    assert freezer.thaw_error == ""
    assert agent.commands[-1] == THAW


def test_freeze_refused_half_way(agent: ScriptedAgent) -> None:
    def half(agent: ScriptedAgent) -> Any:
        agent.freeze()
        return {"error": {"class": "GenericError", "desc": "failed to freeze /data"}}

    agent.script[FREEZE] = [half]
    freezer = fail(agent, "failed to freeze /data")
    assert not agent.frozen
    assert freezer.thaw_error == ""


def test_freeze_of_nothing(agent: ScriptedAgent) -> None:
    agent.script[FREEZE] = [says({"return": 0})]
    assert fail(agent, "no file system that can be frozen").thaw_error == ""


def test_frozen_by_somebody_else(agent: ScriptedAgent) -> None:
    agent.frozen = True
    freezer = fail(agent, "another program has frozen the guest's file systems, and they stay frozen")
    assert freezer.thaw_error == ""
    assert agent.frozen
    assert THAW not in agent.commands


@pytest.mark.usefixtures("impatience")
def test_freeze_without_an_answer(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.script = {FREEZE: [mute_freeze], THAW: [silence, silence]}
    # The module does not wait until the guard has thawed.
    monkeypatch.setattr(guest_freeze, "THAW_TIMEOUT", 60.0)
    freezer = fail(agent, f"did not answer {FREEZE} within")
    assert "may still be frozen; a guard process" in freezer.thaw_error
    wait_until(lambda: not agent.frozen, "the guard's thaw")


@pytest.mark.usefixtures("impatience")
def test_thaw_follows_a_freeze_that_comes_after_everybody_has_gone(agent: ScriptedAgent) -> None:
    go_on = threading.Event()

    def late(agent: ScriptedAgent) -> dict[str, int]:
        go_on.wait()
        return {"return": agent.freeze()}

    agent.script[FREEZE] = [late]
    fail(agent, f"did not answer {FREEZE} within")
    wait_until(lambda: THAW.encode() in agent.unread, "the guard's command")
    kill(agent.clients[0])
    go_on.set()
    wait_until(lambda: THAW in agent.commands, "the agent")
    wait_until(lambda: not agent.frozen, "the thaw")


def kill(pid: int) -> None:
    """SIGKILL, and the end by it."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), "the end of the process")


@pytest.mark.usefixtures("impatience")
def test_thaw_that_is_not_seen(agent: ScriptedAgent) -> None:
    agent.script[THAW] = [silence] * 3
    freezer = freeze(agent)
    assert "may still be frozen; a guard process" in freezer.thaw_error
    assert freezer.frozen_ms == 0
    assert not freezer.held
    wait_until(lambda: not agent.frozen, "the guard's thaw")


@pytest.mark.parametrize("answer", [refusal("busy"), hang_up], ids=["refused", "broken off"])
def test_thaw_is_tried_again(agent: ScriptedAgent, answer: Any) -> None:
    agent.script[THAW] = [answer, answer]
    assert_thawed(agent, freeze(agent))
    assert agent.commands.count(THAW) == 3


def test_connection_that_broke_off_after_the_thaw(agent: ScriptedAgent) -> None:
    def thaw_and_hang_up(agent: ScriptedAgent) -> None:
        agent.thaw()
        hang_up(agent)

    agent.script[THAW] = [thaw_and_hang_up]
    assert_thawed(agent, freeze(agent), held=False)
    assert agent.commands.count(THAW) == 1


def test_vm_that_ends_while_frozen(tmp_path: Path) -> None:
    agent = ScriptedAgent(tmp_path / "agent")

    def end(agent: ScriptedAgent) -> None:
        agent.close()
        hang_up(agent)

    agent.script[THAW] = [end]
    with agent:
        freezer = freeze(agent)
    assert "the VM is off" in freezer.thaw_error


def test_thawed_by_somebody_else(agent: ScriptedAgent) -> None:
    async def body() -> None:
        agent.thaw()

    assert_thawed(agent, freeze(agent, body), held=False)


def test_module_that_hangs_while_frozen(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_freeze, "HOLD_LIMIT", 0.2)

    async def body() -> None:
        wait_until(lambda: not agent.frozen, "the guard's thaw")

    assert_thawed(agent, freeze(agent, body), held=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_module_killed_while_frozen(agent: ScriptedAgent, number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", MODULE, agent.path], stdout=subprocess.PIPE, text=True) as module:
        try:
            assert module.stdout
            assert module.stdout.readline() == "frozen\n"
            assert agent.frozen
            module.send_signal(number)
            module.wait(PATIENCE)
        finally:
            module.kill()
    wait_until(lambda: not agent.frozen, "the guard's thaw")


def test_module_cancelled_while_it_freezes(agent: ScriptedAgent) -> None:
    go_on = threading.Event()

    def slow(agent: ScriptedAgent) -> dict[str, int]:
        go_on.wait()
        return {"return": agent.freeze()}

    agent.script[FREEZE] = [slow]
    freezer = Freezer(AgentPlace(agent.path))

    async def scenario() -> None:
        entering = asyncio.ensure_future(freezer.__aenter__())
        while FREEZE not in agent.commands:
            await asyncio.sleep(0.001)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering

    asyncio.run(scenario())
    go_on.set()
    wait_until(lambda: THAW in agent.commands, "the guard")
    wait_until(lambda: not agent.frozen, "the thaw")
    # Nobody waited for that.
    assert "may still be frozen; a guard process" in freezer.thaw_error


def test_guard_killed_while_frozen(agent: ScriptedAgent) -> None:
    async def body() -> None:
        kill(agent.clients[0])
        assert agent.frozen

    assert_thawed(agent, freeze(agent, body))
    assert agent.clients[1:] == [os.getpid()]
    wait_until(lambda: agent.idle, "the end of the connection")


@pytest.mark.usefixtures("impatience")
def test_guard_killed_while_frozen_and_agent_silent(agent: ScriptedAgent) -> None:
    async def body() -> None:
        kill(agent.clients[0])
        agent.script[THAW] = [silence] * 100

    freezer = freeze(agent, body)
    assert f"did not answer {THAW} within" in freezer.thaw_error
    agent.script.clear()
    asyncio.run(thaw(AgentPlace(agent.path)))
    assert not agent.frozen


def test_guard_killed_while_it_freezes(agent: ScriptedAgent) -> None:
    def killing(agent: ScriptedAgent) -> None:
        kill(agent.clients[0])
        agent.freeze()

    agent.script[FREEZE] = [killing]
    freezer = fail(agent, "the guard process died while it froze the guest")
    assert not agent.frozen
    assert freezer.thaw_error == ""


def test_guard_killed_before_it_freezes(agent: ScriptedAgent) -> None:
    def killing(agent: ScriptedAgent) -> None:
        kill(agent.clients[0])

    agent.script[STATUS] = [killing]
    freezer = fail(agent, "the guard process died before it froze the guest")
    assert freezer.thaw_error == ""
    assert len(agent.clients) == 1
    assert not {FREEZE, THAW} & set(agent.commands)


def test_guard_lets_other_signals_pass(agent: ScriptedAgent) -> None:
    async def body() -> None:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(agent.clients[0], number)
        # Frozen still, and thawed by the guard in the end: it is the only client.

    assert_thawed(agent, freeze(agent, body))
    assert len(agent.clients) == 1


def test_guard_has_nothing_of_the_module(agent: ScriptedAgent, tmp_path: Path) -> None:
    async def body() -> None:
        guard = Path("/proc", str(agent.clients[0]))
        opened = {int(fd.name): str(fd.readlink()) for fd in (guard / "fd").iterdir()}
        standard = [opened.pop(number) for number in range(3)]
        assert standard == ["/dev/null"] * 3
        # To the agent, and to the module.
        assert len(opened) == 2, opened
        assert all(name.startswith("socket:") for name in opened.values())
        assert str((guard / "cwd").readlink()) == "/"
        assert os.getsid(agent.clients[0]) == agent.clients[0]

    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        assert_thawed(agent, freeze(agent, body))


def test_signals_are_as_before(agent: ScriptedAgent) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    freeze(agent)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_machine_without_room_for_a_guard(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    freezer = fail(agent, "cannot start a guard process for the guest: Resource temporarily unavailable")
    assert freezer.thaw_error == ""
    assert agent.commands == []


def test_many_at_once(tmp_path: Path) -> None:
    agents = [ScriptedAgent(tmp_path / f"agent{number}") for number in range(8)]

    async def one(agent: ScriptedAgent) -> Freezer:
        async with Freezer(AgentPlace(agent.path)) as freezer:
            everybody.discard(agent)
            while everybody:
                await asyncio.sleep(0.001)
            assert agent.frozen
        return freezer

    async def scenario() -> list[Freezer]:
        return await asyncio.gather(*(one(agent) for agent in agents))

    everybody = set(agents)
    with contextlib.ExitStack() as stack:
        for agent in agents:
            stack.enter_context(agent)
        for agent, freezer in zip(agents, asyncio.run(scenario()), strict=True):
            assert_thawed(agent, freezer)


def test_thawing_what_a_dead_module_left(agent: ScriptedAgent) -> None:
    agent.frozen = True
    asyncio.run(thaw(AgentPlace(agent.path)))
    assert not agent.frozen
    asyncio.run(thaw(AgentPlace(agent.path)))
    assert agent.commands.count(THAW) == 1


@pytest.mark.usefixtures("impatience")
def test_thawing_in_vain(agent: ScriptedAgent) -> None:
    agent.frozen = True
    agent.script[THAW] = [silence] * 100
    with pytest.raises(AgentError, match=f"did not answer {THAW} within"):
        asyncio.run(thaw(AgentPlace(agent.path)))
