# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a set is started, and what is left where that does not succeed: real files, and a monitor from a script."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import launch, prepare, start
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.prepare import AttemptDraft
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import AGAIN, VmTask, WaitFor
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import (
    MonitorError,
    MonitorGone,
    MonitorLost,
    MonitorTimeout,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import Admission, file_label
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import ChainLink
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation, Policy
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Phase
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import bitmap, disk, image
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    answers,
    block_job,
    device,
    jobs,
    monitor,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.runs import (
    PLANNED,
    TAG,
    in_run,
    locked,
    put_intent,
    with_jobs,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import intent, vm

if TYPE_CHECKING:
    from collections.abc import Callable

    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

VDA, VDB = disk("vda", "n-vda"), disk("vdb", "n-vdb", keeps_bitmaps=False)
IMAGES = (image("vda", "monday", bitmap="vmfleet-12345678-a"), image("vdb", bitmap="vmfleet-12345678-b"))
MADE = with_jobs(builders.intent("today", *IMAGES, attempt="a1", phase=Phase.PREPARING))
LINKS = (
    ChainLink("incremental", "", None, "", "old-a", records=(bitmap("old-a", count=65536),)),
    ChainLink("full", ""),
)
THERE = answers(
    [Node("n-vda", filename="/images/vda"), Node("n-vdb", filename="/images/vdb")],
    [device("n-vda", "vda"), device("n-vdb", "vdb")],
    transaction={},
)
DRAFT = AttemptDraft(MADE, (VDA, VDB), LINKS, {})


def launched(repository: Repository, fake: FakeMonitor, there: Intent = MADE, policy: Policy | None = None) -> Intent:
    async def begin(run: BackupRun) -> Intent:
        held = await locked(run, Observation(vm(VDA, VDB)), fake)
        return await launch.launch(held, monitor(fake), replace(DRAFT, intent=there), there, 1000)

    put_intent(repository, there)
    return in_run(repository, begin, policy=policy)


@pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")
@pytest.mark.parametrize("label", ["", "system_u:object_r:svirt_image_t:s0:c1,c2"])
def test_images_are_labelled_for_a_confined_qemu(repository: Repository, label: str) -> None:
    before = "system_u:object_r:var_t:s0"
    seen = Observation(vm(VDA, VDB), admission=Admission("", before, label))

    async def make(run: BackupRun) -> tuple[Intent, list[str]]:
        held = await locked(run, seen, FakeMonitor())
        made = await prepare._make_images(held, MADE, (ChainLink("full", ""),) * 2, {})
        return made, [run.images.fd(path) for path in run.image_paths(made)]

    os.makedirs(repository.directory(MADE.vm.name))
    staging.begin(repository, MADE)
    made, fds = in_run(repository, make)
    assert [file_label(fd) for fd in fds] == [label, label]
    assert [disk.label for disk in made.disks] == [before if label else ""] * 2
    for fd in fds:
        os.close(fd)


class TestLaunch:
    def test_all_jobs_and_bitmaps_begin_in_one_transaction(self, repository: Repository) -> None:
        fake = FakeMonitor(THERE)
        done = launched(repository, fake, policy=Policy(compression="zstd"))
        [arguments] = [arguments for command, arguments in fake.sent if command == "transaction"]
        assert arguments["properties"] == {"completion-mode": "individual"}
        actions = [(action["type"], action["data"]) for action in arguments["actions"]]
        assert actions[:2] == [
            ("block-dirty-bitmap-add", {"node": "n-vda", "name": "vmfleet-12345678-a", "persistent": True}),
            ("block-dirty-bitmap-add", {"node": "n-vdb", "name": "vmfleet-12345678-b", "persistent": False}),
        ]
        copies = [{name: value for name, value in data.items() if name != "target"} for _type, data in actions[2:]]
        common = {"auto-dismiss": False, "mode": "existing", "format": "qcow2", "speed": 1000, "compress": True}
        assert copies == [
            {
                **common,
                "job-id": f"vmfleet.{TAG}.a1.0",
                "device": "n-vda",
                "sync": "bitmap",
                "bitmap": "old-a",
                "bitmap-mode": "never",
            },
            {**common, "job-id": f"vmfleet.{TAG}.a1.1", "device": "n-vdb", "sync": "full"},
        ]
        assert [opaque for opaque, _flags in fake.passed] == [f"vmfleet:{TAG}:a1:0", f"vmfleet:{TAG}:a1:1"]
        assert (done.phase, fake.fdsets) == (Phase.COPYING, set())
        assert repository.records("web01").intents == (done,)

    def test_an_increment_gets_space_for_what_was_written_since(self, repository: Repository) -> None:
        there = replace(MADE, reserved=True, disks=tuple(replace(disk, expected=0) for disk in MADE.disks))
        listed = jobs(*(block_job(name, len=1 << 20) for name in MADE.jobs))
        launched(repository, FakeMonitor({**THERE, **listed}), there)
        sizes = [os.stat(repository.image_path(MADE, name)).st_blocks * 512 for name in ("vda.qcow2", "vdb.qcow2")]
        assert sizes[0] >= (1 << 20) - 65536
        assert sizes[1] < 65536


def held_answers(**others: Any) -> dict[str, Any]:
    return answers([Node("n-vda")], [device("n-vda", "vda")], **others)


def test_a_guest_that_cannot_be_frozen_is_not_touched(repository: Repository) -> None:
    task = VmTask(replace(PLANNED, quiesce="require"))

    async def begin(run: BackupRun) -> Any:
        held = await locked(run, Observation(vm(VDA, status="paused")), FakeMonitor(), task)
        return await start.start(held, "")

    assert in_run(repository, begin, vms=(task.planned,)) is AGAIN
    records = repository.records("web01")
    assert records.intents == ()
    [failure] = records.failures
    assert failure.run == "run"
    assert failure.error.startswith("VM web01: quiesce: the VM does not run (paused)")


class TestDraft:
    """What goes wrong with a monitor before anything of a set exists."""

    @pytest.fixture
    def begin(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Callable[[VmTask, Exception], Any]:
        def begin(task: VmTask, error: Exception) -> Any:
            async def draft(*_args: object) -> AttemptDraft:
                raise error

            async def begin(run: BackupRun) -> Any:
                return await start.start(await locked(run, Observation(vm(VDA)), FakeMonitor(), task), "")

            monkeypatch.setattr(start, "draft_attempt", draft)
            return in_run(repository, begin)

        return begin

    def test_a_way_that_has_broken_off_is_tried_again(
        self, repository: Repository, begin: Callable[[VmTask, Exception], Any]
    ) -> None:
        task = VmTask(PLANNED)
        for _time in range(2):
            with pytest.raises(MonitorLost):
                begin(task, MonitorLost("libvirt was restarted"))
        assert repository.records("web01").failures == ()

    def test_one_that_has_ended_is_looked_at_again_but_once_only(
        self, repository: Repository, begin: Callable[[VmTask, Exception], Any]
    ) -> None:
        task = VmTask(PLANNED)
        assert begin(task, MonitorGone("it has ended")) is AGAIN
        assert repository.records("web01").failures == ()
        assert begin(task, MonitorGone("it has ended")) is AGAIN
        assert [failure.error for failure in repository.records("web01").failures] == ["it has ended"]

    @pytest.mark.parametrize("error", [MonitorTimeout("no answer"), MonitorError("it makes no sense")])
    def test_one_that_does_not_answer_has_failed(
        self, repository: Repository, begin: Callable[[VmTask, Exception], Any], error: Exception
    ) -> None:
        assert begin(VmTask(PLANNED), error) is AGAIN
        assert [failure.error for failure in repository.records("web01").failures] == [str(error)]


class TestUndo:
    def end(self, repository: Repository, there: Intent | None, drafted: Intent, fake: FakeMonitor) -> None:
        async def undo(run: BackupRun) -> Any:
            return await start._undo(
                await locked(run, Observation(vm(VDA)), fake), monitor(fake), drafted, "it is full"
            )

        if there:
            put_intent(repository, there)
        assert in_run(repository, undo) is AGAIN

    def test_removes_what_was_begun(self, repository: Repository) -> None:
        fake = FakeMonitor(held_answers())
        self.end(repository, MADE, MADE, fake)
        assert os.listdir(repository.directory("web01")) == [".today.failed.json"]
        [failure] = repository.records("web01").failures
        assert (failure.attempt, failure.error) == ("a1", "it is full")

    def test_touches_no_set_of_somebody_else(self, repository: Repository) -> None:
        self.end(repository, intent(attempt="theirs"), MADE, FakeMonitor(held_answers()))
        assert [left.attempt for left in repository.records("web01").intents] == ["theirs"]


class TestBrokenConnection:
    @pytest.fixture(autouse=True)
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def draft(*_args: object) -> AttemptDraft:
            return DRAFT

        async def prepare(*_args: object) -> Intent:
            raise MonitorGone("the connection is gone")

        monkeypatch.setattr(start, "draft_attempt", draft)
        monkeypatch.setattr(start, "prepare_attempt", prepare)

    def begin(self, repository: Repository, task: VmTask) -> Any:
        async def begin(run: BackupRun) -> Any:
            return await start.start(await locked(run, Observation(vm(VDA)), FakeMonitor(), task), "")

        return in_run(repository, begin)

    def test_is_for_the_next_look_to_judge_but_once_only(self, repository: Repository) -> None:
        task = VmTask(PLANNED)
        assert self.begin(repository, task).wait_for == WaitFor.MONITOR
        assert task.last_attempt == MADE
        with pytest.raises(MonitorGone):
            self.begin(repository, task)
