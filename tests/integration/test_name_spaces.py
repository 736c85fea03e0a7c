# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A backup that is begun outside of a container and gone on with inside, or the other way round; temporary disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    arguments,
    backup,
    fail_backup,
    partial,
    receipt,
    release,
    start_slowly,
)
from ansible_collections.vmfleet.backup.tests.harness.images import identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.modules import (
    PACKAGE,
    ROOT,
    module_input,
    run_module,
    succeed,
)
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, Disk, Qemu
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets

if t.TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Runner = Callable[..., dict[str, t.Any]]

CONTAINER = r"""
set -e
mount -t tmpfs tmpfs /run
[ -z "$1" ] || mount --bind "$1" /etc/machine-id
[ -z "$2" ] || mount -t tmpfs tmpfs "$2"
# A port there is refused, as it is by a machine, only while its own address is up.
[ -z "$3" ] || ip link set lo up
shift 3
exec "$@"
"""

UUID = "8f6f0000-0000-4000-8000-000000000001"


def outside(name: str, args: dict[str, t.Any]) -> dict[str, t.Any]:
    """Run a module as all other tests do."""
    return run_module(name, args)


def inside(
    name: str, args: dict[str, t.Any], machine_id: Path | str = "", hidden: Path | str = "", net: bool = False
) -> dict[str, t.Any]:
    """Run a module with processes and mounts of its own; `hidden` is a directory that is empty there."""
    spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", *(["--net"] * net)]
    return run_behind([*spaces, "bash", "-c", CONTAINER, "container", machine_id, hidden, "net" * net], name, args)


def in_service(name: str, args: dict[str, t.Any]) -> dict[str, t.Any]:
    """Run a module with mounts of its own only."""
    return run_behind(["unshare", "--mount"], name, args)


def run_behind(wrapper: t.Sequence[Path | str], name: str, args: dict[str, t.Any]) -> dict[str, t.Any]:
    """Run a module in the place that a command makes for it."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", f"{PACKAGE}.{name}"],
        input=module_input(args),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    return t.cast("dict[str, t.Any]", json.loads(done.stdout))


WAYS = pytest.mark.parametrize(
    ("there", "here"), [(outside, inside), (inside, outside), (inside, inside)], ids=["into", "out of", "into another"]
)
OWNERS = pytest.mark.parametrize("uuid", [UUID, None], ids=["uuid", "no uuid"])


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    return Sets(tmp_path / "repository")


def made(tmp_path: Path, uuid: str | None = None, **options: t.Any) -> Qemu:
    """A VM with one disk."""
    return Qemu(Disk(patterned(tmp_path / "disk.qcow2")), name="web01", uuid=uuid, **options)


def begin(there: Runner, sets: Sets, vm: Qemu | str) -> dict[str, t.Any]:
    """Start a set whose job runs until the test lets it go; returns the plan."""
    plan = there("backup_plan", sets.arguments(vm, speed="1M"))["plan"]
    result = there("backup_set", {"plan": plan, "state": "started"})
    assert [each["state"] for each in result["vms"]] == ["running"], result
    return t.cast("dict[str, t.Any]", plan)


def staging(sets: Sets) -> list[str]:
    return sorted(path.name for path in (sets.path / "web01" / f".{ID}.staging").glob("*"))


class TestSets:
    """What copies is left to copy; what cannot be judged is left alone."""

    @OWNERS
    @WAYS
    def test_goes_on(self, there: Runner, here: Runner, uuid: str | None, sets: Sets, tmp_path: Path) -> None:
        with made(tmp_path, uuid) as vm:
            frozen = vm.freeze(vm.disks[0], tmp_path / "frozen.qcow2")
            plan = begin(there, sets, vm)
            job = vm.job["device"]
            again = here("backup_set", {"plan": plan, "state": "started"})
            assert [each["state"] for each in again["vms"]] == ["running"], again
            assert vm.job["device"] == job
            release(vm)
            result = here("backup_set", {"plan": plan, "state": "completed"})
            assert [each["state"] for each in result["vms"]] == ["published"], result
            sets.assert_good("web01", {"drive0": frozen})

    @WAYS
    def test_is_cancelled(self, there: Runner, here: Runner, sets: Sets, tmp_path: Path) -> None:
        with made(tmp_path) as vm:
            plan = begin(there, sets, vm)
            result = here("backup_set", {"plan": plan, "state": "cancelled"})
            assert [each["state"] for each in result["vms"]] == ["cancelled"], result
            assert (vm.block_jobs, vm.fdsets, staging(sets)) == ([], [], [])

    @pytest.mark.parametrize("machine_id", ["another", ""], ids=["another machine-id", "no machine-id"])
    def test_is_known_by_its_job(self, machine_id: str, sets: Sets, tmp_path: Path) -> None:
        """Without a uuid the VM is called after the machine-id, which containers have of their own, or none at all."""
        image = tmp_path / "machine-id"
        image.write_text(machine_id)
        with made(tmp_path) as vm:
            frozen = vm.freeze(vm.disks[0], tmp_path / "frozen.qcow2")
            plan = begin(outside, sets, vm)
            release(vm)
            result = inside("backup_set", {"plan": plan, "state": "completed"}, machine_id=image)
            assert [each["state"] for each in result["vms"]] == ["published"], result
            sets.assert_good("web01", {"drive0": frozen})

    @pytest.mark.parametrize("state", ["completed", "cancelled"])
    def test_whose_socket_is_out_of_sight_is_not_dead(self, state: str, sets: Sets, tmp_path: Path) -> None:
        with made(tmp_path, UUID) as vm:
            plan = begin(outside, sets, vm)
            before, job = staging(sets), vm.job["device"]
            result = inside("backup_set", {"plan": plan, "state": state}, hidden=vm.directory)
            assert "This process cannot see whether its QEMU still copies" in result["msg"]
            assert "Run the backup where it began" in result["msg"]
            assert (staging(sets), vm.job["device"]) == (before, job)
            release(vm)
            assert succeed("backup_set", {"plan": plan})["summary"]["published"] == 1

    def test_whose_port_is_out_of_reach_is_not_dead(self, sets: Sets, tmp_path: Path) -> None:
        with made(tmp_path, UUID, tcp=True) as vm:
            plan = begin(outside, sets, f"tcp:127.0.0.1:{vm.tcp_port}")
            before, job = staging(sets), vm.job["device"]
            result = inside("backup_set", {"plan": plan}, net=True)
            assert "This process cannot see whether" in result["msg"]
            assert (staging(sets), vm.job["device"]) == (before, job)

    def test_another_vm_of_the_name_does_not_tell_of_it(self, sets: Sets, tmp_path: Path) -> None:
        """Two VMs without a uuid, each with the same monitor in a mount name space of its own."""
        with made(tmp_path) as vm:
            plan = begin(outside, sets, vm)
            before = staging(sets)
            other = patterned(tmp_path / "other.qcow2")
            with Qemu(Disk(other), name="web01") as twin:
                hiding = {**plan["vms"][0], "monitor": f"unix:{twin.monitor}"}
                result = inside("backup_set", {"plan": {**plan, "vms": [hiding]}})
                assert "This process cannot see whether" in result["msg"]
            assert staging(sets) == before
            assert vm.job["status"] == "running"

    def test_takeover(self, sets: Sets, tmp_path: Path) -> None:
        with made(tmp_path, UUID) as vm:
            plan = begin(outside, sets, vm)
            result = inside("backup_set", {"plan": plan, "takeover": True}, hidden=vm.directory)
            assert staging(sets) == []
            assert "taken over by hypervisor" in str(result["vms"][0]["warnings"])

    def test_that_has_died_is_made_anew(self, sets: Sets, tmp_path: Path) -> None:
        """A VM that answers and does not have the job any more was started again."""
        with made(tmp_path, UUID) as vm:
            plan = begin(outside, sets, vm)
            vm.kill()
            vm.restart()
            result = inside("backup_set", {"plan": plan})
            assert "QEMU" in result["msg"] or result["vms"][0]["state"] == "failed"
            again = inside("backup_set", {"plan": inside("backup_plan", sets.arguments(vm))["plan"]})
            assert [each["state"] for each in again["vms"]] == ["published"], again


class TestDriveBackup:
    """As with sets; here the record beside the target is all the memory there is."""

    @WAYS
    def test_goes_on(self, there: Runner, here: Runner, tmp_path: Path) -> None:
        target = tmp_path / "target.qcow2"
        with made(tmp_path, UUID) as vm:
            frozen = vm.freeze(vm.disks[0], tmp_path / "frozen.qcow2")
            begun = there("drive_backup", arguments(vm, target, state="started", speed="1M"))
            assert begun["jobs"][0]["state"] == "running", begun
            release(vm)
            result = here("drive_backup", arguments(vm, target))
            assert not result.get("failed"), result
            assert [command["execute"] for command in result["qmp"]] == ["job-dismiss"]
            assert identical(frozen, target)
            assert receipt(target).exists()

    def test_job_of_a_chosen_name_is_not_dead(self, tmp_path: Path) -> None:
        target = tmp_path / "target.qcow2"
        with made(tmp_path, UUID) as vm:
            start_slowly(vm, target, job_id="mine")
            result = inside("drive_backup", arguments(vm, target, job_id="mine"))
            assert "This process cannot see whether job mine still writes it" in result["msg"]
            assert partial(target).exists()
            release(vm)
            backup(vm, target, job_id="mine")

    @pytest.mark.parametrize("job_id", [{}, {"job_id": "mine"}], ids=["derived id", "chosen id"])
    def test_of_a_service_with_mounts_of_its_own_goes_on(
        self, job_id: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """What systemd starts with PrivateTmp has other mounts each time, but sees all processes, and their locks."""
        target = tmp_path / "target.qcow2"
        speeds = {"started": "1M", "completed": "1G"}
        with made(tmp_path, UUID) as vm:
            copy = vm.freeze(vm.disks[0], tmp_path / "frozen.qcow2")
            for state in ("started", "completed"):
                result = in_service("drive_backup", arguments(vm, target, state=state, speed=speeds[state], **job_id))
                assert not result.get("failed"), result
                assert [job["state"] for job in result["jobs"]] == ["running" if state == "started" else "completed"]
                if state == "started":
                    # The kernel gives the number of what has ended to the next one.
                    holder = subprocess.Popen(["unshare", "--mount", "sleep", "infinity"])
                    request.addfinalizer(holder.wait)
                    request.addfinalizer(holder.kill)
            assert identical(copy, target)

    @pytest.mark.parametrize("uuid", [UUID, None])
    def test_in_the_container_of_another_vm(self, uuid: str | None, tmp_path: Path) -> None:
        target = tmp_path / "target.qcow2"
        with made(tmp_path) as vm:
            start_slowly(vm, target)
            with Qemu(Disk(patterned(tmp_path / "other.qcow2")), name="web01", uuid=uuid) as twin:
                result = inside("drive_backup", arguments(twin, target))
                assert "This process cannot see whether" in result["msg"]
            assert partial(target).exists()
            assert vm.job["status"] == "running"


class TestTemporary:
    """A disk with snapshot=on: QEMU deletes what it copies it to, where that has a name."""

    @pytest.fixture
    def vm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qemu]:
        (tmp_path / "vm").mkdir()
        patterned(tmp_path / "vm" / "base.qcow2")
        # QEMU gets a relative name, and the modules are called from somewhere else.
        monkeypatch.chdir(tmp_path / "vm")
        disk = "file=base.qcow2,format=qcow2,if=none,id=drive0,snapshot=on"
        with Qemu(name="web01", tcp=True, extra=("-drive", disk)) as vm:
            monkeypatch.chdir(tmp_path)
            yield vm

    def test_is_copied_through_open_files(self, vm: Qemu, sets: Sets, tmp_path: Path) -> None:
        vm.write("drive0", 7, 0, 65536)
        target = tmp_path / "target.qcow2"
        backup(vm, target)
        assert sets.back_up(vm)["summary"]["published"] == 1
        assert identical(target, sets.images("web01")["drive0"])
        assert not identical(target, tmp_path / "vm" / "base.qcow2")

    @pytest.mark.parametrize("snapshots", [0, 1, 2])
    @pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
    def test_over_tcp(self, vm: Qemu, mode: str, snapshots: int, sets: Sets, tmp_path: Path) -> None:
        for number in range(snapshots):
            name = str(tmp_path / f"overlay{number}.qcow2")
            vm.qmp.execute("blockdev-snapshot-sync", device="drive0", snapshot_file=name, format="qcow2")
        target = tmp_path / "target.qcow2"
        if mode == "existing":
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, "64M"], check=True)
        monitor = f"tcp:127.0.0.1:{vm.tcp_port}"
        result = fail_backup(vm, target, monitor=monitor, mode=mode)
        assert result["msg"].startswith("device: disk drive0 of VM web01 is temporary")
        assert target.exists() == (mode == "existing")
        assert not partial(target).exists()
        plan = sets.plan(monitor)["plan"]
        assert plan["vms"][0]["action"] == "fail"
        assert "is temporary" in plan["vms"][0]["reason"]
        assert "exclude_disks" in plan["vms"][0]["reason"]

    @pytest.mark.parametrize("tcp", [False, True])
    @pytest.mark.parametrize("locking", ["on", "off"])
    def test_no_image_of_the_vm_is_replaced(
        self, tcp: bool, locking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its base is read only, and has a name that means nothing elsewhere."""
        (tmp_path / "vm").mkdir()
        monkeypatch.chdir(tmp_path / "vm")
        base = patterned(tmp_path / "vm" / "base.qcow2")
        top = patterned(tmp_path / "top.qcow2")
        copy = shutil.copyfile(base, tmp_path / "copy.qcow2")
        extra = (
            "-blockdev",
            f"qcow2,node-name=b,read-only=on,file.driver=file,file.filename=base.qcow2,file.locking={locking}",
        )
        with Qemu(Disk(top), name="web01", tcp=True, extra=extra) as vm:
            monkeypatch.chdir(tmp_path)
            monitor = f"tcp:127.0.0.1:{vm.tcp_port}" if tcp else str(vm.monitor)
            for more in ({}, {"mode": "existing"}):
                result = fail_backup(vm, base, monitor=monitor, overwrite=True, **more)
                assert "an image of VM web01 itself" in result["msg"] or "is in use" in result["msg"]
            assert vm.block_jobs == []
        assert identical(base, copy)
        assert not receipt(base).exists()

    def test_image_that_another_vm_reads(self, tmp_path: Path) -> None:
        base = patterned(tmp_path / "base.qcow2")
        with (
            made(tmp_path) as vm,
            Qemu(Disk(base, read_only=True), name="reader"),
        ):
            assert "is in use by another process" in fail_backup(vm, base, overwrite=True)["msg"]

    def test_own_backup_is_replaced_over_tcp(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "vm").mkdir()
        monkeypatch.chdir(tmp_path / "vm")
        patterned(tmp_path / "vm" / "base.qcow2")
        disk = "file=base.qcow2,format=qcow2,if=none,id=drive0,node-name=n0"
        target = tmp_path / "target.qcow2"
        with Qemu(name="web01", tcp=True, extra=("-drive", disk)) as vm:
            monkeypatch.chdir(tmp_path)
            monitor = f"tcp:127.0.0.1:{vm.tcp_port}"
            backup(vm, target, monitor=monitor)
            vm.write("drive0", 9, 0, 65536)
            backup(vm, target, monitor=monitor, sync="top", overwrite=True)
            target.write_bytes(b"somebody's")
            assert (
                "may be an image of VM web01 itself" in fail_backup(vm, target, monitor=monitor, overwrite=True)["msg"]
            )
            assert target.read_bytes() == b"somebody's"
