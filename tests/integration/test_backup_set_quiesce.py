# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and frozen guests: what is promised of their sets, and that they are thawed, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import guest_agent, guest_freeze
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, SLOW, Sets
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import (
    ScriptedAgent,
    hang_up,
    mute_freeze,
    says,
    silence,
)

if t.TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

    Start = t.Callable[..., ModuleProcess]

pytestmark = pytest.mark.usefixtures("clean")

STATUS = "guest-fsfreeze-status"
FREEZE = "guest-fsfreeze-freeze"
THAW = "guest-fsfreeze-thaw"

CHANNEL = (
    *("-device", "virtio-serial-pci", "-chardev", "socket,id=agent,path={path},server=on,wait=off"),
    *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
)


@pytest.fixture
def agent(vm: Qemu) -> Iterator[ScriptedAgent]:
    """The agent of the VM `vm`."""
    with ScriptedAgent(vm.directory / "agent") as agent:
        yield agent
        # A guard works on until it has seen that the guest is thawed.
        wait_until(lambda: agent.idle, "the end of the guard")


def options(vm: Qemu, agent: ScriptedAgent, quiesce: str) -> dict[str, t.Any]:
    """Options of backup_plan for a VM with a scripted agent."""
    return {"vms": [{"monitor": str(vm.monitor), "agent": agent.path, "quiesce": quiesce}]}


def failed(result: dict[str, t.Any]) -> str:
    """Why there is no set."""
    [found] = result["vms"]
    assert found["state"] == "failed"
    return str(found["error"])


def published(result: dict[str, t.Any]) -> dict[str, t.Any]:
    """What is said of the one set."""
    [found] = result["vms"]
    assert found["state"] == "published"
    return dict(found)


def assert_filesystem(sets: Sets, result: dict[str, t.Any], name: str = "vm", set_id: str = ID) -> None:
    """A set of a frozen guest, in the result and in the manifest."""
    for found in (published(result), sets.manifest(name, set_id)):
        assert (found["consistency"], found["consistency_reason"]) == ("filesystem", "")
        assert found["frozen_ms"] > 0
    assert result["warnings"] == []


def assert_crash(sets: Sets, result: dict[str, t.Any], reason: str, name: str = "vm") -> None:
    """A set of a guest that was not frozen, though that was tried: that is said everywhere, with the reason."""
    for found in (published(result), sets.manifest(name)):
        assert found["consistency"] == "crash"
        assert reason in found["consistency_reason"]
    assert any("were not frozen" in warning and reason in warning for warning in result["warnings"])


def assert_nothing_begun(vm: Qemu, sets: Sets, result: dict[str, t.Any], name: str = "vm") -> None:
    """Neither in QEMU nor in the repository."""
    assert result["qmp"] == []
    assert vm.block_jobs == []
    assert vm.bitmaps("n0") == {}
    sets.assert_absent(name)


def assert_undone(vm: Qemu, sets: Sets, name: str = "vm") -> None:
    """What was begun is gone without a trace."""
    assert vm.block_jobs == []
    assert vm.bitmaps("n0") == {}
    sets.assert_absent(name)


def die_at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Let modules, which are forks of this process, be killed when the guest is `frozen`, or `started` its jobs are."""
    enter, leave = guest_freeze.Freezer.__aenter__, guest_freeze.Freezer.__aexit__

    async def enter_and_die(freezer: guest_freeze.Freezer) -> guest_freeze.Freezer:
        await enter(freezer)
        if moment == "frozen":
            os.kill(os.getpid(), signal.SIGKILL)
        return freezer

    async def die_and_leave(freezer: guest_freeze.Freezer, *args: t.Any) -> None:
        if moment == "started":
            os.kill(os.getpid(), signal.SIGKILL)
        await leave(freezer, *args)

    monkeypatch.setattr(guest_freeze.Freezer, "__aenter__", enter_and_die)
    monkeypatch.setattr(guest_freeze.Freezer, "__aexit__", die_and_leave)


# A real guest


def features(image: Path, copy: Path) -> list[str]:
    """The features of the ext4 in an image, as it is, in which a full check finds nothing."""
    qemu_img("convert", "-O", "raw", image, copy)
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    run: dict[str, t.Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "env": environment}
    header = subprocess.run(["dumpe2fs", "-h", copy], check=True, **run).stdout
    [line] = [line for line in header.splitlines() if line.startswith("Filesystem features:")]
    if "needs_recovery" not in line:
        check = subprocess.run(["e2fsck", "-f", "-n", copy], check=False, **run)
        assert check.returncode == 0, check.stdout
    copy.unlink()
    return line.split()


def assert_goes_on(guest: Guest) -> None:
    """The guest writes."""
    rounds = guest.rounds
    wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")


@pytest.mark.slow
def test_a_guest_that_writes_all_the_time(
    directory: Path, sets: Sets, start_module: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "vm").mkdir()
    copy = directory / "copy.raw"
    with Guest(directory / "vm") as guest:
        for set_id in ("full", "inc"):
            result = sets.back_up(guest, id=set_id, quiesce="require", max_chain=2)
            assert_filesystem(sets, result, "guest", set_id)
            assert_goes_on(guest)
            for image in sets.images("guest", set_id).values():
                assert "needs_recovery" not in features(image, copy)
        assert set(sets.levels("guest", "inc").values()) == {"incremental"}
        # What is said of one VM overrules what is said of all; and this is what a set looks like without it.
        one = {"vms": [{"monitor": str(guest.monitor), "quiesce": "none"}]}
        found = published(sets.back_up(id="crash", quiesce="require", **one))
        assert (found["consistency"], found["frozen_ms"]) == ("crash", 0)
        assert all("needs_recovery" in features(image, copy) for image in sets.images("guest", "crash").values())
        for moment in ("frozen", "started"):
            with monkeypatch.context() as patch:
                die_at(patch, moment)
                process = start_module("backup_set", {"plan": sets.plan(guest, id=moment, quiesce="require")["plan"]})
                process.wait()
            assert process.killed
            assert_goes_on(guest)
            result = sets.back_up(guest, id=moment, quiesce="require")
            assert_filesystem(sets, result, "guest", moment)
            assert all("needs_recovery" not in features(image, copy) for image in sets.images("guest", moment).values())
            assert (guest.block_jobs, guest.fdsets) == ([], [])
        assert_goes_on(guest)
        assert_described(guest, json.loads((sets.path / "guest" / "full" / "vm.json").read_text()))


def assert_described(guest: Guest, description: dict[str, t.Any]) -> None:
    """From what stands in vm.json, the VM can be built again."""
    line = description["command_line"]
    assert line[line.index("-m") + 1] == "192"
    assert line[line.index("-machine") + 1] == f"q35,accel={guest.accelerator}"
    assert (description["name"], description["memory"]) == ("guest", 192 * MIB)
    assert description["machine"].startswith("pc-q35-")
    assert description["cpus"]["count"] == 1
    disks = {disk["name"]: disk for disk in description["disks"]}
    assert {name: disk["file"] for name, disk in disks.items()} == {
        str(disk.id): str(disk.path) for disk in guest.disks
    }
    assert any("virtserialport" in argument for argument in line)
    assert description["removed"] == []


def test_secrets_do_not_go_into_the_set(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01", extra=("-object", "secret,id=key,data=hunter2"))
    sets.back_up(vm)
    content = (sets.path / "web01" / ID / "vm.json").read_text()
    assert "hunter2" not in content
    assert json.loads(content)["removed"] == ["-object key: data"]


# Agents that do otherwise


def test_the_order_of_things(vm: Qemu, agent: ScriptedAgent, sets: Sets) -> None:
    result = sets.back_up(**options(vm, agent, "require"))
    assert_filesystem(sets, result)
    assert [command for command in agent.commands if command in (FREEZE, THAW)] == [FREEZE, THAW]
    assert not agent.frozen
    # A set that is there is left alone, and so is the guest.
    asked = len(agent.commands)
    assert sets.back_up(**options(vm, agent, "require"))["changed"] is False
    assert len(agent.commands) == asked


def test_a_set_that_is_there_is_not_made_again_for_being_less(vm: Qemu, agent: ScriptedAgent, sets: Sets) -> None:
    sets.back_up(**options(vm, agent, "none"))
    result = sets.back_up(**options(vm, agent, "require"))
    assert result["changed"] is False
    assert_crash(sets, result, "did not ask")
    assert agent.commands == []


@pytest.mark.parametrize("kind", ["no channel", "no agent", "nobody listens", "paused"])
def test_case_29_no_agent(vms: Vms, directory: Path, sets: Sets, kind: str) -> None:
    hardware: dict[str, t.Any] = {}
    if kind == "no agent":
        hardware = {"machine": "q35,accel=tcg", "extra": [word.format(path=directory / "a") for word in CHANNEL]}
    vm = vms.start(paused=kind == "paused", **hardware)
    one = {"monitor": str(vm.monitor), **({"agent": str(directory / "gone")} if kind == "nobody listens" else {})}
    reason = {
        "no channel": "the VM has no channel for a guest agent",
        "no agent": "no agent has opened its channel",
        "nobody listens": "nobody listens there",
        "paused": "the VM does not run (prelaunch)",
    }[kind]
    result = sets.fail(vms=[one], quiesce="require")
    assert reason in failed(result)
    assert_nothing_begun(vm, sets, result)
    assert_crash(sets, sets.back_up(vms=[one], quiesce="try"), reason)
    assert vm.status == ("prelaunch" if kind == "paused" else "running")
    # A VM that does not run keeps the files that it was handed until it does, and the next client goes.
    vm.qmp.execute("cont")
    Qmp(vm.monitor).close()
    wait_until(lambda: not vm.fdsets, "the end of the fdsets")


@pytest.mark.parametrize("quiesce", ["try", "require"])
def test_case_30_a_freeze_without_an_answer(
    vm: Qemu, agent: ScriptedAgent, sets: Sets, monkeypatch: pytest.MonkeyPatch, quiesce: str
) -> None:
    monkeypatch.setattr(guest_agent, "FREEZE_TIMEOUT", 1.0)
    monkeypatch.setattr(guest_agent, "THAW_TIMEOUT", 1.0)
    agent.script = {FREEZE: [mute_freeze]}
    reason = "did not answer guest-fsfreeze-freeze within 1 s"
    if quiesce == "try":
        assert_crash(sets, sets.back_up(**options(vm, agent, quiesce)), reason)
    else:
        assert reason in failed(sets.fail(**options(vm, agent, quiesce)))
        assert_undone(vm, sets)
    wait_until(lambda: not agent.frozen, "the thaw")
    # The agent has come to itself.
    assert_filesystem(sets, sets.back_up(**options(vm, agent, "require"), id="s2"), set_id="s2")


def freeze_and_fall_silent(agent: ScriptedAgent) -> dict[str, int]:
    """Freeze, and answer nothing from then on."""
    agent.script = dict.fromkeys(("guest-sync", STATUS, THAW), [silence] * 1000)
    return {"return": agent.freeze()}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules do not wait long for an agent that is silent."""
    for name in ("FREEZE_TIMEOUT", "ANSWER_TIMEOUT", "THAW_TIMEOUT"):
        monkeypatch.setattr(guest_agent, name, 1.0)
    monkeypatch.setattr(guest_freeze, "THAW_TIMEOUT", 1.0)
    monkeypatch.setattr(guest_freeze, "THAW_LIMIT", PATIENCE)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("quiesce", ["try", "require"])
def test_an_agent_that_is_silent_once_it_has_frozen(vm: Qemu, agent: ScriptedAgent, sets: Sets, quiesce: str) -> None:
    agent.script = {FREEZE: [freeze_and_fall_silent]}
    if quiesce == "try":
        result = sets.back_up(**options(vm, agent, quiesce))
        assert_crash(sets, result, "may still be frozen; a guard process")
    else:
        result = sets.fail(**options(vm, agent, quiesce))
        assert "may still be frozen; a guard process" in failed(result)
        assert_undone(vm, sets)
    assert any("may still be frozen" in warning for warning in result["warnings"])
    assert agent.frozen
    agent.script = {}
    wait_until(lambda: not agent.frozen, "the thaw by the guard")


@pytest.mark.usefixtures("impatient")
def test_a_copy_whose_guest_cannot_be_thawed_keeps_to_the_bandwidth(vm: Qemu, agent: ScriptedAgent, sets: Sets) -> None:
    agent.script = {FREEZE: [freeze_and_fall_silent]}
    plan = sets.plan(**options(vm, agent, "try"), speed=SLOW)["plan"]
    succeed("backup_set", {"plan": plan, "state": "started"})
    result = succeed("backup_set", {"plan": plan, "slice": 0.1, "bandwidth": "512K"})
    assert any("may still be frozen" in warning for warning in result["warnings"])
    assert vm.job["speed"] == 512 << 10
    succeed("backup_set", {"plan": plan, "state": "cancelled"})
    agent.script = {}
    wait_until(lambda: not agent.frozen, "the thaw by the guard")


@pytest.mark.parametrize("quiesce", ["try", "require"])
def test_case_31_a_start_that_fails_after_the_freeze(vm: Qemu, agent: ScriptedAgent, sets: Sets, quiesce: str) -> None:
    def freeze_and_grow(agent: ScriptedAgent) -> dict[str, int]:
        vm.qmp.execute("block_resize", node_name="n0", size=128 * MIB)
        return {"return": agent.freeze()}

    agent.script = {FREEZE: [freeze_and_grow]}
    result = sets.fail(**options(vm, agent, quiesce))
    assert "different sizes" in failed(result)
    assert not agent.frozen
    assert agent.commands.count(FREEZE) <= agent.commands.count(THAW)
    assert_undone(vm, sets)
    assert_filesystem(sets, sets.back_up(**options(vm, agent, quiesce)))


def test_case_32_frozen_by_somebody_else(vm: Qemu, agent: ScriptedAgent, sets: Sets) -> None:
    agent.frozen = True
    result = sets.fail(**options(vm, agent, "require"))
    assert "another program has frozen the guest's file systems, and they stay frozen" in failed(result)
    assert_nothing_begun(vm, sets, result)
    assert_crash(sets, sets.back_up(**options(vm, agent, "try")), "another program has frozen")
    assert agent.frozen
    assert not {FREEZE, THAW} & set(agent.commands)


@pytest.mark.parametrize("quiesce", ["try", "require"])
def test_case_32_frozen_by_somebody_else_at_the_last_moment(
    vm: Qemu, agent: ScriptedAgent, sets: Sets, quiesce: str
) -> None:
    def freeze(agent: ScriptedAgent) -> dict[str, str]:
        agent.freeze()
        return {"return": agent.status()}

    agent.script = {STATUS: [says({"return": "thawed"}), freeze]}
    if quiesce == "try":
        assert_crash(sets, sets.back_up(**options(vm, agent, quiesce)), "another program has frozen")
    else:
        assert "another program has frozen" in failed(sets.fail(**options(vm, agent, quiesce)))
        assert_undone(vm, sets)
    assert agent.frozen
    assert THAW not in agent.commands


def test_case_27_what_qemu_refuses_it_refuses_before_the_freeze(vms: Vms, sets: Sets) -> None:
    # Over TCP no file can be handed over, and this QEMU cannot get at the repository by itself.
    vm = vms.start(unprivileged=True, tcp=True)
    with ScriptedAgent(vm.directory / "agent") as agent:
        one = {"name": "vm", "monitor": f"tcp:127.0.0.1:{vm.tcp_port}", "agent": agent.path}
        error = failed(sets.fail(vms=[one], quiesce="require"))
        assert str(sets.path) in error
        assert "Permission denied" in error
        assert FREEZE not in agent.commands
        assert_undone(vm, sets)


@pytest.mark.parametrize("quiesce", ["try", "require"])
def test_thawed_by_others_in_the_middle(vm: Qemu, agent: ScriptedAgent, sets: Sets, quiesce: str) -> None:
    def thawed_already(agent: ScriptedAgent) -> dict[str, int]:
        agent.thaw()
        return {"return": 0}

    agent.script = {THAW: [thawed_already]}
    if quiesce == "try":
        assert_crash(sets, sets.back_up(**options(vm, agent, quiesce)), "another program thawed the guest")
    else:
        assert "another program thawed the guest" in failed(sets.fail(**options(vm, agent, quiesce)))
        assert_undone(vm, sets)


@pytest.mark.parametrize("quiesce", ["try", "require"])
def test_an_agent_that_dies_when_it_is_to_freeze(vm: Qemu, agent: ScriptedAgent, sets: Sets, quiesce: str) -> None:
    agent.script = {FREEZE: [hang_up]}
    if quiesce == "try":
        assert_crash(sets, sets.back_up(**options(vm, agent, quiesce)), "broke off")
    else:
        assert "broke off" in failed(sets.fail(**options(vm, agent, quiesce)))
        assert_undone(vm, sets)


def test_an_agent_that_dies_when_it_is_to_thaw(vm: Qemu, agent: ScriptedAgent, sets: Sets) -> None:
    agent.script = {THAW: [hang_up]}
    assert_filesystem(sets, sets.back_up(**options(vm, agent, "require")))
    assert not agent.frozen


# Modules that are killed


@pytest.mark.parametrize("quiesce", ["try", "require"])
@pytest.mark.parametrize("moment", ["frozen", "started"])
def test_killed_while_the_guest_is_frozen(
    vm: Qemu,
    agent: ScriptedAgent,
    sets: Sets,
    start_module: Start,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    quiesce: str,
) -> None:
    plan = sets.plan(**options(vm, agent, quiesce), speed=SLOW)["plan"]
    with monkeypatch.context() as patch:
        die_at(patch, moment)
        process = start_module("backup_set", {"plan": plan})
        process.wait()
    assert process.killed
    wait_until(lambda: agent.idle and not agent.frozen, "the thaw by the guard")
    assert len(vm.block_jobs) == (moment == "started")
    release(vm)
    plan = sets.plan(**options(vm, agent, quiesce))["plan"]
    result = succeed("backup_set", {"plan": plan})
    if (moment, quiesce) == ("started", "try"):
        # That all jobs had started before the thaw is nowhere to be read.
        assert_crash(sets, result, "killed")
    else:
        assert_filesystem(sets, result)
    sets.assert_tidy("vm")


def kill_with_guard(process: ModuleProcess, agent: ScriptedAgent) -> None:
    """Kill a module and its guard as if at once: either of them thaws the guest when it sees the other one dead."""
    guard = agent.clients[-1]
    held = list(filter(None, map(Process.of, (*process.children, guard))))
    for one in held:
        os.kill(one.pid, signal.SIGSTOP)
    wait_until(lambda: all(one.stopped for one in held), "both to stand still")
    os.kill(process.pid, signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)


def test_killed_together_with_the_guard(vm: Qemu, agent: ScriptedAgent, sets: Sets, start_module: Start) -> None:
    def freeze_and_kill(agent: ScriptedAgent) -> None:
        agent.freeze()
        kill_with_guard(process, agent)

    agent.script = {FREEZE: [freeze_and_kill]}
    plan = sets.plan(**options(vm, agent, "require"))["plan"]
    process = start_module("backup_set", {"plan": plan})
    process.wait()
    assert process.killed
    assert agent.frozen
    assert_filesystem(sets, succeed("backup_set", {"plan": plan}))
    assert not agent.frozen


def test_cancelling_thaws_what_killed_modules_have_left(
    vm: Qemu, agent: ScriptedAgent, sets: Sets, start_module: Start
) -> None:
    def freeze_and_kill(agent: ScriptedAgent) -> None:
        agent.freeze()
        kill_with_guard(process, agent)

    agent.script = {FREEZE: [freeze_and_kill]}
    process = start_module("backup_set", {"plan": sets.plan(**options(vm, agent, "require"))["plan"]})
    process.wait()
    succeed("backup_set", {"repository": str(sets.path), "names": ["vm"], "state": "cancelled"})
    assert not agent.frozen
    assert_undone(vm, sets)


def test_qemu_ends_while_its_guest_is_frozen(vm: Qemu, agent: ScriptedAgent, sets: Sets) -> None:
    def freeze_and_end(agent: ScriptedAgent) -> dict[str, int]:
        vm.kill()
        agent.close()
        return {"return": agent.freeze()}

    agent.script = {FREEZE: [freeze_and_end]}
    plan = sets.plan(**options(vm, agent, "require"))["plan"]
    assert "the VM is off" in failed(fail("backup_set", {"plan": plan}))
    sets.assert_absent("vm")
