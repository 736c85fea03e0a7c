# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever a monitor or a guest agent answers: it is a VM with which all can go on, or one error in words."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import (
    AgentError,
    CommandError,
    MonitorError,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable, printable_result
from ansible_collections.vmfleet.backup.plugins.module_utils._common.redaction import redact_name, redact_text
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.preflight import hidden_files
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import estimate
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.agent_channel import find_agent
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.answers import check_answer, quoted
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.guest_agent import Agent
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import query_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.vm_config import describe_vm
from ansible_collections.vmfleet.backup.plugins.modules.vm_info import returned
from ansible_collections.vmfleet.backup.tests.harness.fuzzing import ANYTHING, changed, damaged, examples
from ansible_collections.vmfleet.backup.tests.harness.liars import VERSIONS, recorded
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm

HONEST = {version: recorded(version) for version in VERSIONS}


class Recorded(FakeMonitor):
    """Answers as a real QEMU has, or as somebody has changed that; each is checked as that of a real one."""

    senseless = Monitor.senseless  # type: ignore[assignment]

    def __init__(self, answers: dict[str, Any], version: str) -> None:
        super().__init__(answers, version=version)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        key = f"{command} {json.dumps(arguments or {}, sort_keys=True)}"
        if key not in self.answers:
            raise CommandError(str(self.address), command, "GenericError", "nobody has recorded that")
        try:
            check_answer(command, self.answers[key])
        except ValueError as odd:
            raise MonitorError(f"{self.address}: {quoted(str(odd))}") from None
        return self.answers[key]


async def look(asked: Monitor) -> tuple[Vm, Any, Any, Any]:
    """Ask for everything that is asked of a VM."""
    vm = await inspect_vm(asked)
    return vm, await find_agent(asked), await describe_vm(asked, vm), await query_jobs(asked)


def looked_at(answers: dict[str, Any], version: str) -> Any:
    try:
        return asyncio.run(look(monitor(Recorded(answers, version))))
    except (MonitorError, CommandError) as error:
        told = str(error)
    assert printable(told) == told
    return None


def assert_usable(found: tuple[Vm, Any, Any, Any]) -> None:
    """What is done next with a VM can be done."""
    vm, *others = found
    told = printable_result({"vm": returned(vm), "others": others[:-1], "jobs": [job.as_dict() for job in others[-1]]})
    json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    list(estimate_losses(vm))
    for disk in vm.disks:
        assert estimate.increment_bytes(disk, disk.bitmaps) >= 0
        assert vm.cannot_copy(disk) == ""
        assert vm.chain(disk)[0] is disk
    assert all(isinstance(name, str) for name in (vm.name, vm.identity, *vm.files, *hidden_files(vm), *vm.empty))


def estimate_losses(vm: Vm) -> Any:
    return [alias for disk in vm.disks for alias in (*disk.aliases, *(other.shares_file(disk) for other in vm.disks))]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_honest_ones_are_understood(version: str) -> None:
    found = looked_at(HONEST[version], f"{version}.0")
    assert [disk.name for disk in found[0].disks] == ["drive0", "vd1"]
    assert_usable(found)


@pytest.mark.parametrize("version", VERSIONS)
@examples(50)
@given(data=st.data())
def test_answers_of_a_monitor(version: str, data: st.DataObject) -> None:
    found = looked_at(data.draw(changed(HONEST[version])), f"{version}.0")
    if found:
        assert_usable(found)


@examples(50)
@given(answer=ANYTHING, question=st.sampled_from([one for one in HONEST["11.1"] if one != "greeting"]))
def test_anything_for_an_answer(answer: Any, question: str) -> None:
    found = looked_at({**HONEST["11.1"], question: answer}, "11.1.0")
    if found:
        assert_usable(found)


AGENT = {
    "guest-info": {"version": "7.2.22", "supported_commands": [{"name": name, "enabled": True} for name in COMMANDS]},
    "guest-fsfreeze-status": "thawed",
    "guest-fsfreeze-freeze": 2,
    "guest-fsfreeze-thaw": 2,
}


class Guest(Agent):
    """An agent's client whose guest has sent all its lines already, and then hangs up."""

    def __init__(self, lines: list[bytes]) -> None:
        async def at_once(_connection: Any, _seconds: float) -> bool:
            return True

        super().__init__("/run/vm.qga", at_once)
        self._lines.extend(lines)

    def _send(self, *_request: Any, **_more: Any) -> None:
        self._owed += 1

    def _read(self) -> None:
        raise self._broken("closed by the other side")


def settled(asked: Coroutine[Any, Any, Any]) -> Any:
    try:
        return asyncio.run(asked)
    except AgentError as error:
        told = str(error)
    assert printable(told) == told
    assert len(told) < 4000
    return None


@examples(50)
@given(data=st.data())
def test_answers_of_a_guest_agent(data: st.DataObject) -> None:
    async def talk(lines: list[bytes]) -> Any:
        agent = Guest(lines)
        try:
            await agent.require_freezable()
            return await agent.freeze(), await agent.thaw()
        finally:
            agent.close()

    said = data.draw(changed(AGENT))
    honest = ("guest-fsfreeze-status", "guest-info", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw")
    lines = [json.dumps({"return": said.get(name)}).encode("utf-8", "surrogatepass") for name in honest]
    place = data.draw(st.integers(0, len(lines)))
    lines[place:place] = data.draw(st.lists(damaged({"error": {"class": "GenericError", "desc": "no"}}), max_size=2))
    found = settled(talk(lines))
    for count in found or ():
        assert isinstance(count, int)
        assert not isinstance(count, bool)
        assert 0 <= count < 1 << 20


@examples(200)
@given(text=st.text(max_size=300))
def test_what_is_printable_stays_so(text: str) -> None:
    shown = printable(text)
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert printable(shown) == shown
    shown.encode()


PIECES = st.sampled_from(
    (
        *("json:", "{", "}", '"', "'", ":", ",", "=", "@", "/", "//", "://", "?", "&", " ", "\\", "%", "."),
        *("password", "secret", "token", "key", "rbd:", "nbd", "hunter2", "<removed>", "sig", "-", "_", "cookie", "x"),
    )
)


@examples(200)
@given(parts=st.lists(PIECES, max_size=30))
def test_a_redaction_ends_and_leaves_no_password(parts: list[str]) -> None:
    text = "".join(parts)
    for redact in (redact_name, redact_text):
        cleaned = redact(text)
        assert len(cleaned) <= 20 * len(text) + 20
        known = redact(f"nbd://user:hunter3@host/x {cleaned}" if redact is redact_text else "nbd://user:hunter3@host/x")
        assert "hunter3" not in known
    # A name that has been through it is told from others as before.
    assert redact_name(redact_name(text)) == redact_name(text)
    assert not re.search(r"(?<![\w-])password=hunter2", redact_text(text))
