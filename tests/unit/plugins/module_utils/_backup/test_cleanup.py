# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How attempts end that come to nothing, and what is found of them: real files, and a monitor from a script."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import cleanup
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import VmState
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import AGAIN, VmTask
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, MonitorTimeout, Unasked
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Phase
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import ELSEWHERE, bitmap, disk, image, job
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, block_job, jobs
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import ScriptedAgent
from ansible_collections.vmfleet.backup.tests.unit.plugins.runs import (
    PLANNED,
    TAG,
    in_run,
    locked,
    looked_at,
    put_intent,
    with_jobs,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import OFF, intent, vm

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Job
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

MADE = with_jobs(builders.intent("today", image("vda", bitmap=f"vmfleet-{TAG}-new"), attempt="a1", phase=Phase.COPYING))
JOB = MADE.jobs[0]
VDA = disk("vda", "n-vda", bitmaps=(bitmap(f"vmfleet-{TAG}-new"), bitmap("libvirt-1")))
COPYING = vm(VDA, jobs=(job(JOB),), fdsets={3: (f"vmfleet:{TAG}:a1:0",), 4: ("vmfleet:87654321:a1:0",)})


def scripted(**others: Any) -> FakeMonitor:
    """Return a monitor of a VM whose job runs until it is cancelled."""
    running, ended = jobs(block_job(JOB)), jobs(block_job(JOB, status="concluded", error="Operation canceled"))
    answers = {
        "query-block-jobs": iter([running["query-block-jobs"], *[ended["query-block-jobs"]] * 9]),
        "query-jobs": iter([running["query-jobs"], *[ended["query-jobs"]] * 9]),
        "block-job-cancel": {},
        "job-dismiss": {},
        "block-dirty-bitmap-remove": {},
        "query-status": {"status": "io-error", "running": False},
        "cont": {},
        **{name.replace("_", "-"): answer for name, answer in others.items()},
    }
    return FakeMonitor(answers)


def given_up(
    repository: Repository, there: Intent, seen: Observation, fake: FakeMonitor | None, error: str = "it is full"
) -> VmTask:
    task = VmTask(PLANNED)

    async def end(run: BackupRun) -> None:
        assert await cleanup.give_up(await locked(run, seen, fake, task), error) is AGAIN

    put_intent(repository, there)
    in_run(repository, end)
    return task


def test_an_attempt_that_fails_is_cancelled_written_down_and_removed(repository: Repository) -> None:
    fake = scripted()
    task = given_up(repository, MADE, Observation(COPYING), fake)
    told = [name for name in fake.names() if not name.startswith("query-")]
    assert told == ["block-job-cancel", "job-dismiss", "remove-fd", "block-dirty-bitmap-remove", "cont"]
    assert ("remove-fd", {"fdset-id": 3}) in fake.sent
    assert ("block-dirty-bitmap-remove", {"node": "n-vda", "name": f"vmfleet-{TAG}-new"}) in fake.sent
    assert os.listdir(repository.directory("web01")) == [".today.failed.json"]
    [failure] = repository.records("web01").failures
    assert (failure.run, failure.attempt, failure.state, failure.error) == ("run", "a1", "failed", "it is full")
    assert task.changed


def test_a_guest_that_stood_still_before_stays_so(repository: Repository) -> None:
    fake = scripted()
    given_up(repository, replace(MADE, guest="io-error"), Observation(COPYING), fake)
    assert "cont" not in fake.names()


@pytest.mark.parametrize(("jobs", "is_resumed"), [((job(JOB, "concluded"),), True), ((), False)])
def test_a_guest_that_has_stopped_goes_on_where_there_are_jobs(
    repository: Repository, jobs: tuple[Job, ...], is_resumed: bool
) -> None:
    """They need not tell of an error."""
    fake = scripted()
    given_up(repository, MADE, Observation(replace(COPYING, jobs=jobs)), fake)
    assert ("cont" in fake.names()) == is_resumed
    assert "remove-fd" in fake.names()


def test_the_failure_is_on_the_disk_before_anything_is_removed(repository: Repository) -> None:
    silent = MonitorTimeout("no answer")
    with pytest.raises(MonitorTimeout):
        given_up(repository, MADE, Observation(COPYING), scripted(block_job_cancel=silent))
    records = repository.records("web01")
    assert [failure.error for failure in records.failures] == ["it is full"]
    assert [left.attempt for left in records.intents] == ["a1"]


def test_what_goes_wrong_then_is_told_after_the_reason(repository: Repository) -> None:
    with pytest.raises(BackupError, match=r"^it is full; and then: no greeting; the set is unfinished"):
        given_up(repository, MADE, Observation(error="no greeting"), None)
    assert repository.records("web01").intents


def test_what_a_dead_qemu_was_making_needs_no_monitor(repository: Repository) -> None:
    given_up(repository, MADE, replace(OFF, dead=frozenset({"a1"})), None)
    assert os.listdir(repository.directory("web01")) == [".today.failed.json"]


def test_an_attempt_that_did_not_begin_leaves_nothing(repository: Repository) -> None:
    async def end(run: BackupRun) -> None:
        await cleanup.withdraw(await locked(run, Observation(vm(VDA)), scripted()), "")

    put_intent(repository, MADE)
    in_run(repository, end)
    assert os.listdir(repository.directory("web01")) == []


class TestThaw:
    @pytest.fixture
    def agent(self, tmp_path: Path) -> Any:
        with ScriptedAgent(tmp_path / "agent") as agent:
            agent.frozen = True
            yield agent

    def thaw(self, repository: Repository, agent: str, seen: Observation) -> tuple[VmTask, Intent]:
        frozen = intent(frozen=True, agent=agent)
        task = VmTask(PLANNED)

        async def end(run: BackupRun) -> None:
            await cleanup.thaw(await locked(run, seen, FakeMonitor(), task), frozen)

        put_intent(repository, frozen)
        in_run(repository, end)
        return task, repository.records("web01").intents[0]

    def test_the_guest_is_thawed_and_the_mark_goes(self, repository: Repository, agent: ScriptedAgent) -> None:
        task, left = self.thaw(repository, agent.path, Observation(vm()))
        assert (agent.frozen, left.frozen, task.warnings) == (False, False, [])

    def test_without_an_answer_the_mark_stays(self, repository: Repository, tmp_path: Path) -> None:
        task, left = self.thaw(repository, str(tmp_path / "nothing"), Observation(vm()))
        assert left.frozen
        assert "may still be frozen by this backup" in task.warnings[0]

    @pytest.mark.parametrize("answers", [True, False])
    def test_where_qemu_cannot_be_asked_the_agent_is(
        self, repository: Repository, agent: ScriptedAgent, tmp_path: Path, answers: bool
    ) -> None:
        """The mark is all that tells a later run of the freeze."""
        place = agent.path if answers else str(tmp_path / "nothing")
        _task, left = self.thaw(repository, place, Observation(error="no greeting"))
        assert (agent.frozen, left.frozen) == (not answers, not answers)

    def test_a_guest_that_has_ended_is_not_asked(self, repository: Repository, tmp_path: Path) -> None:
        seen = Observation(vm(), dead=frozenset({"a1"}))
        task, left = self.thaw(repository, str(tmp_path / "nothing"), seen)
        assert (left.frozen, task.warnings) == (False, [])

    @pytest.mark.parametrize("superseded", [True, False])
    def test_a_guest_of_our_own_is_thawed_before_its_set_is_removed(
        self, repository: Repository, agent: ScriptedAgent, superseded: bool
    ) -> None:
        """One that is taken over may be the guest of another hypervisor, and the agent's path mean another one here."""
        frozen = replace(
            MADE, id="monday", frozen=True, agent=agent.path, hypervisor=MADE.hypervisor if superseded else ELSEWHERE
        )

        async def end(run: BackupRun) -> VmTask:
            held = await locked(run, Observation(COPYING), scripted())
            await cleanup.remove(held, "")
            return held.task

        put_intent(repository, frozen)
        task = in_run(repository, end, supersede=superseded, takeover=not superseded)
        assert agent.frozen is not superseded
        [failure] = repository.records("web01").failures
        assert failure.state == (VmState.CANCELLED if superseded else VmState.FAILED)
        assert task.warnings == [f"the unfinished set monday was removed: {failure.error}"]


class TestLeftovers:
    def attempts(self, repository: Repository, records: VmRecords) -> set[str]:
        seen = vm(
            jobs=(job(f"vmfleet.{TAG}.aa.0", "concluded"), job("vmfleet.87654321.ab.0"), job("job7")),
            fdsets={1: (f"vmfleet:{TAG}:ac:0", "somebody's"), 2: ("vmfleet:87654321:ad:0",)},
            target_nodes=(f"vmf.{TAG}.ae.0", "vmf.87654321.af.0"),
        )
        return in_run(repository, lambda run: cleanup.leftover_attempts(looked_at(run, Observation(seen), records)))

    def test_are_jobs_files_and_nodes_of_this_repository(self, repository: Repository) -> None:
        assert self.attempts(repository, VmRecords()) == {"aa", "ac", "ae"}

    def test_are_not_those_of_a_set_that_is_being_made(self, repository: Repository) -> None:
        assert self.attempts(repository, VmRecords(intents=(intent(attempt="aa"),))) == {"ac", "ae"}

    def test_are_not_those_of_a_set_under_another_name(self, repository: Repository) -> None:
        put_intent(repository, intent(attempt="ac", vm=replace(builders.WEB01, name="db01")))
        assert self.attempts(repository, VmRecords()) == {"aa", "ae"}

    def test_of_a_published_set_are_no_attempt_under_another_name(self, repository: Repository) -> None:
        put_intent(repository, intent(vm=replace(builders.WEB01, name="db01")))
        Path(repository.staging_path("db01", "today"), "intent.json").write_text("nobody can read this")
        # It may be any of the other two.
        assert self.attempts(repository, VmRecords(sets=(builders.manifest("full", attempt="aa"),))) == set()
        made = [builders.manifest(f"s{number}", attempt=attempt) for number, attempt in enumerate(("aa", "ac", "ae"))]
        assert self.attempts(repository, VmRecords(sets=tuple(made))) == {"aa", "ac", "ae"}

    def bitmaps(self, repository: Repository, *wanted: str) -> list[tuple[str, str]]:
        names = (f"vmfleet-{TAG}-old", f"vmfleet-{TAG}-full", f"vmfleet-{TAG}-last", "vmfleet-87654321-x", "mine")
        own = disk("vda", "n-vda", bitmaps=tuple(map(bitmap, names)), layers=("below", "deeper"))
        below = disk("", "below", bitmaps=(bitmap(names[0]), bitmap(f"vmfleet-{TAG}-memory", persistent=False)))
        full = builders.manifest("full", image("vda", bitmap=names[1]))
        last = builders.manifest("last", image("vda", "full", bitmap=names[2]), sequence=2)
        records = VmRecords(sets=(full, last))
        seen = Observation(vm(own, other_nodes=(below,)))
        task = VmTask(replace(PLANNED, wanted=wanted[0] if wanted else "auto"))
        return in_run(repository, lambda run: cleanup.leftover_bitmaps(looked_at(run, seen, records, task)))

    def test_are_bitmaps_that_no_set_builds_on(self, repository: Repository) -> None:
        found = self.bitmaps(repository)
        assert found == [
            ("n-vda", f"vmfleet-{TAG}-old"),
            ("n-vda", f"vmfleet-{TAG}-full"),
            ("below", f"vmfleet-{TAG}-memory"),
        ]

    def test_are_not_the_bitmaps_that_differentials_build_on(self, repository: Repository) -> None:
        assert ("n-vda", f"vmfleet-{TAG}-full") not in self.bitmaps(repository, "differential")


def short_of(code: int) -> BackupError:
    error = BackupError("repository: vmfleet.json cannot be read")
    error.__cause__ = OSError(code, os.strerror(code))
    return error


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (Unasked("nobody could be sent"), False),
        (short_of(errno.EMFILE), False),
        (OSError(errno.EIO, "Input/output error"), True),
        (short_of(errno.EIO), True),
        (BackupError("it is another repository now"), True),
    ],
)
def test_whoever_cannot_ask_does_not_take_a_repository_for_gone(
    error: Exception, gone: bool, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_arguments: object, **_options: object) -> None:
        raise error

    async def give_up(run: BackupRun) -> str:
        task = VmTask(PLANNED, last_attempt=MADE)
        return (await cleanup.fail_vm(run, task, "no more processes")).error

    monkeypatch.setattr(cleanup.probe, "probe", fail)
    assert ("its jobs could not be cancelled" in in_run(repository, give_up)) is gone
