# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is looked at while jobs run: the guest, the space, the time, and the share of the bandwidth."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import VmTask, WaitFor
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import boottime
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation, Policy
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import StallClock
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import WEB01, job
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import ScriptedAgent
from ansible_collections.vmfleet.backup.tests.unit.plugins.runs import PLANNED, in_run, locked, looked_at, put_intent
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import JOB0, JOB1, intent, vm

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Job
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

FULL = Policy(reserve="99.9%")
"""With this reserve, every file system is short of space."""


def at(*offsets: int, **values: Any) -> tuple[Job, ...]:
    """Return the jobs of intent(), which have copied so much."""
    return tuple(job(name, offset=offset, **values) for name, offset in zip((JOB0, JOB1), offsets, strict=True))


def alarms(
    repository: Repository, there: Intent, *looks: tuple[Job, ...], task: VmTask | None = None, **options: Any
) -> list[str]:
    """Return what is alarming in each of several looks at one VM."""
    task = task or VmTask(PLANNED)

    async def look(run: BackupRun) -> list[str]:
        records = VmRecords(intents=(there,))
        return [await finish.find_alarm(looked_at(run, Observation(vm(jobs=found)), records, task)) for found in looks]

    return in_run(repository, look, **options)


class TestStandstill:
    def test_is_counted_from_the_last_advance(self, repository: Repository) -> None:
        task = VmTask(PLANNED)
        assert alarms(repository, intent(), at(1, 1), at(1, 2), at(1, 2), task=task, stall_timeout=100) == [""] * 3
        assert (task.watched, task.clock.copied, task.moved) == ("a1", 3, True)
        task.clock.since -= 101
        assert alarms(repository, intent(), at(1, 2), task=task, stall_timeout=100) == ["no progress for 100 s"]
        assert alarms(repository, intent(), at(1, 2), task=task, stall_timeout=0) == [""]
        assert alarms(repository, intent(), at(1, 3), task=task, stall_timeout=100) == [""]

    def test_is_counted_on_from_an_earlier_call(self, repository: Repository) -> None:
        long_ago = boottime() - 101
        stood = intent(progress=(3, long_ago))
        assert alarms(repository, stood, at(1, 2), stall_timeout=100) == ["no progress for 100 s"]
        assert alarms(repository, stood, at(1, 3), stall_timeout=100) == [""]

    def test_is_none_of_a_paused_job(self, repository: Repository) -> None:
        task = VmTask(PLANNED, watched="a1", clock=StallClock(boottime() - 101, 3))
        assert alarms(repository, intent(), at(1, 2, paused=True), task=task, stall_timeout=100) == [""]

    @pytest.mark.parametrize("moved", [False, True])
    def test_is_written_down_for_the_next_call(self, repository: Repository, moved: bool) -> None:
        put_intent(repository, intent())
        task = VmTask(PLANNED, watched="a1", clock=StallClock(77.5, 3), moved=moved, last_seen=(vm(), intent()))
        in_run(repository, lambda run: finish.note_progress(run, task))
        assert repository.records("web01").intents[0].progress == (() if moved else (3, 77.5))


def test_a_guest_that_our_target_has_stopped_is_alarming(repository: Repository) -> None:
    seen = Observation(vm(status="io-error", jobs=at(1, 1, error="EIO")))
    records = VmRecords(intents=(intent(),))
    [alarm] = [in_run(repository, lambda run: finish.find_alarm(looked_at(run, seen, records)))]
    assert alarm.startswith("the guest was stopped by an I/O error")


class TestSpace:
    def test_is_alarming_where_none_is_reserved(self, repository: Repository) -> None:
        [alarm] = alarms(repository, intent(reserved=False), at(1, 1), policy=FULL)
        assert alarm.startswith("only ")
        assert alarm.endswith("and the set's space could not be reserved")
        assert alarms(repository, intent(reserved=True), at(1, 1), policy=FULL) == [""]

    @pytest.mark.parametrize(("begun", "stops"), [(99.0, True), (101.0, False)])
    def test_stops_the_youngest_set_of_the_run_first(self, repository: Repository, begun: float, stops: bool) -> None:
        other = replace(PLANNED, name="db01")
        put_intent(repository, intent(reserved=False, begun=begun, vm=replace(WEB01, name="db01")))
        put_intent(repository, intent(reserved=False, begun=102.0, vm=replace(WEB01, name="of another run")))
        [alarm] = alarms(repository, intent(reserved=False), at(1, 1), policy=FULL, vms=(PLANNED, other))
        assert bool(alarm) is stops


def test_what_is_no_more_alarming_under_the_locks_goes_on(repository: Repository) -> None:
    task = VmTask(PLANNED)

    async def stop(run: BackupRun) -> WaitFor:
        held = await locked(run, Observation(vm(jobs=at(1, 1))), FakeMonitor(), task)
        return (await finish.stop(held, "the guest was stopped")).wait_for

    put_intent(repository, intent())
    assert in_run(repository, stop) == WaitFor.JOBS
    assert task.last_seen
    assert [left.attempt for left in repository.records("web01").intents] == ["a1"]
    assert ".today.failed.json" not in os.listdir(repository.directory("web01"))


def test_the_bandwidth_is_shared_among_the_jobs_that_copy(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeMonitor({"block-job-set-speed": {}})
    monkeypatch.setattr(finish, "Monitor", lambda _address, _commands: fake)
    records = VmRecords(intents=(intent(),))

    async def share(run: BackupRun) -> None:
        run.bandwidth.count("db01", 2)
        for jobs in (at(1, 1, speed=0), (job(JOB0, speed=250), job(JOB1, speed=100)), (job(JOB0, "concluded"),)):
            await finish.share_bandwidth(looked_at(run, Observation(vm(jobs=jobs)), records))
        assert run.bandwidth.share == 500

    in_run(repository, share, bandwidth=1000)
    assert fake.sent == [
        ("block-job-set-speed", {"device": JOB0, "speed": 250}),
        ("block-job-set-speed", {"device": JOB1, "speed": 250}),
        ("block-job-set-speed", {"device": JOB1, "speed": 250}),
    ]


def test_a_frozen_guest_is_thawed_before_its_images_are_read(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read them for their checksums can take hours."""
    with ScriptedAgent(tmp_path / "agent") as agent:
        agent.frozen = True
        frozen = intent(frozen=True, agent=agent.path)
        seen = Observation(vm(jobs=tuple(replace(one, status="concluded") for one in at(1, 1))))
        found = []

        async def finish_images(_run: BackupRun, _intent: Intent) -> tuple[()]:
            found.append(agent.frozen)
            return ()

        async def flush(run: BackupRun) -> None:
            records = VmRecords(intents=(frozen,))
            assert await finish.flush(looked_at(run, seen, records), "") is None

        monkeypatch.setattr(finish, "_finish_images", finish_images)
        in_run(repository, flush)
    assert found == [False]


@pytest.mark.parametrize(("now", "before", "resumed"), [("io-error", "running", 1), ("io-error", "io-error", 0)])
def test_a_guest_that_has_stopped_though_no_job_tells_of_an_error_goes_on(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, now: str, before: str, resumed: int
) -> None:
    fake = FakeMonitor({"query-status": {"status": now}, "cont": {}})
    monkeypatch.setattr(finish, "Monitor", lambda *_args: fake)
    task = VmTask(PLANNED)
    records = VmRecords(intents=(intent(guest=before),))

    async def follow_twice(run: BackupRun) -> None:
        for _look in range(2):
            # Not again at once: the guest's own disk may be at fault.
            await finish.follow(looked_at(run, Observation(vm(status=now, jobs=at(1, 1))), records, task), "")

    in_run(repository, follow_twice)
    assert fake.names().count("cont") == resumed
    assert len(task.warnings) == resumed
