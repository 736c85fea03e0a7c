# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said on the guest agent's channel. What freezing makes of it is tested in test_guest_freeze.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import AgentError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import guest_agent
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_agent import (
    Agent,
    AgentRefusal,
    wait_alone,
    wait_in_loop,
)
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import ScriptedAgent, says

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[ScriptedAgent]:
    """An agent that does as it is told."""
    with ScriptedAgent(tmp_path / "agent") as agent:
        yield agent


@pytest.mark.parametrize("wait", [wait_in_loop, wait_alone])
def test_conversation(agent: ScriptedAgent, wait: Any) -> None:
    async def scenario() -> list[Any]:
        async with Agent(agent.path, wait) as client:
            return [await client.frozen(), await client.freeze(), await client.frozen(), await client.thaw()]

    assert asyncio.run(scenario()) == [False, 2, True, 2]


@pytest.mark.parametrize("wait", [wait_in_loop, wait_alone])
def test_waiting(wait: Any) -> None:
    async def scenario() -> None:
        assert not await wait(None, 0.01)
        assert not await wait(one, 0.01)
        other.send(b"x")
        assert await wait(one, 60)
        assert not asyncio.get_running_loop().remove_reader(one)
        one.recv(1)
        other.close()
        assert await wait(one, 60)

    one, other = socket.socketpair()
    with one, other:
        asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(8))
def test_cancellation_is_not_lost(turns: int) -> None:
    async def scenario() -> None:
        waiting = asyncio.ensure_future(wait_in_loop(one, 60))
        await asyncio.sleep(0)
        other.send(b"x")
        for _turn in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            assert await waiting

    one, other = socket.socketpair()
    with one, other:
        asyncio.run(scenario())


def test_conversation_without_an_event_loop(agent: ScriptedAgent) -> None:
    async def scenario() -> None:
        async with Agent(agent.path, wait_alone) as client:
            assert not await client.frozen()

    with pytest.raises(StopIteration):
        scenario().send(None)


def test_answer_that_is_owed_is_not_taken_for_another(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def late(agent: ScriptedAgent) -> Any:
        go_on.wait()
        agent.freeze()
        return {"return": 77}

    async def scenario() -> int:
        async with Agent(agent.path) as client:
            monkeypatch.setattr(guest_agent, "FREEZE_TIMEOUT", 0.1)
            with pytest.raises(AgentError, match="did not answer guest-fsfreeze-freeze within"):
                await client.freeze()
            go_on.set()
            return await client.thaw()

    agent.script["guest-fsfreeze-freeze"] = [late]
    assert asyncio.run(scenario()) == 2


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ({"return": "many"}, AgentError, "is no guest agent"),
        ({"return": 1e400}, AgentError, "is no guest agent"),
        ({"error": {"class": "GenericError", "desc": "no"}}, AgentRefusal, "refused guest-fsfreeze-freeze: no$"),
        ({"error": {"class": "GenericError", "desc": "no" * 9999}}, AgentRefusal, "guest-fsfreeze-freeze: (no){250}$"),
        ({"error": "no"}, AgentRefusal, "refused guest-fsfreeze-freeze: no$"),
        ({"error": None}, AgentRefusal, "refused guest-fsfreeze-freeze: None$"),
    ],
)
def test_odd_answers(agent: ScriptedAgent, answer: Any, error: type[AgentError], message: str) -> None:
    async def scenario() -> None:
        async with Agent(agent.path) as client:
            await client.freeze()

    agent.script["guest-fsfreeze-freeze"] = [says(answer)]
    with pytest.raises(error, match=message):
        asyncio.run(scenario())


def test_an_answer_in_another_character_set_is_an_answer(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a guest sends one whose language is not English."""
    refusal = '{"error": {"class": "GenericError", "desc": "Zugriff verweigert: Gerät"}}\n'.encode("cp1252")

    async def scenario() -> int:
        async with Agent(agent.path) as client:
            with pytest.raises(AgentRefusal, match=r"refused guest-fsfreeze-freeze: Zugriff verweigert: Ger\ufffdt$"):
                await client.freeze()
            return await client.freeze()

    monkeypatch.setattr(guest_agent, "FREEZE_TIMEOUT", 2)
    agent.script["guest-fsfreeze-freeze"] = [says(refusal)]
    assert asyncio.run(scenario()) == 2


@pytest.mark.parametrize(
    "junk",
    [b"\xff\xfe\n", b"[" * 100000 + b"\n", b'{"event": "x"}\n', b"17\n" * 10000, b'{"return": ' + b"9" * 9999 + b"}\n"],
    ids=["no text", "deep", "no answer", "many", "large number"],
)
def test_junk_is_skipped(agent: ScriptedAgent, junk: bytes) -> None:
    agent.stale = junk
    asyncio.run(converse(agent))


async def converse(agent: ScriptedAgent, wait: Any = wait_in_loop) -> None:
    async with Agent(agent.path, wait) as client:
        assert not await client.frozen()


def test_answer_without_an_end(agent: ScriptedAgent) -> None:
    agent.stale = b"x" * (2 * guest_agent.ANSWER_LIMIT)
    with pytest.raises(AgentError, match="is no guest agent"):
        asyncio.run(converse(agent))


def test_answers_without_an_end(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(agent: ScriptedAgent) -> Any:
        with contextlib.suppress(OSError):
            while agent.connection:
                agent.connection.sendall(b'{"return": 0}\n' * 1000)

    async def there_is_always_more(connection: Any, _seconds: float) -> bool:
        return await wait_in_loop(connection, 60)

    agent.script["guest-sync"] = [flood]
    monkeypatch.setattr(guest_agent, "ANSWER_TIMEOUT", 0.2)
    with pytest.raises(AgentError, match="no guest agent answers within"):
        asyncio.run(converse(agent, there_is_always_more))


@pytest.mark.parametrize("leaves", [True, False])
def test_clients_wait_for_their_turn(agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    with contextlib.ExitStack() as others:

        def queue_up() -> None:
            """Until the backlog is full."""
            with contextlib.suppress(BlockingIOError):
                while True:
                    other = others.enter_context(socket.socket(socket.AF_UNIX))
                    other.setblocking(False)
                    other.connect(agent.path)

        queue_up()
        wait_until(lambda: agent.connection, "the first client's turn")
        queue_up()

        async def leave() -> None:
            others.close()

        async def scenario() -> None:
            await asyncio.gather(converse(agent), leave())

        if leaves:
            asyncio.run(scenario())
        else:
            monkeypatch.setattr(guest_agent, "ANSWER_TIMEOUT", 0.2)
            with pytest.raises(AgentError, match=r"or another client .* holds its socket"):
                asyncio.run(converse(agent))


def test_what_was_half_said_is_no_harm(agent: ScriptedAgent) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(agent.path)
        other.sendall(b'{"execute": "guest-fsfre')
    asyncio.run(converse(agent))
