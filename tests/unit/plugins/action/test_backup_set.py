# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""When the module is called, and what is shown meanwhile."""

from __future__ import annotations

from multiprocessing import get_context
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from ansible.errors import AnsibleConnectionFailure

from ansible_collections.vmfleet.backup.plugins.action import backup_set
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome, results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PLAN = {
    "repository": "/srv/backup",
    "id": "s1",
    "create_repository": False,
    "vms": [{"name": "web01", "bytes": 100}, {"name": "web02", "bytes": 100}],
}

COPYING = [Outcome("web01", "s1", "running", offset=50, len=100), Outcome("web02", "s1", "queued")]
DONE = [Outcome(name, "s1", "published", changed=True) for name in ("web01", "web02")]


class Stage:
    """The plugin among things that play Ansible. C(answers) is what the calls of the module come to, one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.shown: list[str] = []
        self.now = 0.0
        self.pace = 10.0
        """Seconds that a call takes."""
        self.hosts = ["hv1"]
        self.all_hosts: list[str] = []
        """Those of all batches, where there are several."""
        self.verbosity = 0
        monkeypatch.setattr(backup_set, "FIRST_TO_SPEAK", get_context("fork").Lock())
        monkeypatch.setattr(backup_set, "ON_TERMINAL", True)
        monkeypatch.setattr(backup_set, "time", SimpleNamespace(monotonic=lambda: self.now))

    def execute(self, **given: Any) -> dict[str, Any]:
        self.calls.append(given)
        self.now += self.pace
        answer = self.answers[len(self.calls) - 1]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, dict):
            return answer
        return {"changed": True, "vms": results(answer)}

    def run(
        self, *answers: Sequence[Outcome] | dict[str, Any] | Exception, task: dict[str, Any] | None = None, **args: Any
    ) -> dict[str, Any]:
        self.answers = list(answers)
        action = backup_set.ActionModule(
            task=SimpleNamespace(
                action="vmfleet.backup.backup_set",
                **{
                    "args": {"plan": PLAN, **args},
                    "async_val": 0,
                    "check_mode": False,
                    "no_log": False,
                    **(task or {}),
                },
            ),
            connection=SimpleNamespace(_shell=SimpleNamespace(tmpdir="/tmp"), has_native_async=False),
            play_context=None,
            loader=None,
            templar=None,
            shared_loader_obj=None,
        )
        action._execute_module = self.execute
        action._display = SimpleNamespace(display=self.shown.append, verbosity=self.verbosity)
        result: dict[str, Any] = action.run(
            task_vars={
                "inventory_hostname": self.hosts[0],
                "ansible_play_batch": self.hosts,
                "ansible_play_hosts_all": self.all_hosts or self.hosts,
            }
        )
        assert len(self.calls) == len(self.answers)
        return result


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    monkeypatch.setattr(backup_set.constants, "DEFAULT_LOCAL_TMP", str(tmp_path))
    return Stage(monkeypatch)


def test_it_is_called_until_every_vm_is_at_its_end(stage: Stage) -> None:
    result = stage.run(COPYING, COPYING, DONE, max_vms=1)
    assert [call["module_args"]["slice"] for call in stage.calls] == [2.0, 3.0, 4.5]
    assert all(call["module_args"]["max_vms"] == 1 for call in stage.calls)
    assert [vm["state"] for vm in result["vms"]] == ["published", "published"]


@pytest.mark.parametrize("wanted", ["quiet", "none"])
def test_where_nobody_looks_on_it_is_called_less_often(stage: Stage, wanted: str) -> None:
    stage.run(COPYING, COPYING, DONE, progress=wanted)
    assert [call["module_args"]["slice"] for call in stage.calls] == [10.0, 15.0, 22.5]


def test_the_users_arguments_are_left_alone(stage: Stage) -> None:
    args = {"plan": PLAN}
    stage.run(COPYING, DONE, task={"args": args})
    assert args == {"plan": PLAN}


@pytest.mark.parametrize(
    ("task", "args"),
    [
        ({"check_mode": True}, {}),
        ({}, {"state": "started"}),
        ({}, {"state": "cancelled"}),
        ({}, {"slice": 5}),
        ({}, {"slice": 0}),
        ({}, {"plan": None}),
        ({}, {"plan": "no plan"}),
        ({}, {"plan": {**PLAN, "vms": 7}}),
        ({}, {"plan": {"vms": [], "repository": "/srv/backup"}}),
        ({}, {"plan": {"vms": [], "id": "s1"}}),
        ({}, {"plan": {**PLAN, "vms": [7]}}),
        ({}, {"plan": {**PLAN, "vms": [{"bytes": 1}]}}),
        ({}, {"plan": {**PLAN, "vms": [{"name": "web01", "bytes": "x"}]}}),
        ({}, {"state": "unknown"}),
    ],
)
def test_everything_else_is_one_call_as_it_is(stage: Stage, task: dict[str, Any], args: dict[str, Any]) -> None:
    assert stage.run({"changed": False, "msg": "said"}, task=task, **args) == {"changed": False, "msg": "said"}
    assert stage.calls[0].get("module_args") is None
    assert not stage.calls[0]["wrap_async"]
    assert not stage.shown


AT_WORK = {"changed": False, "running": True, "pid": 7, "vms": results(COPYING)}
LOST = {"changed": False, "running": False}
AT_ITS_END = {"changed": True, "vms": results(DONE), "headline": "2 of 2 VMs have their set"}


def left(worker: str) -> dict[str, Any]:
    """What the module returns when it has left the sets to a worker."""
    return {"changed": True, "vms": results(COPYING), "worker": worker}


def modules(stage: Stage) -> list[tuple[str, str]]:
    """Which modules were called, and for which state, or for which worker."""
    calls = [(call["module_name"], call["module_args"]) for call in stage.calls]
    return [(name.split("_")[-1], args.get("state") or args.get("worker") or "completed") for name, args in calls]


def test_a_worker_is_followed(stage: Stage) -> None:
    result = stage.run(left("w1"), AT_WORK, AT_ITS_END, detach="preferred")
    assert modules(stage) == [("set", "started"), ("follow", "w1"), ("follow", "w1")]
    assert stage.calls[0]["module_args"]["detach"] == "preferred"
    assert stage.calls[1]["module_args"] == {"repository": "/srv/backup", "worker": "w1", "wait": 3.0}
    assert [vm["state"] for vm in result["vms"]] == ["published", "published"]
    assert len(stage.shown) == 3


def test_a_worker_that_is_there_is_followed_at_once(stage: Stage) -> None:
    assert stage.run(AT_ITS_END, detach="preferred", worker="w1") == AT_ITS_END
    assert modules(stage) == [("follow", "w1")]


def test_what_is_done_at_once_needs_no_other_call(stage: Stage) -> None:
    assert stage.run(AT_ITS_END, detach="preferred") == AT_ITS_END
    assert modules(stage) == [("set", "started")]


def test_workers_that_die_are_replaced_and_then_done_without(stage: Stage) -> None:
    found = stage.run(
        LOST, left("w2"), LOST, left(""), left("w3"), LOST, COPYING, DONE, detach="preferred", worker="w1"
    )
    assert [name for name, _about in modules(stage)] == [
        "follow",
        "set",
        "follow",
        "set",
        "set",
        "follow",
        "set",
        "set",
    ]
    assert [call["module_args"].get("detach") for call in stage.calls[-2:]] == ["never", "never"]
    assert [about for _name, about in modules(stage)[-2:]] == ["completed", "completed"]
    assert not any("worker" in call["module_args"] for call in stage.calls if "set" in call["module_name"][-3:])
    assert [vm["state"] for vm in found["vms"]] == ["published", "published"]


def test_a_worker_that_cannot_be_asked(stage: Stage) -> None:
    result = stage.run(left("w1"), {"failed": True, "msg": "no"}, detach="preferred")
    assert result["failed"]
    assert result["msg"].startswith("no; 2 of 2 VMs are unfinished, and their copies may still run: web01, web02.")


def test_async_is_one_call_to_the_end(stage: Stage) -> None:
    started = {"ansible_job_id": "j1", "started": 1}
    assert stage.run(started, task={"async_val": 3600}) == started
    assert stage.calls[0]["wrap_async"]


def test_on_a_terminal_every_call_is_told_of(stage: Stage) -> None:
    stage.run(COPYING, COPYING, DONE)
    assert [text.splitlines()[-2:] for text in stage.shown] == [
        [
            "hv1: 0 of 2 VMs done, 1 running, 1 queued; 50 B of about 200 B (25 %)",
            "hv1:   web01  [##########..........]  50 %  50 B of 100 B",
        ],
        [
            "hv1: 0 of 2 VMs done, 1 running, 1 queued; 50 B of about 200 B (25 %); 0 B/s",
            "hv1:   web01  [##########..........]  50 %  50 B of 100 B",
        ],
        ["hv1: 2 of 2 VMs done; 200 B of 200 B (100 %)"],
    ]


def test_how_to_go_on_is_said_once_for_all_hypervisors(stage: Stage) -> None:
    stage.run(COPYING, COPYING, DONE)
    stage.calls.clear()
    stage.run(COPYING, DONE)
    assert stage.shown[0].startswith("The copies continue after Ctrl-C, and without a connection.\n")
    assert "-e vm_backup_id=s1." in stage.shown[0]
    assert "vmfleet.backup.cancel" in stage.shown[0]
    assert "Ctrl-C" not in "".join(stage.shown[1:])


def test_nothing_is_told_where_there_is_nothing_to_wait_for(stage: Stage) -> None:
    stage.run(DONE)
    assert not stage.shown


@pytest.mark.parametrize(("terminal", "wanted"), [(False, None), (False, "auto"), (True, "quiet")])
def test_quiet_is_a_line_a_minute(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, terminal: bool, wanted: str | None
) -> None:
    monkeypatch.setattr(backup_set, "ON_TERMINAL", terminal)
    stage.pace = 25.0
    stage.run(*[COPYING] * 7, DONE, progress=wanted)
    # At 25, 100 and 175 s.
    assert len(stage.shown) == 3
    assert "".join(stage.shown).count("\n") == 2
    assert "Ctrl-C" in stage.shown[0]


@pytest.mark.parametrize(("task", "args"), [({}, {"progress": "none"}), ({"no_log": True}, {})])
def test_nothing_is_told_where_that_is_not_wanted(stage: Stage, task: dict[str, Any], args: dict[str, Any]) -> None:
    with pytest.raises(AnsibleConnectionFailure):
        stage.run(COPYING, AnsibleConnectionFailure("gone"), task=task, **args)
    assert not stage.shown


def test_many_bars_are_none(stage: Stage) -> None:
    stage.hosts = [f"hv{number}" for number in range(1, backup_set.MANY + 1)]
    stage.run(COPYING, DONE)
    assert "[####" in stage.shown[0]
    stage.shown.clear()
    stage.calls.clear()
    stage.hosts.append("hv-last")
    stage.run(COPYING, DONE)
    assert "[####" not in stage.shown[0]
    assert stage.shown[0].startswith("hv1:     0 of 2")
    stage.shown.clear()
    stage.calls.clear()
    stage.verbosity = 1
    stage.run(COPYING, DONE)
    assert "[####" in stage.shown[0]


def test_a_call_that_fails_as_a_whole_ends_it(stage: Stage) -> None:
    result = stage.run(COPYING, {"failed": True, "msg": "MODULE FAILURE"})
    assert result["msg"].startswith("MODULE FAILURE; 2 of 2 VMs are unfinished")
    assert [vm["state"] for vm in result["vms"]] == ["running", "queued"]


def test_what_cannot_be_reached_is_told_and_left_to_ansible(stage: Stage) -> None:
    with pytest.raises(AnsibleConnectionFailure, match="gone"):
        stage.run(COPYING, AnsibleConnectionFailure("gone"))
    assert stage.shown[-1] == (
        "hv1: 2 of 2 VMs are unfinished, and their copies may still run: web01, web02."
        " Run the backup again with id s1 to continue them"
    )


def test_what_cannot_be_reached_from_the_start_is_ansibles_matter(stage: Stage) -> None:
    with pytest.raises(AnsibleConnectionFailure, match="gone"):
        stage.run(AnsibleConnectionFailure("gone"))
    assert not stage.shown


def fleet_lines(stage: Stage) -> list[str]:
    return [line for text in stage.shown for line in text.splitlines() if line.startswith("fleet: ")]


def test_one_hypervisor_is_no_fleet(stage: Stage) -> None:
    stage.run(COPYING, COPYING, DONE)
    assert fleet_lines(stage) == []


def take_turns(stage: Stage) -> None:
    """Begin on both of two hypervisors, and follow one."""
    for host in ("hv2", "hv1"):
        stage.hosts, stage.all_hosts = [host], ["hv1", "hv2"]
        stage.calls.clear()
        stage.run(left("w1"), state="started", detach="preferred")
    assert not stage.shown
    stage.calls.clear()


def test_the_fleet_is_told_of_by_whoever_follows_one_of_it(stage: Stage) -> None:
    take_turns(stage)
    stage.run(AT_WORK, AT_WORK, AT_ITS_END, detach="preferred", worker="w1")
    copying = "; 100 B of about 400 B (25 %); 0 of 2 hypervisors done, 1 not followed yet"
    assert fleet_lines(stage) == [
        f"fleet: 0 of 4 VMs done, 2 running, 2 queued{copying}",
        f"fleet: 0 of 4 VMs done, 2 running, 2 queued{copying}",
        (
            "fleet: 2 of 4 VMs done, 1 running, 1 queued; 250 B of about 400 B (62 %);"
            " 1 of 2 hypervisors done, 1 not followed yet"
        ),
    ]


def test_a_hypervisor_that_was_lost_is_counted(stage: Stage) -> None:
    take_turns(stage)
    with pytest.raises(AnsibleConnectionFailure):
        stage.run(AnsibleConnectionFailure("gone"), detach="preferred", worker="w1")
    stage.hosts = ["hv2"]
    stage.calls.clear()
    stage.run(AT_WORK, AT_ITS_END, detach="preferred", worker="w1")
    assert fleet_lines(stage)[-1] == (
        "fleet: 2 of 4 VMs done, 1 running, 1 queued; 250 B of about 400 B (62 %); 1 of 2 hypervisors done, 1 lost"
    )


def test_the_fleet_is_told_of_once_in_a_while(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    take_turns(stage)
    stage.pace = 4.0
    stage.run(*[AT_WORK] * 6, AT_ITS_END, detach="preferred", worker="w1")
    # Of 4, 8, ... 28 s: at 4, 16 and 28.
    assert ["fleet: " in text for text in stage.shown] == [True, False, False, True, False, False, True]
    monkeypatch.setattr(backup_set, "ON_TERMINAL", False)
    stage.hosts, stage.pace = ["hv2"], 40.0
    stage.calls.clear()
    stage.shown.clear()
    stage.run(*[AT_WORK] * 4, AT_ITS_END, detach="preferred", worker="w1")
    assert ["fleet: " in text for text in stage.shown] == [False, True]


def test_where_the_fleet_cannot_be_told_of_all_else_goes_on(stage: Stage, tmp_path: Path) -> None:
    take_turns(stage)
    [file] = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    result = stage.run(AT_WORK, AT_ITS_END, detach="preferred", worker="w1")
    assert [vm["state"] for vm in result["vms"]] == ["published", "published"]
    assert stage.shown
    assert fleet_lines(stage) == []


def test_the_ids_of_two_runs_are_two_fleets(stage: Stage) -> None:
    take_turns(stage)
    stage.run(COPYING, DONE, plan={**PLAN, "id": "s2"})
    assert fleet_lines(stage) == []
