# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Workers where systemd is the init: they have a unit of their own, and do not end with that which has started them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import scope
from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import DIRECTORY
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.daemon_place import PLACE
from ansible_collections.vmfleet.backup.tests.harness import systemd_init
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import PACKAGE, ROOT, module_input, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets
from ansible_collections.vmfleet.backup.tests.harness.systemd_init import Systemd
from ansible_collections.vmfleet.backup.tests.integration.test_backup_set_worker import frozen, release_next, states

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

# In this order: the VMs end before the systemd that they are processes of.
pytestmark = pytest.mark.usefixtures("init", "clean")

SCOPES = "vmfleet-backup-*.scope"
ANSIBLE = "run-ansible.service"
MODULE = (sys.executable, "-m", f"{PACKAGE}.backup_set")


@pytest.fixture
def init(directory: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Systemd]:
    """A systemd. What is made for a test is made where it can be seen from there."""
    if systemd_init.missing():
        pytest.skip(f"a systemd of the test's own needs {systemd_init.missing()}")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with Systemd(directory) as init:
        yield init


@pytest.fixture
def sets(init: Systemd, directory: Path) -> Sets:
    return Sets(directory / "repository", init.inside)


@pytest.fixture
def three(init: Systemd, vms: Vms) -> list[Qemu]:
    """VMs with small disks."""
    with init.inside.for_children():
        return [vms.start(vms.disk(number, size=8 * MIB), name=f"vm{number}") for number in range(3)]


def planned(sets: Sets, vms: list[Qemu]) -> dict[str, t.Any]:
    found: dict[str, t.Any] = sets.plan(*vms, speed=SLOW, id="s1")["plan"]
    return found


def arguments(plan: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    return {"plan": plan, "state": "started", "max_vms": 1, "detach": "required", **options}


def leave(init: Systemd, args: dict[str, t.Any], *under: str) -> dict[str, t.Any]:
    """Leave the sets to a worker, from a unit that ends with the module."""
    given = ["--quiet", "--wait", "--pipe", "--collect", f"--unit={ANSIBLE}", f"--setenv=PYTHONPATH={ROOT}"]
    said = init.attempt("systemd-run", *given, *under, *MODULE, stdin=module_input(args)).stdout
    found: dict[str, t.Any] = json.loads(said)
    return found


def follow(sets: Sets, *key: str) -> dict[str, t.Any]:
    wanted = {"worker": key[0], "wait": 60} if key else {}
    return succeed("backup_follow", {"repository": str(sets.path), **wanted}, inside=sets.inside)


def warning_of(found: t.Any) -> str:
    # A plain string until ansible-core 2.18, an object since.
    return found if isinstance(found, str) else str(found["event"]["msg"])


def scope_of(result: dict[str, t.Any]) -> str:
    return f"vmfleet-backup-{result['worker']}.scope"


def release_each(vms: list[Qemu]) -> None:
    """Let one copy after the other go on."""
    for _vm in vms:
        release_next(vms)


def test_outlives_the_unit_that_has_started_it(init: Systemd, three: list[Qemu], sets: Sets, directory: Path) -> None:
    copies = [frozen(vm, directory) for vm in three]
    result = leave(init, arguments(planned(sets, three)))
    assert not result.get("warnings"), result
    unit = scope_of(result)
    assert init.units(ANSIBLE) == []
    assert init.units(SCOPES) == [unit]
    found = follow(sets)
    assert found["running"]
    assert init.unit_of(found["pid"]) == f"/system.slice/{unit}"
    # With the child that does the work.
    assert found["pid"] in init.processes(unit)
    assert len(init.processes(unit)) == 2
    assert init.show(unit, "Description") == f"Backup of VMs to {sets.path}, sets s1"
    release_each(three)
    assert states(follow(sets, result["worker"])) == ["published"] * 3
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")
    wait_until(lambda: not init.units(SCOPES), "the end of its unit")


def test_outlives_the_unit_that_is_stopped(init: Systemd, three: list[Qemu], sets: Sets, directory: Path) -> None:
    """ansible-pull, or a playbook for localhost, that somebody stops."""
    args = directory / "arguments"
    args.write_text(module_input(arguments(planned(sets, three))))
    script = f"{' '.join(MODULE)} < {args} > {directory}/said && sleep infinity"
    given = ["--quiet", "--collect", f"--unit={ANSIBLE}", f"--setenv=PYTHONPATH={ROOT}"]
    init.run("systemd-run", *given, "sh", "-c", script)
    wait_until(lambda: "sleep" in init.processes(ANSIBLE).values(), "the end of the module")
    result = json.loads((directory / "said").read_text())
    assert list(init.processes(ANSIBLE).values()) == ["sh", "sleep"]
    init.run("systemctl", "stop", ANSIBLE)
    assert init.units(ANSIBLE) == []
    assert follow(sets)["running"]
    release_each(three)
    assert states(follow(sets, result["worker"])) == ["published"] * 3


def test_has_its_weight_among_all_units(init: Systemd, three: list[Qemu], sets: Sets) -> None:
    result = leave(init, arguments(planned(sets, three), cpu_weight=20, nice=3, ionice="idle"))
    assert not result.get("warnings"), result
    unit, process = scope_of(result), follow(sets)["pid"]
    assert init.unit_of(process) == f"/{unit}"
    assert (init.show(unit, "CPUWeight"), init.show(unit, "Slice")) == ("20", "-.slice")
    group = init.seen_here("/sys/fs/cgroup")
    # There is no such file where the controller is bound to a hierarchy of version 1.
    if "cpu" in (group / "cgroup.controllers").read_text().split():
        assert (group / unit / "cpu.weight").read_text() == "20\n"
    for each in init.processes(unit):
        assert init.run("ionice", "-p", str(each)).strip() == "idle"
        assert init.run("ps", "-o", "ni=", "-p", str(each)).strip() == "3"
    release_each(three)
    assert states(follow(sets, result["worker"])) == ["published"] * 3


def test_whose_scope_is_stopped_is_a_killed_worker(
    init: Systemd, three: list[Qemu], sets: Sets, directory: Path
) -> None:
    copies = [frozen(vm, directory) for vm in three]
    plan = planned(sets, three)
    first = leave(init, arguments(plan))
    [running] = [vm for vm in three if vm.block_jobs]
    job = running.job["device"]
    init.run("systemctl", "stop", scope_of(first))
    found = follow(sets, first["worker"])
    # It has not been cancelled: who follows it has it replaced.
    assert (found["running"], "vms" in found) == (False, False)
    assert init.units(SCOPES) == []
    assert running.job["device"] == job
    again = leave(init, arguments(plan))
    assert states(again) == ["queued", "queued", "running"]
    assert init.units(SCOPES) == [scope_of(again)] != [scope_of(first)]
    assert running.job["device"] == job
    release_each(three)
    assert states(follow(sets, again["worker"])) == ["published"] * 3
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")


@pytest.fixture
def off(vms: Vms, directory: Path) -> dict[str, t.Any]:
    """A VM that is off."""
    disk = vms.disk(9, size=8 * MIB)
    disks = [{"name": "drive9", "file": str(disk.path), "format": "qcow2"}]
    return {"name": "off9", "monitor": f"{directory}/off.qmp", "disks": disks}


def release_off(init: Systemd) -> None:
    """Let the copy of the VM that is off go on."""
    [monitor] = init.seen_here(DIRECTORY).glob(f"{PLACE}*/qmp")
    with contextlib.closing(Qmp(monitor)) as qmp:
        for job in qmp.execute("query-block-jobs"):
            qmp.execute("block-job-set-speed", device=job["device"], speed=0)


@pytest.mark.parametrize("how", ["worker killed", "scope stopped"])
def test_the_copy_of_a_vm_that_is_off_is_in_there(
    how: str, init: Systemd, off: dict[str, t.Any], sets: Sets, directory: Path
) -> None:
    expected = {"drive9": Path(shutil.copy(off["disks"][0]["file"], directory / "frozen.qcow2"))}
    plan = sets.plan(id="s1", speed="64K", vms=[off], offline="backup")["plan"]
    first = leave(init, arguments(plan))
    unit = scope_of(first)
    # It gets a limit of time by timeout(1).
    copying = {"timeout", "qemu-storage-da"}
    assert states(first) == ["running"]
    assert copying < set(init.processes(unit).values())
    if how == "worker killed":
        init.run("kill", "-KILL", str(follow(sets)["pid"]))
        wait_until(lambda: not follow(sets)["running"], "the end of the worker")
        # The unit goes with the last of its processes.
        wait_until(lambda: set(init.processes(unit).values()) == copying, "the end of its child")
    else:
        init.run("systemctl", "stop", unit)
        assert init.units(SCOPES) == []
    again = leave(init, arguments(sets.plan(id="s1", speed="64K", vms=[off], offline="backup")["plan"]))
    assert states(again) == ["running"]
    assert set(init.units(SCOPES)) == {scope_of(again), *([unit] if how == "worker killed" else [])}
    release_off(init)
    assert states(follow(sets, again["worker"])) == ["published"]
    sets.assert_good("off9", expected, "s1")
    wait_until(lambda: not init.units(SCOPES), "the end of both units")


# Without a scope


@pytest.mark.parametrize("what", ["hangs", "cannot be reached"])
def test_without_an_answer_of_systemd_it_stays_where_it_is(
    what: str, init: Systemd, three: list[Qemu], sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(sets, three)
    if what == "hangs":
        monkeypatch.setattr(scope, "BOUND", 0.5)
        init.hang()
        reason = "systemd does not answer within 0.5 s"
    else:
        init.run("systemctl", "stop", "dbus.socket", "dbus.service")
        reason = "Failed to connect to bus"
    result = succeed("backup_set", arguments(plan, cpu_weight=20), inside=sets.inside)
    why, weight = sorted(result["warnings"], reverse=True)
    assert why.startswith("detach: the worker ends with the session or the unit that it was started from: ")
    assert weight.startswith("cpu_weight: it is not set, because the worker has no unit of its own: ")
    assert reason in why
    assert reason in weight
    release_each(three)
    assert states(follow(sets, result["worker"])) == ["published"] * 3
    # Who is followed is replaced, and therefore that is no warning then.
    plan = sets.plan(*three, speed=SLOW, id="s2")["plan"]
    result = succeed("backup_set", arguments(plan, detach="preferred"), inside=sets.inside)
    assert result["warnings"] == []
    assert states(follow(sets, result["worker"])) == ["published"] * 3


def test_in_a_container_that_sees_the_run_of_its_host(init: Systemd, three: list[Qemu], sets: Sets) -> None:
    """What is process 7 in there is another one to systemd."""
    plan = planned(sets, three)
    container = ("unshare", "--pid", "--mount-proc", "--fork")
    assert init.run(*container, "busctl", "call", *scope.BUS[:2], "org.freedesktop.DBus.Peer", "Ping") == ""
    result = leave(init, arguments(plan, slice=60, max_vms=0, cpu_weight=20), *container)
    [warning] = map(warning_of, result["warnings"])
    assert warning.startswith(
        "cpu_weight: it is not set, because the worker has no unit of its own: systemd is not the"
    )
    assert init.units(SCOPES) == []


# The systemd of these tests


def test_nothing_of_this_machine_can_be_written_to(init: Systemd, directory: Path) -> None:
    for place in ("/", "/etc", "/usr", "/var", "/var/lib", "/root", "/sys", "/proc/sys/fs/nr_open", sys.prefix, ROOT):
        assert init.attempt("test", "-w", place).returncode == 1, place
    for place in ("/tmp", "/var/tmp", "/var/log", "/run", "/dev/shm"):
        made = init.run("mktemp", "-p", place).strip()
        assert init.seen_here(made).exists()
        assert not Path(made).exists()
    assert Path(init.run("mktemp", "-p", str(directory)).strip()).exists()
