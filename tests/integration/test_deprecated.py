# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A QEMU that has drive-backup no more: the same is done by blockdev-backup, and nothing of it is left."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.backup import (
    assert_absent,
    assert_good,
    backup,
    fail_backup,
    partial,
    release,
    sent,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.history import History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, unlocked, write
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets
from ansible_collections.vmfleet.backup.tests.unit.plugins.guest_agent import ScriptedAgent

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

    Start = t.Callable[..., ModuleProcess]
    Clean = t.Callable[[], None]

pytestmark = pytest.mark.usefixtures("clean")

NAME = "web01"
ATTEMPT = "0123456789ab"


@pytest.fixture
def vm(vms: Vms) -> Qemu:
    """A VM with two disks whose QEMU refuses what is deprecated."""
    return vms.start(vms.disk(0), vms.disk(1), name=NAME, rejecting=True)


def frozen(vm: Qemu, directory: Path, name: str = "frozen") -> dict[str, Path]:
    return {disk.name: vm.freeze(disk, directory / f"{name}-{disk.name}.qcow2") for disk in vm.disks}


def target_nodes(vm: Qemu) -> list[str]:
    """The nodes of this collection's targets."""
    nodes = vm.qmp.execute("query-named-block-nodes", flat=True)
    return [node["node-name"] for node in nodes if node["node-name"].startswith("vmf.")]


def nodes_of(result: dict[str, t.Any]) -> list[str]:
    """The nodes that a call has added."""
    return [data["node-name"] for data in sent(result, "blockdev-add")]


class TestSets:
    @pytest.mark.parametrize("compression", ["none", "zstd"])
    def test_chain(self, compression: str, vm: Qemu, sets: Sets, directory: Path, clean: Clean) -> None:
        history = History(vm, sets, directory)
        for set_id, level in {"a": "full", "b": "differential", "c": "differential", "d": "incremental"}.items():
            history.freeze(set_id)
            result = sets.back_up(vm, id=set_id, level=level, compression=compression)
            assert history.note(set_id) == {"drive0": level, "drive1": level}
            assert len(sent(result, "blockdev-backup")) == 2
            assert sorted(nodes_of(result)) == sorted(data["target"] for data in sent(result, "blockdev-backup"))
            assert all(len(name) <= 31 for name in nodes_of(result))
            clean()
            # What the parent's image holds must be covered by zeroes that are written, discarded or marked.
            vm.write("drive0", 0, 8 * MIB, 3 * MIB)
            vm.io("drive0", "write -z 20M 2M")
            vm.write("drive1", 0xE0, 5 * MIB, MIB)
        history.check()

    def test_zeroes_take_no_space(self, vm: Qemu, vms: Vms, sets: Sets) -> None:
        other = vms.start(vms.disk(2), vms.disk(3), name="web02")
        for each in (vm, other):
            each.write(each.disks[0].name, 0, 0, 16 * MIB)
        sets.back_up(vm, other)
        taken = [[image.stat().st_blocks * 512 for image in sets.images(name).values()] for name in (NAME, "web02")]
        for zeroed, other_disk in taken:
            assert zeroed < other_disk - 7 * MIB

    def test_frozen_guest(self, vm: Qemu, sets: Sets, directory: Path) -> None:
        copies = frozen(vm, directory)
        with ScriptedAgent(vm.directory / "agent") as agent:
            request = {"monitor": str(vm.monitor), "agent": agent.path, "quiesce": "require"}
            result = sets.back_up(vm, vms=[request])
            wait_until(lambda: agent.idle, "the end of the guard")
        sets.assert_good(NAME, copies)
        assert sets.manifest(NAME)["consistency"] == "filesystem"
        # That there is no drive-backup is found out by the rehearsal. A frozen guest waits for the start alone.
        names = [entry["execute"] for entry in result["qmp"]]
        transactions = [number for number, name in enumerate(names) if name == "transaction"]
        assert len(transactions) == 3
        between = names[transactions[1] + 1 : transactions[2]]
        assert between.count("blockdev-del") == between.count("blockdev-add") == 2
        assert len(sent(result, "drive-backup")) == 2

    def test_cancelled(self, vm: Qemu, sets: Sets) -> None:
        sets.start(vm)
        assert len(target_nodes(vm)) == 2
        result = succeed("backup_set", {"repository": str(sets.path), "names": [NAME], "state": "cancelled"})
        assert result["vms"][0]["state"] == "cancelled"
        sets.assert_absent(NAME)

    def test_job_of_others_goes_on(self, vms: Vms, sets: Sets, directory: Path, start_module: Start) -> None:
        # What a glance shows while jobs run is not what there is when those of the set have ended.
        base = create(directory / "base.qcow2")
        write(base, "write -P 1 0 32M")
        top = Disk(create(directory / "top.qcow2", backing=base), id="drive1", node="n1")
        vm = vms.start(vms.disk(0), top, name=NAME, rejecting=True)
        copies = {"drive0": vm.freeze(vm.disks[0], directory / "frozen.qcow2")}
        plan = sets.plan(vm, exclude_disks=["drive1"], speed="1M")["plan"]
        process = start_module("backup_set", {"plan": plan})
        wait_until(lambda: vm.block_jobs, "the start of the job")
        vm.qmp.execute("block-stream", device="drive1", job_id="s", speed=1)
        for job in vm.block_jobs:
            vm.qmp.execute("block-job-set-speed", device=job["device"], speed=int(job["device"] == "s"))
        assert process.result()["rc"] == 0
        sets.assert_good(NAME, copies)
        vm.qmp.execute("block-job-cancel", device="s", force=True)
        wait_until(lambda: not vm.block_jobs, "the end of the foreign job")

    def test_qemu_killed(self, vm: Qemu, sets: Sets, directory: Path) -> None:
        copies = frozen(vm, directory)
        sets.start(vm)
        vm.kill()
        vm.restart()
        sets.back_up(vm)
        sets.assert_good(NAME, copies)

    def test_target_fills_up(self, vm: Qemu, storage: Storage) -> None:
        small = storage.mount("ext2", 160 * MIB)
        sets = Sets(small.path / "repository")
        plan = sets.plan(vm, speed="1M")["plan"]
        succeed("backup_set", {"plan": plan, "state": "started", "unattended": True})
        small.fill()
        release(vm)
        assert run_module("backup_set", {"plan": plan})["vms"][0]["state"] == "failed"
        assert target_nodes(vm) == []
        sets.assert_absent(NAME)
        assert vm.status == "running"

    def test_leftover_of_nobody(self, vm: Qemu, sets: Sets, directory: Path, clean: Clean) -> None:
        copies = frozen(vm, directory)
        sets.back_up(vm)
        tag = sets.manifest(NAME)["repository"][:8]
        image = create(directory / "left.qcow2")
        add_node(vm, f"vmf.{tag}.{ATTEMPT}.0", image)
        shown = succeed("vm_info", {"monitors": [str(vm.monitor)]})["vms"][0]
        assert [disk["name"] for disk in shown["disks"]] == ["drive0", "drive1"]
        sets.back_up(vm)
        assert unlocked(image)
        clean()
        sets.assert_good(NAME, copies)

    def test_killed_at_every_step(
        self, vms: Vms, sets: Sets, directory: Path, start_module: Start, clean: Clean
    ) -> None:
        vm = vms.start(vms.disk(size=32 * MIB), name=NAME, rejecting=True)
        copies = frozen(vm, directory)
        record = directory / "record"
        plan = sets.plan(vm, id="s0", level="full")["plan"]
        start_module("backup_set", {"plan": plan}, record=record).result()
        points = [
            point
            for point in crash.read(record)
            if crash.JOBS & {*point.name.split(":")[0].split(" > ")} and point.hit == 1
        ]
        assert {"blockdev-add", "blockdev-del"} <= {point.name.rsplit(" ", 1)[1] for point in points}
        for number, point in enumerate(points, 1):
            set_id = f"s{number}"
            plan = sets.plan(vm, id=set_id, level="full")["plan"]
            process = start_module("backup_set", {"plan": plan}, crash_at=point)
            process.wait()
            assert process.killed, point
            # The next run, which may be one of another set, has to be enough.
            sets.back_up(vm, id=set_id, level="full")
            sets.assert_good(NAME, copies, set_id)
            clean()


def add_node(vm: Qemu, name: str, image: Path) -> None:
    """As a call does that is killed right after."""
    file = {"driver": "file", "filename": str(image)}
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name=name, backing=None, file=file)


class TestDriveBackup:
    @pytest.mark.parametrize("name", ["full", "top", "raw", "compressed", "existing", "own id"])
    @pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
    def test_one_disk(self, name: str, tcp: bool, vms: Vms, target: Path, directory: Path, clean: Clean) -> None:
        vm = vms.start(vms.disk(0), rejecting=True, tcp=tcp)
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        given: dict[str, dict[str, t.Any]] = {
            "top": {"sync": "top"},
            "raw": {"format": "raw"},
            "compressed": {"compress": True},
            "existing": {"mode": "existing"},
            "own id": {"job_id": "nightly"},
        }
        options = given.get(name, {})
        if tcp:
            options["monitor"] = f"tcp:127.0.0.1:{vm.tcp_port}"
        if name == "existing":
            create(target)
        result = backup(vm, target, **options)
        assert len(sent(result, "blockdev-backup")) == 1
        assert_good(target, copy, options.get("format", "qcow2"))
        clean()
        again = backup(vm, target, **options)
        assert not again["changed"]
        assert again["qmp"] == []

    @pytest.mark.parametrize("options", [{"sync": "incremental"}, {"sync": "bitmap", "bitmap_mode": "never"}])
    def test_increment(self, options: dict[str, t.Any], vm: Qemu, target: Path, directory: Path) -> None:
        vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
        backup(vm, target)
        vm.write("drive0", 0, 8 * MIB, MIB)
        vm.write("drive0", 0xE7, 40 * MIB, MIB)
        top = create(target.with_name("increment.qcow2"), backing=target)
        result = backup(vm, top, mode="existing", bitmap="b0", **options)
        assert len(sent(result, "blockdev-backup")) == 1
        assert identical(vm.freeze(vm.disks[0], directory / "frozen.qcow2"), top)

    def test_block_device(self, vm: Qemu, storage: Storage, directory: Path) -> None:
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        device = storage.loop(64 * MIB)
        receipt = directory / "device.receipt.json"
        backup(vm, device, mode="existing", format="raw", receipt=str(receipt))
        assert identical(copy, device, other_format="raw")

    @pytest.mark.parametrize("completion_mode", ["grouped", "individual"])
    def test_several_disks_followed_by_another_process(
        self, completion_mode: str, vm: Qemu, target: Path, directory: Path
    ) -> None:
        copies = frozen(vm, directory)
        drives = [
            {"device": disk.name, "target": str(target.with_name(f"{disk.name}.qcow2")), "speed": "1M"}
            for disk in vm.disks
        ]
        backup(vm, drives=drives, completion_mode=completion_mode, state="started")
        release(vm)
        wait_until(lambda: all(job["status"] == "concluded" for job in vm.block_jobs), "the end of the jobs")
        backup(vm, drives=drives, completion_mode=completion_mode)
        for name, copy in copies.items():
            assert_good(target.with_name(f"{name}.qcow2"), copy)

    def test_cancelled(self, vm: Qemu, target: Path) -> None:
        start_slowly(vm, target)
        assert len(target_nodes(vm)) == 1
        backup(vm, target, state="cancelled")
        assert_absent(target)

    def test_target_full(self, vm: Qemu, storage: Storage) -> None:
        mount = storage.mount("ext2", 96 * MIB)
        target = mount.path / "disk.qcow2"
        start_slowly(vm, target)
        mount.fill()
        release(vm)
        assert "No space left on device" in fail_backup(vm, target)["msg"]
        assert_absent(target)

    def test_whole_image_only_after_its_node(self, vm: Qemu, target: Path, directory: Path) -> None:
        # QEMU itself keeps what has not been written until the node is gone.
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        start_slowly(vm, target)
        release(vm)
        wait_concluded(vm)
        assert not unlocked(partial(target))
        result = backup(vm, target)
        assert [entry["execute"] for entry in result["qmp"]] == ["blockdev-del", "job-dismiss"]
        assert_good(target, copy)

    def test_leftover_of_another_target(self, vm: Qemu, target: Path, directory: Path) -> None:
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        image = create(directory / "left.qcow2")
        add_node(vm, f"vmf.db.{ATTEMPT}", image)
        backup(vm, target)
        assert unlocked(image)
        assert_good(target, copy)

    def test_leftover_is_no_image_of_the_vm(self, vm: Qemu, target: Path, directory: Path) -> None:
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
        add_node(vm, f"vmf.db.{ATTEMPT}", create(target))
        backup(vm, target, mode="existing")
        assert_good(target, copy)

    def test_killed_at_every_step(
        self, vm: Qemu, target: Path, directory: Path, start_module: Start, clean: Clean
    ) -> None:
        copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")

        def call(path: Path) -> dict[str, t.Any]:
            return {"monitor": str(vm.monitor), "device": "drive0", "target": str(path)}

        record = directory / "record"
        start_module("drive_backup", call(target), record=record).result()
        points = [point for point in crash.read(record) if crash.JOBS & {*point.name.split(":")[0].split(" > ")}]
        assert {"blockdev-add", "blockdev-del"} <= {point.name.rsplit(" ", 1)[1] for point in points}
        for number, point in enumerate(points):
            path = target.with_name(f"{number}.qcow2")
            process = start_module("drive_backup", call(path), crash_at=point)
            process.wait()
            assert process.killed, point
            backup(vm, path)
            assert_good(path, copy)
            clean()


def test_job_is_paused_and_goes_on(vm: Qemu, target: Path) -> None:
    start_slowly(vm, target)
    order = {"monitor": str(vm.monitor), "job_id": vm.job["device"]}
    paused = succeed("block_job", {**order, "state": "paused"})
    assert [entry["execute"] for entry in paused["qmp"]] == ["job-pause"]
    assert vm.job["paused"]
    running = succeed("block_job", {**order, "state": "running"})
    assert [entry["execute"] for entry in running["qmp"]] == ["job-resume"]
    assert not vm.job["paused"]
    release(vm)
    backup(vm, target)


def test_usual_qemu_is_told_nothing_more(vms: Vms, sets: Sets, target: Path) -> None:
    vm = vms.start(vms.disk(0), name=NAME)
    names = [entry["execute"] for entry in backup(vm, target)["qmp"]]
    names += [entry["execute"] for entry in sets.back_up(vm, id=ID)["qmp"]]
    assert not {"blockdev-add", "blockdev-backup", "blockdev-del"} & set(names)
