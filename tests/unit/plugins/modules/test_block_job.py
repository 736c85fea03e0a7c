# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""block_job: the states of a job, and the commands that lead there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, CommandError
from ansible_collections.vmfleet.backup.plugins.modules import block_job
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import job
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, jobs, refusal
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import block_job as entry

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Job

RUNNING = job("j0")
PAUSED = job("j0", "paused", paused=True)
PENDING = job("j0", "pending")
CONCLUDED = job("j0", "concluded")
CONCLUDED_PAUSED = job("j0", "concluded", paused=True)

REACHED: dict[str, list[Job | None]] = {
    "cancelled": [CONCLUDED, None],
    "dismissed": [None],
    "paused": [PAUSED],
    "running": [RUNNING, PENDING],
    "finalized": [CONCLUDED, CONCLUDED_PAUSED],
}


@pytest.mark.parametrize("found", [RUNNING, PAUSED, PENDING, CONCLUDED, None])
@pytest.mark.parametrize("state", list(block_job.COMMANDS))
def test_reached(found: Job | None, state: str) -> None:
    assert block_job.reached(found, state) is (found in REACHED[state])


@pytest.mark.parametrize("state", ["paused", "running"])
def test_ended_job_is_neither_paused_nor_running(state: str) -> None:
    assert not block_job.reached(CONCLUDED_PAUSED, state)


@pytest.mark.parametrize("found", [RUNNING, None])
def test_no_state_asked_for_is_reached(found: Job | None) -> None:
    assert block_job.reached(found, None)


@pytest.mark.parametrize(
    ("state", "command"),
    [
        ("cancelled", ("block-job-cancel", {"device": "j0", "force": True})),
        ("paused", ("job-pause", {"id": "j0"})),
        ("running", ("job-resume", {"id": "j0"})),
        ("finalized", ("job-finalize", {"id": "j0"})),
        ("dismissed", ("job-dismiss", {"id": "j0"})),
    ],
)
def test_command(state: str, command: tuple[str, dict[str, Any]]) -> None:
    assert block_job.command("j0", state) == command


class Qemu(FakeMonitor):
    """One job that obeys."""

    EFFECTS: dict[str, dict[str, Any] | None] = {  # noqa: RUF012
        "block-job-cancel": {"status": "concluded", "error": "Operation canceled"},
        "job-pause": {"status": "paused", "paused": True},
        "job-resume": {"status": "running", "paused": False},
        "job-finalize": {"status": "concluded"},
        "job-dismiss": None,
    }

    def __init__(self, found: dict[str, Any] | None, **answers: Any) -> None:
        super().__init__()
        self.found = found
        for command, effect in self.EFFECTS.items():
            self.answers[command] = lambda _arguments, effect=effect: self.become(effect)
        self.answers["block-job-set-speed"] = lambda arguments: self.become({"speed": arguments["speed"]})
        for query in ("query-block-jobs", "query-jobs"):
            self.answers[query] = lambda _arguments, query=query: jobs(*filter(None, [self.found]))[query]
        self.answers.update(answers)

    def become(self, effect: dict[str, Any] | None) -> dict[str, Any]:
        self.found = None if effect is None or self.found is None else {**self.found, **effect}
        return {}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(fake: FakeMonitor, check_mode: bool = False, **params: Any) -> dict[str, Any]:
        def connect(_address: object, commands: list[dict[str, Any]]) -> FakeMonitor:
            fake.commands = commands
            return fake

        monkeypatch.setattr(block_job, "Monitor", connect)
        given = {
            "monitor": "/run/qemu/web01.qmp",
            "libvirt_uri": "",
            "job_id": "j0",
            "state": None,
            "speed": None,
            **params,
        }
        return asyncio.run(block_job.main_task(SimpleNamespace(params=given, check_mode=check_mode)))  # type: ignore[arg-type]

    return call


def sent(result: dict[str, Any]) -> list[str]:
    return [command["execute"] for command in result["qmp"]]


STATES = {
    "running": entry(),
    "paused": entry(status="paused", paused=True),
    "pending": entry(status="pending"),
    "concluded": entry(status="concluded"),
    "absent": None,
}


@pytest.mark.parametrize(
    ("before", "state", "commands"),
    [
        ("running", "cancelled", ["block-job-cancel"]),
        ("paused", "cancelled", ["block-job-cancel"]),
        ("concluded", "cancelled", []),
        ("absent", "cancelled", []),
        ("running", "paused", ["job-pause"]),
        ("paused", "paused", []),
        ("running", "running", []),
        ("paused", "running", ["job-resume"]),
        ("pending", "finalized", ["job-finalize"]),
        ("concluded", "finalized", []),
        ("concluded", "dismissed", ["job-dismiss"]),
        ("absent", "dismissed", []),
    ],
)
def test_state_is_reached_and_kept(before: str, state: str, commands: list[str], run: Any) -> None:
    qemu = Qemu(STATES[before])
    foreseen = run(qemu, check_mode=True, state=state)
    assert not qemu.commands
    result = run(qemu, state=state)
    assert sent(result) == commands
    assert result["changed"] is foreseen["changed"] is bool(commands)
    assert result["diff"] == foreseen["diff"]
    assert (result["diff"]["before"] != result["diff"]["after"]) is bool(commands)
    assert bool(result["job"]) is (qemu.found is not None)
    again = run(qemu, state=state)
    assert not again["changed"]
    assert not again["qmp"]


def test_speed(run: Any) -> None:
    qemu = Qemu(entry(speed=0))
    result = run(qemu, speed=5)
    assert (result["changed"], result["job"]["speed"]) == (True, 5)
    assert result["qmp"] == [{"execute": "block-job-set-speed", "arguments": {"device": "j0", "speed": 5}}]
    assert not run(qemu, speed=5)["changed"]


def test_speed_and_state(run: Any) -> None:
    result = run(Qemu(entry()), speed=5, state="paused")
    assert sent(result) == ["block-job-set-speed", "job-pause"]
    assert (result["job"]["speed"], result["job"]["paused"]) == (5, True)


def test_speed_zero_is_asked_for(run: Any) -> None:
    assert run(Qemu(entry(speed=5)), speed=0)["job"]["speed"] == 0


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("before", "params", "reason"),
    [
        ("absent", {"state": "paused"}, "is not a job of this VM; the VM's jobs: none"),
        ("absent", {"state": "finalized"}, "is not a job of this VM"),
        ("absent", {"speed": 5}, "is not a job of this VM"),
        ("concluded", {"state": "running"}, "has ended; the VM's jobs: j0"),
        ("concluded", {"speed": 5}, "has ended"),
    ],
)
def test_refused_before_anything_is_sent(
    before: str, params: dict[str, Any], reason: str, check_mode: bool, run: Any
) -> None:
    qemu = Qemu(STATES[before])
    with pytest.raises(BackupError, match=reason):
        run(qemu, check_mode=check_mode, **params)
    assert not qemu.commands


def test_refusal_of_qemu_stands(run: Any) -> None:
    qemu = Qemu(STATES["running"], **{"job-dismiss": refusal("cannot accept command verb 'dismiss'", "job-dismiss")})
    with pytest.raises(CommandError, match="cannot accept") as refused:
        run(qemu, state="dismissed")
    assert sent(refused.value.details) == ["job-dismiss"]


def test_job_that_ended_by_itself_needs_no_cancelling(run: Any) -> None:
    qemu = Qemu(STATES["running"])

    def end(_arguments: dict[str, Any]) -> None:
        qemu.become({"status": "concluded"})
        raise refusal("Job not found", "block-job-cancel")

    qemu.answers["block-job-cancel"] = end
    assert run(qemu, state="cancelled")["job"]["status"] == "concluded"


def test_job_that_ends_right_after_its_resume_is_no_failure(run: Any) -> None:
    qemu = Qemu(STATES["paused"])
    qemu.answers["job-resume"] = lambda _arguments: qemu.become({"status": "concluded", "paused": False})
    assert run(qemu, state="running")["changed"]


def test_state_that_is_not_reached_is_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_job, "SETTLE_TIMEOUT", 0.05)
    with pytest.raises(BackupError, match=r"^job_id: j0 is running and not cancelled after 0\.05 s$"):
        run(Qemu(STATES["running"], **{"block-job-cancel": {}}), state="cancelled")
