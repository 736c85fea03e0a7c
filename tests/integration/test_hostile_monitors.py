# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What answers at a monitor is odd: it costs that VM, with a message that names it, and no other one."""

from __future__ import annotations

import contextlib
import time
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.liars import ODD, Liar, Odd
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

BOUND = 180
"""Seconds in which all of them together have to be dealt with: a look may take 90, and 32 are looked at at once."""
OF_ONE_VM = {
    "block_job_info": {"greeting", "qmp_capabilities", "query-block-jobs", "query-jobs"},
    "block_job": {"greeting", "qmp_capabilities", "query-block-jobs", "query-jobs"},
    "drive_backup": {"greeting", "qmp_capabilities", "query-status", "query-named-block-nodes"},
}
"""What a module of one VM asks, and cannot do without."""
UNREAD = {"version of null", "version below zero"}
"""What matters only where the disks are looked at."""
FINDING = frozenset({"qom-list", "qom-get", "query-chardev"})
"""What is only asked to find the guest agent."""


@pytest.fixture
def liars(directory: Path) -> t.Iterator[dict[str, Liar]]:
    """A liar for each odd answer."""
    with contextlib.ExitStack() as stack:
        yield {
            what: stack.enter_context(Liar(directory / f"odd{number}.qmp", odd))
            for number, (what, odd) in enumerate(ODD.items())
        }


@pytest.fixture
def idle_liars(directory: Path) -> t.Iterator[dict[str, Liar]]:
    """A liar for each odd answer that shows at once, with a name of its own, and nothing to do; honest at first."""
    with contextlib.ExitStack() as stack:
        yield {
            what: stack.enter_context(Liar(directory / f"odd{number}.qmp", odd, name=f"odd{number}", honest=True))
            for number, (what, odd) in enumerate(ODD.items())
            if not odd.slow and odd.command not in FINDING | {"query-name", "query-uuid"}
        }


def assert_told(what: str, monitor: str, said: str) -> None:
    """An error is a sentence that names the monitor."""
    assert monitor in said, (what, said)
    assert "internal error" not in said, (what, said)
    assert "Traceback" not in said, (what, said)
    assert len(said) < 1000, (what, said)


def test_vm_info(vm: Qemu, liars: dict[str, Liar]) -> None:
    begun = time.monotonic()
    arguments = {"monitors": [str(vm.monitor), *(str(liar.path) for liar in liars.values())]}
    result = run_module("vm_info", arguments, timeout=BOUND)
    assert result["rc"] == 0, result
    assert time.monotonic() - begun < BOUND
    assert result["warnings"] == []
    found = {entry["monitor"]: entry for entry in result["vms"]}
    assert len(found) == 1 + len(liars)
    assert [disk["node"] for disk in found[f"unix:{vm.monitor}"]["disks"]] == ["n0"]
    for what, liar in liars.items():
        entry = found[f"unix:{liar.path}"]
        if ODD[what].served:
            assert entry["error"] == "", what
        else:
            assert entry["error"], what
            assert_told(what, str(liar.path), entry["error"])


def test_backup_plan(vm: Qemu, sets: Sets, liars: dict[str, Liar]) -> None:
    wanted = [{"monitor": str(liar.path), "name": f"odd{number}"} for number, liar in enumerate(liars.values())]
    arguments = sets.arguments(vms=[{"monitor": str(vm.monitor), "name": "good"}, *wanted])
    result = run_module("backup_plan", arguments, timeout=BOUND)
    assert result["rc"] == 0, result
    assert not any("Traceback" in warning for warning in result["warnings"])
    planned = {entry["name"]: entry for entry in result["plan"]["vms"]}
    assert planned["good"]["action"] == "start"
    for number, (what, liar) in enumerate(liars.items()):
        entry = planned[f"odd{number}"]
        if ODD[what].command in FINDING or ODD[what].served:
            continue
        assert (entry["action"], entry["disks"]) == ("fail", []), what
        assert_told(what, str(liar.path), entry["reason"])


def test_backup_set(vm: Qemu, sets: Sets, directory: Path, idle_liars: dict[str, Liar]) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    plan = sets.plan(vm, *(str(liar.path) for liar in idle_liars.values()))["plan"]
    assert {entry["action"] for entry in plan["vms"]} == {"start"}
    for liar in idle_liars.values():
        liar.lie()
    result = run_module("backup_set", {"plan": plan, "max_vms": 0}, timeout=BOUND)
    assert result_of(result, "vm")["state"] == "published"
    sets.assert_good("vm", {"drive0": copy})
    for what, liar in idle_liars.items():
        if not ODD[what].served:
            entry = result_of(result, liar.path.stem)
            assert entry["state"] == "failed", what
            assert_told(what, str(liar.path), entry["error"])


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (module, what)
        for module, asked in OF_ONE_VM.items()
        for what, odd in ODD.items()
        if odd.command in asked and not odd.slow and not odd.served
        if what not in UNREAD or module == "drive_backup"
    ],
)
def test_modules_of_one_vm(directory: Path, module: str, what: str) -> None:
    """No traceback, and no success that was not seen."""
    given: dict[str, dict[str, t.Any]] = {
        "block_job_info": {},
        "drive_backup": {"device": "drive0", "target": str(directory / "target.qcow2")},
        "block_job": {"job_id": "vmfleet.x.1.0", "state": "cancelled"},
    }
    with Liar(directory / "odd.qmp", ODD[what]) as liar:
        result = run_module(module, {"monitor": f"unix:{liar.path}", **given[module]})
    assert result["rc"] != 0
    assert "exception" not in result
    assert_told(what, str(liar.path), result["msg"])


LATER: dict[str, Odd] = {
    what: ODD[what] for what in ("hangs up", "no JSON", "a list", "neither answer nor error", "no id", "id is a list")
}


@pytest.mark.parametrize("command", ["add-fd", "transaction", "remove-fd", "query-cpus-fast", "query-chardev"])
@pytest.mark.parametrize("what", LATER)
def test_while_a_set_is_begun(vm: Qemu, sets: Sets, directory: Path, what: str, command: str) -> None:
    with Liar(directory / "odd.qmp", Odd(command, LATER[what].lie), name="odd") as liar:
        result = sets.attempt(vm, str(liar.path))
    assert result_of(result, "vm")["state"] == "published"
    entry = result_of(result, "odd")
    assert entry["state"] == "failed"
    assert_told(what, str(liar.path), entry["error"])


def test_the_honest_answers_are_understood(vm: Qemu, directory: Path) -> None:
    """What is made odd is right without that."""
    with contextlib.ExitStack() as stack:
        liars = [
            stack.enter_context(Liar(directory / f"{version}.qmp", Odd("none", lambda reply: reply, version)))
            for version in ("7.2", "11.1")
        ]
        found = succeed("vm_info", {"monitors": [str(vm.monitor), *(str(liar.path) for liar in liars)]})["vms"]
    for entry in found:
        assert entry["error"] == ""
        if entry["monitor"] != f"unix:{vm.monitor}":
            assert [disk["name"] for disk in entry["disks"]] == ["drive0", "vd1"]
            assert [len(disk["layers"]) for disk in entry["disks"]] == [1, 0]
            assert entry["agent"] == {"socket": "/images/qga.sock", "connected": False}
