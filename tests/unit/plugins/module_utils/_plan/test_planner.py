# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The plan of many VMs: twins are refused, and what goes wrong with one is told of that one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import RepositoryHangs, ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import EVERYTHING, Selection
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import planner
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.decide import decide
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import (
    Observation,
    Plan,
    Policy,
    Request,
    Space,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.planner import draw_up, refuse_duplicates
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.discovery import Discovery
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository, VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import GOLDEN, OFF, REQUEST, TERMS, VDA, start, vm

POLICY = Policy(reserve="0")


def test_a_twin_is_nobody_to_look_after() -> None:
    [twin, _other] = refuse_duplicates([replace(start("web"), identity=UUID, unless="adopt"), start("web")], {})
    assert (twin.identity, twin.unless) == ("", "")


def test_twins_are_not_touched() -> None:
    plans = [start("web"), start("web", monitor="unix:/web2"), start("db"), start("db2"), start("good")]
    processes = {"unix:/db": (7, 1), "unix:/db2": (7, 1), "unix:/good": (8, 1)}
    checked = refuse_duplicates(plans, processes)
    assert [plan.action for plan in checked] == ["fail", "fail", "fail", "fail", "start"]
    assert "unix:/web2" in checked[0].reason
    assert "unix:/db2" in checked[2].reason


def test_the_plan_reads_well() -> None:
    space = Space(free=100 << 20, reserve=10 << 20, promised=0, reservable=False)
    decided = decide(REQUEST, Observation(vm(VDA, GOLDEN)), VmRecords(), TERMS).plan
    failing = decide(Request("db", "unix:/db"), OFF, VmRecords(), TERMS).plan
    plan = Plan("/srv/backup", True, "run", "today", Policy(), space, (decided, failing), ())
    assert planner.describe(plan) == [
        "Backup today to /srv/backup (to be created)",
        "Space: 0 B needed, 100.0 MiB free, 10.0 MiB kept in reserve, 0 B promised to other sets",
        "This file system cannot reserve space for a copy: the reserve counts twice.",
        "start   web01  there is no set today of this VM",
        "               vda: full, about 0 B: it is the VM's first set",
        "               cd: left out, has no medium",
        "               golden: left out, is read-only",
        "fail    db     there is no such socket. To back it up while it is off, list its disks (vms: disks)",
    ]


class TestOneVm:
    """What goes wrong with one VM is told of that one, and the others are planned."""

    def plan(
        self,
        repository: Repository,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        selection: Selection = EVERYTHING,
        unknown: list[str] | None = None,
        asked: list[str] | None = None,
    ) -> Plan:
        def ask(request: Request, *_others: Any) -> Any:
            if asked is not None:
                asked.append(request.monitor)

            async def answer() -> Observation:
                if "web" in request.monitor:
                    raise error
                return Observation(error="it does not answer")

            return answer()

        async def draw() -> Plan:
            async with ThreadedCalls(Watch(repository.path, writing=True)) as calls:
                requests = [Request(name, f"unix:/run/{monitor}.qmp") for name, monitor in (("", "web"), ("db", "b"))]
                plan, names = await draw_up(
                    AsyncRepository(repository, calls), requests, Discovery(), "s1", POLICY, selection=selection
                )
                if unknown is not None:
                    unknown.extend(names)
                return plan

        monkeypatch.setattr(planner, "observe", ask)
        return asyncio.run(draw())

    def test_a_defect_of_ours(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = self.plan(repository, monkeypatch, KeyError("node-name"))
        assert [(vm.name, vm.action, vm.reason) for vm in plan.vms] == [
            ("web", "fail", "internal error: KeyError('node-name'); report it with the warning"),
            ("db", "fail", "it does not answer"),
        ]
        (warning,) = plan.warnings
        assert warning.startswith("unix:/run/web.qmp: Traceback")
        assert "KeyError: 'node-name'" in warning

    @pytest.mark.parametrize(
        ("selection", "planned", "unknown"),
        [
            (Selection(("db", "web9", "w*")), ["web", "db"], ["web9"]),
            (Selection(("db",)), ["db"], []),
            (Selection(excluded=("d*",)), ["web"], []),
            (Selection(("nosuch",)), [], ["nosuch"]),
        ],
    )
    def test_those_that_are_chosen(
        self,
        repository: Repository,
        monkeypatch: pytest.MonkeyPatch,
        selection: Selection,
        planned: list[str],
        unknown: list[str],
    ) -> None:
        found: list[Any] = []
        plan = self.plan(repository, monkeypatch, ToolError("it hangs"), selection, found)
        assert ([vm.name for vm in plan.vms], found) == (planned, unknown)

    def test_one_whose_name_is_known_is_not_asked_in_vain(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        self.plan(repository, monkeypatch, ToolError("it hangs"), Selection(excluded=("db",)), asked=asked)
        assert asked == ["unix:/run/web.qmp"]

    @pytest.mark.parametrize("error", [ToolError("qemu-img took too long"), OSError(5, "Input/output error", "/a.img")])
    def test_what_can_be_told_plainly(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        plan = self.plan(repository, monkeypatch, error)
        told = "/a.img: Input/output error" if isinstance(error, OSError) else str(error)
        assert [vm.reason for vm in plan.vms] == [told, "it does not answer"]
        assert plan.warnings == ()

    def test_a_repository_that_hangs_ends_all(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(RepositoryHangs, match="as long as it does"):
            self.plan(repository, monkeypatch, RepositoryHangs("as long as it does"))
