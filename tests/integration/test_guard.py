# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Freezing a real guest that writes all the time: it stops, and in the end always goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import AgentError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import guest_agent
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_freeze import AgentPlace, Freezer, check, thaw
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until

if t.TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

MODULE = """
import asyncio, sys
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_freeze import AgentPlace, Freezer
async def main():
    async with Freezer(AgentPlace(sys.argv[1])):
        print("frozen", flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""


@pytest.fixture
def guest(directory: Path) -> Iterator[Guest]:
    """A guest that writes."""
    with Guest(directory) as guest:
        yield guest


def ask(guest: Guest, command: str) -> t.Any:
    """One command to the agent, by something that shares no code with the collection."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(guest.agent))
        with connection.makefile("rw") as stream:
            for request in ({"execute": "guest-sync", "arguments": {"id": 4711}}, {"execute": command}):
                stream.write(json.dumps(request) + "\n")
            stream.flush()
            while json.loads(stream.readline()) != {"return": 4711}:
                pass
            return json.loads(stream.readline())["return"]


def written(guest: Guest) -> int:
    """How much the guest has written to its disks."""
    return sum(int(disk["stats"]["wr_bytes"]) for disk in guest.qmp.execute("query-blockstats"))


def assert_writes(guest: Guest) -> None:
    """The guest goes on writing, and says itself that it is not frozen."""
    rounds = guest.rounds
    wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")
    assert ask(guest, "guest-fsfreeze-status") == "thawed"


def test_frozen_guest_stands_still_and_goes_on(guest: Guest) -> None:
    async def scenario() -> Freezer:
        await check(AgentPlace(str(guest.agent)))
        async with Freezer(AgentPlace(str(guest.agent))) as freezer:
            assert freezer.filesystems == len(guest.disks)
            before = written(guest)
            await asyncio.sleep(1)
            assert written(guest) == before
        return freezer

    freezer = asyncio.run(scenario())
    assert freezer.held
    assert freezer.frozen_ms > 0
    assert freezer.thaw_error == ""
    assert_writes(guest)


def test_module_killed_while_frozen(guest: Guest) -> None:
    command = [sys.executable, "-c", MODULE, str(guest.agent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as module:
        assert module.stdout
        assert module.stdout.readline() == "frozen\n"
        module.send_signal(signal.SIGKILL)
    assert_writes(guest)


def test_guard_killed_while_frozen(guest: Guest) -> None:
    async def scenario() -> Freezer:
        async with Freezer(AgentPlace(str(guest.agent))) as freezer:
            os.kill(guard_of(guest), signal.SIGKILL)
        return freezer

    freezer = asyncio.run(scenario())
    assert freezer.held
    assert freezer.thaw_error == ""
    assert_writes(guest)


def guard_of(guest: Guest) -> int:
    """The process that this one has started and that leads a session of its own."""
    mine = Path("/proc/self/cmdline").read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        # Processes come and go.
        with contextlib.suppress(OSError):
            pid = int(process.name)
            if (process / "cmdline").read_bytes() == mine and os.getsid(pid) == pid != os.getpid():
                return pid
    raise AssertionError(f"no guard of {guest.agent}")


def test_frozen_by_somebody_else_stays_frozen(guest: Guest) -> None:
    assert ask(guest, "guest-fsfreeze-freeze") == len(guest.disks)

    async def scenario() -> None:
        with pytest.raises(AgentError, match="another program has frozen"):
            await check(AgentPlace(str(guest.agent)))
        with pytest.raises(AgentError, match="another program has frozen"):
            async with Freezer(AgentPlace(str(guest.agent))):
                pytest.fail("frozen twice")

    asyncio.run(scenario())
    assert ask(guest, "guest-fsfreeze-status") == "frozen"
    asyncio.run(thaw(AgentPlace(str(guest.agent))))
    assert_writes(guest)


def test_freeze_that_takes_too_long_is_undone(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> str:
        freezer = Freezer(AgentPlace(str(guest.agent)))
        with pytest.raises(AgentError, match="did not answer guest-fsfreeze-freeze"):
            async with freezer:
                pytest.fail("frozen")
        return freezer.thaw_error

    monkeypatch.setattr(guest_agent, "FREEZE_TIMEOUT", 0.0)
    assert "may still be frozen; a guard process" in asyncio.run(scenario())
    assert_writes(guest)


def test_guest_without_an_agent(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "ANSWER_TIMEOUT", 1.0)
    no_agent = pytest.raises(AgentError, match="no guest agent answers")
    with no_agent, Guest(directory, agent=False, writer=False) as guest:
        asyncio.run(check(AgentPlace(str(guest.agent))))
