# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A guest agent says what a hostile guest likes: it costs the consistency of that guest's set, and nothing else.

Real VMs, with agents from a script. No guest stays frozen, and the one beside them is backed up as it should.
"""

from __future__ import annotations

import contextlib
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import create
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import (
    ScriptedAgent,
    hang_up,
    mute_freeze,
    refusal,
    says,
    silence,
)

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

SYNC = "guest-sync"
INFO = "guest-info"
STATUS = "guest-fsfreeze-status"
FREEZE = "guest-fsfreeze-freeze"
THAW = "guest-fsfreeze-thaw"
BOUND = 300
"""Seconds for the sets of all of them, on a machine that is busy."""

Command = t.Callable[[ScriptedAgent], t.Any]


def value(found: t.Any) -> Command:
    """A command that does nothing and returns this."""
    return says({"return": found})


def frozen_and(found: t.Any) -> Command:
    """A freeze that is made, and answered oddly."""

    def freeze(agent: ScriptedAgent) -> t.Any:
        agent.freeze()
        return found

    return freeze


def thawed_and(found: t.Any) -> Command:
    """A thaw that is made, and answered oddly."""

    def thaw(agent: ScriptedAgent) -> t.Any:
        agent.thaw()
        return found

    return thaw


ODD: dict[str, tuple[str, Command]] = {
    "another's number": (SYNC, value(1)),
    "a list for a number": (SYNC, value([])),
    "junk for an answer": (SYNC, says(b"\x00\xff\xfe\n" * 1000)),
    "no line's end": (SYNC, says(b"x" * (2 << 20))),
    "lists within lists": (SYNC, says(b"[" * 100_000 + b"\n")),
    "hangs up": (SYNC, hang_up),
    "silence": (SYNC, silence),
    "info is a list": (INFO, value([])),
    "info is null": (INFO, value(None)),
    "commands are null": (INFO, value({"supported_commands": None})),
    "commands are a text": (INFO, value({"supported_commands": "freeze"})),
    "a command is a number": (INFO, value({"supported_commands": [7]})),
    "a command has no name": (INFO, value({"supported_commands": [{"enabled": True}]})),
    "a command's name is a list": (INFO, value({"supported_commands": [{"name": [], "enabled": True}]})),
    "status is null": (STATUS, value(None)),
    "status is a list": (STATUS, value(["thawed"])),
    "status is a word of its own": (STATUS, value("melted")),
    "number of file systems is a text": (FREEZE, frozen_and({"return": "2"})),
    "number of file systems is true": (FREEZE, frozen_and({"return": True})),
    "number of file systems is a fraction": (FREEZE, frozen_and({"return": 1.5})),
    "number of file systems below zero": (FREEZE, frozen_and({"return": -1})),
    "number of file systems of many digits": (FREEZE, frozen_and(b'{"return": ' + b"9" * 4000 + b"}\n")),
    "number of file systems is a list": (FREEZE, frozen_and({"return": [1]})),
    "frozen, and nothing said": (FREEZE, mute_freeze),
    "frozen, and refused": (FREEZE, frozen_and({"error": None})),
    "error is a list": (FREEZE, says({"error": ["no"]})),
    "error is very long": (FREEZE, refusal("x" * 500_000)),
    "error steers a terminal": (FREEZE, refusal("a\x1b[2J\x07\nFAILED  good: \u202eb\ud800")),
    "number of thawed ones is a text": (THAW, thawed_and({"return": "2"})),
    "number of thawed ones below zero": (THAW, thawed_and({"return": -7})),
    "thawed, and hung up": (THAW, lambda agent: hang_up(agent) if agent.thaw() else None),
}
"""What an agent says, each time, to one command."""


def test_each_costs_its_own_freeze(vms: Vms, sets: Sets, directory: Path) -> None:
    base = [Disk(create(directory / f"d{number}.qcow2", 1 << 20), node="n0") for number in range(len(ODD) + 1)]
    with contextlib.ExitStack() as stack:
        agents: dict[str, ScriptedAgent] = {}
        wanted = []
        for number, disk in enumerate(base):
            vm = vms.start(disk, name=f"vm{number}")
            agent = stack.enter_context(ScriptedAgent(vm.directory / "agent"))
            agents[f"vm{number}"] = agent
            wanted.append({"monitor": str(vm.monitor), "agent": agent.path, "quiesce": "try"})
        for name, (command, odd) in zip(list(agents)[1:], ODD.values(), strict=True):
            agents[name].script[command] = [odd] * 10_000
        plan = sets.plan(vms=wanted)["plan"]
        begun = time.monotonic()
        result = run_module("backup_set", {"plan": plan, "max_vms": 0}, timeout=BOUND)
        assert result["rc"] == 0, result
        assert time.monotonic() - begun < BOUND
        assert result_of(result, "vm0")["consistency"] == "filesystem"
        for name, what in zip(list(agents)[1:], ODD, strict=True):
            found = result_of(result, name)
            assert found["state"] == "published", (what, found)
            assert found["consistency"] == "crash", (what, found)
            assert agents[name].path in found["consistency_reason"] or "thaw" in found["consistency_reason"], (
                what,
                found,
            )
            for said in (found["consistency_reason"], *found["warnings"]):
                assert said.isprintable(), (what, said)
                assert len(said) < 2500, (what, said)
        assert not any("Traceback" in warning for warning in result["warnings"])
        for name, agent in agents.items():
            wait_until(lambda agent=agent: not agent.frozen and agent.idle, f"the thaw of {name}", timeout=60)
