# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which VMs are meant where sets are cancelled, and what another VM behind the monitor changes, without QEMU."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import cancel
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.cancel import plan_of_names
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import VmState
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import VmTask
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import EVERYTHING, Selection
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import this_machine
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Hypervisor, Phase, VmName
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import WEB01, begin, intent, manifest, put, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, jobs
from ansible_collections.vmfleet.backup.tests.unit.plugins.runs import PLANNED, in_run, locked, looked_at, put_intent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome
    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun
    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.session import LockedVm, VmSession
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def test_a_name_that_is_not_known_is_refused_with_those_that_are(repository: Repository, tmp_path: Path) -> None:
    """By the names that one gives, and not by those of directories."""
    put(repository, manifest("s1"))
    begin(repository, intent("s2", vm=VmName("web 02/ä", WEB01.uuid, WEB01.identity)))
    os.mkdir(os.path.join(repository.path, "exports"))
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", os.path.join(repository.path, "mine too"))
    with pytest.raises(Refused) as refused:
        plan_of_names(repository, Selection(("web03", "web01")))
    assert str(refused.value) == f"names: web03 has no set in {repository.path}; VMs there: web 02/ä, web01"


def test_without_names_those_are_meant_whose_sets_are_being_made_here(repository: Repository) -> None:
    put(repository, manifest("s1"))
    begin(repository, intent("s2", hypervisor=Hypervisor(*this_machine())))
    begin(repository, intent("s2", vm=replace(WEB01, name="web02")))
    assert [planned.name for planned in plan_of_names(repository, EVERYTHING).vms] == ["web01"]
    assert plan_of_names(repository, Selection(excluded=("web*",))).vms == ()


def test_a_domain_is_asked_for_at_the_libvirt_of_its_newest_set(repository: Repository) -> None:
    here, uri = Hypervisor(*this_machine()), "qemu:///session"
    put(repository, manifest("s1", hypervisor=here, monitor="libvirt:web01", libvirt_uri=uri))
    [planned] = plan_of_names(repository, Selection(("web01",))).vms
    assert planned.request.address.uri == uri
    begin(repository, intent("s2", hypervisor=here, monitor="libvirt:web01", libvirt_uri="qemu:///system"))
    [planned] = plan_of_names(repository, Selection(("web01",))).vms
    assert planned.request.address.uri == "qemu:///system"


@pytest.mark.parametrize(
    ("phase", "state"), [(Phase.PREPARING, "failed"), (Phase.COPYING, "failed"), (Phase.COPIED, "cancelled")]
)
def test_a_set_that_is_copied_is_cancelled_whatever_vm_answers(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, phase: Phase, state: str
) -> None:
    """The guest of that one is left alone, though the intent says that a guest is frozen."""
    seen = Observation(vm(identity="11111111-4a29-4f1c-9a55-6b6f1b7c2d10"))
    fake = FakeMonitor(jobs())
    task = VmTask(PLANNED)
    put_intent(repository, intent("today", phase=phase, frozen=True, agent="unix:/nowhere.agent"))

    async def observe(run: BackupRun, _task: VmTask) -> VmSession:
        return looked_at(run, seen, await run.repository.records("web01"), task)

    @asynccontextmanager
    async def hold_now(session: VmSession) -> AsyncIterator[LockedVm]:
        yield await locked(session.run, seen, fake, task)

    async def end(run: BackupRun) -> Outcome:
        return await cancel.cancel(run, task)

    monkeypatch.setattr(cancel, "observe", observe)
    monkeypatch.setattr(cancel, "hold_now", hold_now)
    outcome = in_run(repository, end, state=VmState.CANCELLED)
    assert (outcome.state, task.warnings) == (state, [])
    assert ("another VM answers at unix:/web01.qmp now. This set is not cancelled" in outcome.error) == (
        state == "failed"
    )
    assert bool(repository.records("web01").intents) == (state == "failed")
    assert not [name for name in fake.names() if not name.startswith("query-")]
