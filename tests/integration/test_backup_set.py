# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_plan and backup_set: from the plan in check mode to the second run; started here and followed there."""

from __future__ import annotations

import json
import stat
import subprocess
import typing as t
from datetime import UTC, date, datetime

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, sent, snapshot, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, info
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qmp, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, SLOW, Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def frozen(vm: Qemu, directory: Path) -> dict[str, Path]:
    """Copies of a VM's disks as they are now."""
    return {
        disk.id: vm.freeze(disk, directory / f"frozen-{vm.pid}-{disk.id}.qcow2")
        for disk in vm.disks
        if disk.id and disk.path
    }


def resume(vm: Qemu) -> None:
    """Let a paused VM run: QEMU 7.2 closes files that were passed to it only then, and when a monitor is let go."""
    vm.qmp.execute("cont")
    Qmp(vm.monitor).close()


def test_case_1_a_set_is_the_vms_disks(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01", uuid="4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e")
    copies = frozen(vm, directory)
    result = sets.back_up(vm)
    assert result["changed"] is True
    [web01] = result["vms"]
    assert web01["state"] == "published"
    assert web01["path"] == str(sets.path / "web01" / ID)
    assert web01["bytes"] == sum(path.stat().st_size for path in sets.images("web01").values())
    assert result["summary"]["published"] == 1
    sets.assert_good("web01", copies)
    manifest = sets.manifest("web01")
    assert manifest["vm"]["identity"] == manifest["vm"]["uuid"] == "4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e"
    assert manifest["consistency"] == "crash"
    assert stat.S_IMODE((sets.path / "web01" / ID).stat().st_mode) == 0o700


def test_case_2_all_disks_in_one_transaction(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    copies = frozen(vm, directory)
    plan = sets.start(vm)
    # Written while the copies run, and so not in them.
    vm.write("drive0", 0xAA, 0, 65536)
    vm.write("drive1", 0xAA, 60 << 20, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    sets.assert_good("web01", copies)


def test_case_3_a_second_run_changes_nothing(vm: Qemu, sets: Sets) -> None:
    sets.back_up(vm)
    before = snapshot(sets.path)
    planned = sets.plan(vm)
    assert [entry["action"] for entry in planned["plan"]["vms"]] == ["skip"]
    for state in ("started", "completed"):
        again = succeed("backup_set", {"plan": planned["plan"], "state": state})
        assert again["changed"] is False
        assert again["vms"][0]["state"] == "published"
        assert again["qmp"] == []
    assert snapshot(sets.path) == before


def test_a_set_is_published_for_a_vm_that_has_gone_off_since(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    sets.back_up(vm)
    vm.quit()
    again = sets.back_up(vm)
    assert again["changed"] is False
    assert again["vms"][0]["state"] == "published"


def test_case_4_check_mode_does_nothing(vm: Qemu, sets: Sets) -> None:
    planned = sets.plan(vm, check=True)
    assert planned["changed"] is False
    assert any("drive0: full" in line for line in planned["text"])
    result = run_module("backup_set", {"plan": planned["plan"]}, check=True, diff=True)
    assert result["changed"] is True
    assert result["qmp"] == []
    assert result["diff"]["before"] != result["diff"]["after"]
    assert not sets.path.exists()
    sets.back_up(vm)
    result = run_module("backup_set", {"plan": planned["plan"]}, check=True, diff=True)
    assert result["changed"] is False
    assert result["diff"]["before"] == result["diff"]["after"]


def test_case_5_a_second_run_follows_the_copies_of_the_first(
    vm: Qemu, directory: Path, sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    copies = frozen(vm, directory)
    first = start_module("backup_set", {"plan": sets.start(vm)})
    planned = sets.plan(vm)["plan"]
    assert [entry["action"] for entry in planned["vms"]] == ["attach"]
    second = start_module("backup_set", {"plan": planned})
    release(vm)
    results = [process.result() for process in (first, second)]
    assert [result["vms"][0]["state"] for result in results] == ["published"] * 2
    assert sum(not sent(result, "drive-backup") for result in results) == 2
    sets.assert_good("vm", copies)


def test_two_runs_at_the_same_moment_start_one_copy(
    vms: Vms, directory: Path, sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    vm = vms.start(name="web01")
    copies = frozen(vm, directory)
    plans = [sets.plan(vm)["plan"] for _dummy in range(4)]
    processes = [start_module("backup_set", {"plan": plan}) for plan in plans]
    results = [process.result() for process in processes]
    assert [result["vms"][0]["state"] for result in results] == ["published"] * 4
    assert sum(len(sent(result, "drive-backup")) for result in results) == 1
    sets.assert_good("web01", copies)


def test_case_6_started_here_and_completed_there(vm: Qemu, directory: Path, sets: Sets) -> None:
    copies = frozen(vm, directory)
    plan = sets.start(vm)
    assert (sets.path / "vm" / f".{ID}.staging").is_dir()
    assert not (sets.path / "vm" / ID).exists()
    release(vm)
    wait_concluded(vm)
    result = succeed("backup_set", {"plan": plan})
    assert result["changed"] is True
    sets.assert_good("vm", copies)


@pytest.mark.parametrize(
    ("lists", "chosen"),
    [
        ({"exclude_disks": ["drive1"]}, ["drive0"]),
        ({"exclude_disks": ["n0"]}, ["drive1"]),
        ({"include_disks": ["drive1"]}, ["drive1"]),
        ({"include_disks": ["n0", "n1"], "exclude_disks": ["drive0"]}, ["drive1"]),
    ],
)
def test_case_7_include_and_exclude(vms: Vms, sets: Sets, lists: dict[str, list[str]], chosen: list[str]) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    sets.back_up(vm, **lists)
    assert sorted(sets.images("web01")) == chosen


@pytest.mark.parametrize("option", ["include_disks", "exclude_disks"])
def test_case_7_an_unknown_name_fails_its_vm_only(vms: Vms, sets: Sets, option: str) -> None:
    one, other = vms.start(name="one"), vms.start(vms.disk(1, id="drive9"), name="other")
    result = sets.fail(one, other, **{option: ["drive9"]})
    assert result_of(result, "one")["state"] == "failed"
    assert option in result_of(result, "one")["error"]
    assert "drive0" in result_of(result, "one")["error"]
    assert result_of(result, "other")["state"] == ("published" if option == "include_disks" else "skipped")
    sets.assert_absent("one")


def test_a_vms_own_lists_replace_the_general_ones(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    own = [{"monitor": str(vm.monitor), "name": "db", "exclude_disks": ["drive1"]}]
    sets.back_up(vms=own, exclude_disks=["drive0"])
    assert list(sets.images("db")) == ["drive0"]


def test_case_8_disks_without_node_names(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(vms.disk(0, node=None), name="web01")
    copies = frozen(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)
    vm.quit()
    vm.restart()
    sets.back_up(vm, id="s2")
    sets.assert_good("web01", copies, "s2", {"drive0": "incremental"})
    assert [sets.manifest("web01", set_id)["sequence"] for set_id in ("s1", "s2")] == [1, 2]


def test_case_9_images_of_the_same_name(vms: Vms, directory: Path, sets: Sets) -> None:
    disks = []
    for number in range(2):
        (directory / str(number)).mkdir()
        disks.append(Disk(create(directory / str(number) / "disk.qcow2"), id=f"drive{number}", node=f"n{number}"))
    vm = vms.start(*disks, name="web01")
    vm.write("drive1", 7, 0, 65536)
    copies = frozen(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)


def test_case_10_a_paused_vm_stays_paused(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01", paused=True)
    copies = frozen(vm, directory)
    sets.back_up(vm)
    again = sets.back_up(vm)
    assert again["changed"] is False
    assert vm.status == "prelaunch"
    resume(vm)
    sets.assert_good("web01", copies)


def test_case_11_a_vm_that_is_off_fails_alone(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01")
    gone = f"unix:{directory}/gone.qmp"
    result = sets.fail(vm, gone)
    assert result_of(result, "web01")["state"] == "published"
    assert result_of(result, "gone")["state"] == "failed"
    assert gone in result["msg"]
    assert f"id {ID}" in result["msg"]
    sets.assert_absent("gone")


def test_case_11_a_vm_that_is_off_may_be_skipped(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01")
    result = sets.back_up(vm, f"{directory}/gone.qmp", offline="skip")
    assert result_of(result, "gone")["state"] == "skipped"


def test_a_vm_that_does_not_answer_is_never_skipped(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    vm.hang()
    try:
        result = sets.fail(vm, offline="skip")
    finally:
        vm.wake()
    assert "no QMP greeting" in result["msg"]


def test_case_13_an_overlay_is_backed_up_whole(vms: Vms, directory: Path, sets: Sets) -> None:
    base = vms.disk(0).path
    vm = vms.start(Disk(create(directory / "overlay.qcow2", backing=base)), name="web01")
    vm.write("drive0", 9, 1 << 20, 65536)
    copies = frozen(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)
    assert "backing-filename" not in info(sets.images("web01")["drive0"])


def test_case_15_pflash_in_and_drives_without_data_out(vms: Vms, directory: Path, sets: Sets) -> None:
    read_only = vms.disk(1, id="golden", node="n1", read_only=True)
    firmware = [create(directory / f"pflash{unit}.raw", 1 << 20, "raw") for unit in range(2)]
    vm = vms.start(
        vms.disk(0),
        read_only,
        Disk(None, id="cd"),
        name="web01",
        machine="q35,accel=tcg",
        paused=True,
        extra=[
            *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={firmware[0]}"),
            *("-drive", f"if=pflash,format=raw,unit=1,file={firmware[1]}"),
        ],
    )
    planned = sets.plan(vm)["plan"]["vms"][0]
    assert {disk["name"]: disk["reason"] for disk in planned["left_out"]} == {
        "cd": "has no medium",
        "golden": "is read-only",
        "pflash0": "is read-only",
    }
    sets.back_up(vm)
    assert set(sets.images("web01")) == {"drive0", "pflash1"}
    resume(vm)


def test_a_read_only_disk_that_is_named_is_backed_up(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0, read_only=True), name="web01")
    sets.back_up(vm, include_disks=["drive0"])
    assert set(sets.images("web01")) == {"drive0"}


def test_an_empty_drive_that_is_named_is_an_error(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0), Disk(None, id="cd"), name="web01")
    assert "no medium" in sets.fail(vm, include_disks=["cd"])["msg"]


def test_case_16_a_repository_is_made_only_when_asked(vm: Qemu, sets: Sets) -> None:
    refused = fail("backup_plan", sets.arguments(vm, create_repository=False))
    assert "not a repository" in refused["msg"]
    assert not sets.path.exists()
    sets.back_up(vm)
    assert stat.S_IMODE(sets.path.stat().st_mode) == 0o700
    assert json.loads((sets.path / "vmfleet.json").read_text())["schema"] == 1


def test_a_directory_with_other_things_is_no_place_for_a_repository(vm: Qemu, sets: Sets) -> None:
    sets.path.mkdir()
    (sets.path / "holiday.jpg").touch()
    assert "holiday.jpg" in fail("backup_plan", sets.arguments(vm))["msg"]


def test_case_17_what_stands_in_the_way_is_refused(vm: Qemu, sets: Sets) -> None:
    sets.back_up(vm, id="s0")
    (sets.path / "vm" / ID).mkdir()
    (sets.path / "vm" / ID / "precious").touch()
    before = snapshot(sets.path)
    assert "move it away" in sets.fail(vm)["msg"]
    assert snapshot(sets.path) == before


def test_a_set_of_another_vm_of_this_name_is_no_set_of_this_one(vms: Vms, sets: Sets) -> None:
    ids = ("4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e", "5dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e")
    sets.back_up(vms.start(name="web01", uuid=ids[0]))
    result = sets.fail(vms.start(vms.disk(1, id="drive0"), name="web01", uuid=ids[1]))
    assert ids[0] in result["msg"]
    assert ids[1] in result["msg"]


def test_a_set_without_a_chosen_disk_is_no_set(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1), name="web01")
    sets.back_up(vm, exclude_disks=["drive1"])
    assert "exists without disk drive1" in sets.fail(vm)["msg"]


@pytest.mark.parametrize("bad", ["../up", ".hidden", "a..b", "a/b", "", "x" * 65, "a b"])
def test_ids_lead_nowhere_else(vm: Qemu, sets: Sets, bad: str) -> None:
    assert fail("backup_plan", sets.arguments(vm, id=bad))["msg"].startswith("id: ")


def test_a_set_without_an_id_is_called_by_the_date(vm: Qemu, sets: Sets) -> None:
    before = datetime.now(UTC).date()
    call = {name: value for name, value in sets.arguments(vm).items() if name != "id"}
    planned = date.fromisoformat(succeed("backup_plan", call)["plan"]["id"])
    assert before <= planned <= datetime.now(UTC).date()


def test_names_lead_nowhere_else(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01")
    result = sets.back_up(vms=[{"name": "../../etc", "monitor": str(vm.monitor)}])
    assert result["vms"][0]["path"].startswith(str(sets.path) + "/etc-")
    assert sorted(path.name for path in directory.iterdir()) == ["repository", "source0.qcow2"]


@pytest.mark.parametrize(
    "options",
    [{"speed": "-1"}, {"speed": "fast"}, {"reserve": "much"}, {"repository": "backup"}, {"compression": "lzma"}],
)
def test_bad_options_are_refused_by_name(vm: Qemu, sets: Sets, options: dict[str, str]) -> None:
    assert next(iter(options)) in fail("backup_plan", sets.arguments(vm, **options))["msg"]


def test_vms_of_one_name_and_monitors_of_one_vm_fail_alone(vms: Vms, directory: Path, sets: Sets) -> None:
    one, other = vms.start(name="web"), vms.start(vms.disk(1), name="web")
    second = f"{directory}/second.qmp"
    third = vms.start(vms.disk(2), name="db", extra=["-qmp", f"unix:{second},server=on,wait=off"])
    fourth = vms.start(vms.disk(3), name="good")
    twins = [{"name": "db2", "monitor": second}]
    twins += [{"monitor": str(vm.monitor)} for vm in (one, other, third, fourth)]
    result = sets.fail(vms=twins)
    assert [vm["state"] for vm in result["vms"]] == ["failed"] * 4 + ["published"]
    assert "another VM is called web" in result["msg"]
    assert "the same QEMU" in result["msg"]


def test_sockets_by_pattern(vms: Vms, directory: Path, sets: Sets) -> None:
    machines = [vms.start(vms.disk(number), name=f"vm{number}") for number in range(3)]
    (directory / "run").mkdir()
    for vm in machines:
        (directory / "run" / f"{vm.monitor.name}").symlink_to(vm.monitor)
    (directory / "run" / "no-socket.qmp").touch()
    result = sets.back_up(vms=[], sockets=[f"{directory}/run/*.qmp"])
    assert [vm["name"] for vm in result["vms"]] == ["vm0", "vm1", "vm2"]
    planned = sets.plan(vms=[], sockets=[f"{directory}/nothing/*.qmp"])
    assert planned["plan"]["vms"] == []
    assert "no socket matches" in planned["plan"]["warnings"][0]


@pytest.mark.parametrize("compression", ["zstd", "zlib"])
def test_compression(vm: Qemu, directory: Path, sets: Sets, compression: str) -> None:
    copies = frozen(vm, directory)
    sets.back_up(vm, compression=compression)
    sets.assert_good("vm", copies)
    image = sets.images("vm")["drive0"]
    assert info(image)["format-specific"]["data"]["compression-type"] == compression
    assert image.stat().st_size < 8 << 20


@pytest.mark.parametrize("checksum", [True, False])
def test_images_do_not_fill_the_page_cache(vm: Qemu, storage: Storage, checksum: bool) -> None:
    sets = Sets(storage.mount("ext4", 128 * MIB).path / "repository")
    sets.back_up(vm, checksum=checksum)
    for image in sets.images("vm").values():
        assert image.stat().st_size > 32 * MIB
        fincore = ["fincore", "--bytes", "--noheadings", "--output", "RES", image]
        assert int(subprocess.run(fincore, capture_output=True, check=True).stdout) < MIB


def test_without_checksums(vm: Qemu, sets: Sets) -> None:
    sets.back_up(vm, checksum=False)
    assert [disk["sha256"] for disk in sets.manifest("vm")["disks"]] == [None]


def test_over_tcp(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01", tcp=True)
    copies = frozen(vm, directory)
    sets.back_up(f"tcp:127.0.0.1:{vm.tcp_port}")
    sets.assert_good("web01", copies)


def test_a_vm_without_rights_on_the_repository(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01", unprivileged=True)
    copies = frozen(vm, directory)
    sets.back_up(vm)
    sets.assert_good("web01", copies)


def test_no_more_than_max_vms_copy_at_a_time(vms: Vms, sets: Sets) -> None:
    machines = [vms.start(vms.disk(number), name=f"vm{number}") for number in range(3)]
    plan = sets.plan(*machines, speed=SLOW)["plan"]
    for _dummy in range(2):
        result = succeed("backup_set", {"plan": plan, "state": "started", "max_vms": 1})
        assert sorted(vm["state"] for vm in result["vms"]) == ["queued", "queued", "running"]
        assert sum(len(vm.block_jobs) for vm in machines) == 1
    for vm in machines:
        if vm.block_jobs:
            release(vm)
            wait_concluded(vm)
    fast = sets.plan(*machines)["plan"]
    result = succeed("backup_set", {"plan": fast, "max_vms": 1})
    assert [vm["state"] for vm in result["vms"]] == ["published"] * 3


def test_an_older_set_of_a_vm_that_has_gone_off_since(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    sets.start(vm, id="monday")
    vm.kill()
    named = [{"name": "web01", "monitor": str(vm.monitor)}]
    planned = sets.plan(vms=named, id="tuesday")["plan"]
    assert planned["vms"][0]["action"] == "finish"
    result = fail("backup_set", {"plan": planned})
    assert "the VM is off" in result_of(result, "web01")["error"]
    sets.assert_absent("web01", "monday")


def test_an_older_set_comes_first(vm: Qemu, directory: Path, sets: Sets) -> None:
    copies = frozen(vm, directory)
    sets.start(vm, id="monday")
    planned = sets.plan(vm, id="tuesday")["plan"]
    assert planned["vms"][0]["action"] == "finish"
    release(vm)
    succeed("backup_set", {"plan": planned})
    for set_id in ("monday", "tuesday"):
        sets.assert_good("vm", copies, set_id, {"drive0": {"monday": "full"}.get(set_id, "incremental")})
    assert [sets.manifest("vm", set_id)["sequence"] for set_id in ("monday", "tuesday")] == [1, 2]


def test_another_hypervisors_set_is_left_alone(vm: Qemu, sets: Sets) -> None:
    sets.start(vm)
    intent = sets.path / "vm" / f".{ID}.staging" / "intent.json"
    content = json.loads(intent.read_text())
    content["hypervisor"] = {"name": "other", "machine_id": "0" * 32, "boot_id": "1"}
    intent.write_text(json.dumps(content))
    assert "hypervisor other" in sets.fail(vm)["msg"]
    result = run_module("backup_set", {"repository": str(sets.path), "names": ["vm"], "state": "cancelled"})
    assert "cancel it there" in result["msg"]
    assert json.loads(intent.read_text()) == content
    assert vm.job["status"] == "running"
    vm.qmp.execute("block-job-cancel", device=vm.job["device"])
    vm.qmp.execute("job-dismiss", id=wait_concluded(vm)["device"])


def test_a_newer_manifest_is_never_skipped_over(vm: Qemu, sets: Sets) -> None:
    sets.back_up(vm)
    manifest = sets.path / "vm" / ID / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps({**sets.manifest("vm"), "schema": 2}))
    assert "update vmfleet.backup" in sets.fail(vm)["msg"]


def test_another_block_job_means_busy(vm: Qemu, directory: Path, sets: Sets) -> None:
    target = create(directory / "mirror.qcow2")
    vm.qmp.execute(
        "drive-backup", device="n0", job_id="foreign", target=str(target), sync="full", mode="existing", speed=1 << 20
    )
    result = sets.fail(vm)
    assert "busy: job foreign" in result["msg"]
    assert vm.job["device"] == "foreign"
    vm.qmp.execute("block-job-cancel", device="foreign")
    wait_until(lambda: not vm.block_jobs, "the end of the job")
    sets.back_up(vm)


def test_cancelled_leaves_nothing_and_is_not_begun_anew(
    vm: Qemu, sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    plan = sets.start(vm)
    follower = start_module("backup_set", {"plan": plan})
    result = succeed("backup_set", {"repository": str(sets.path), "names": ["vm"], "state": "cancelled"})
    assert result["changed"] is True
    assert result["vms"][0]["state"] == "cancelled"
    assert vm.block_jobs == []
    sets.assert_absent("vm")
    assert follower.result()["vms"][0]["state"] == "cancelled"
    again = succeed("backup_set", {"repository": str(sets.path), "names": ["vm"], "state": "cancelled"})
    assert again["changed"] is False
    sets.back_up(vm)
    sets.assert_tidy("vm")


def test_the_plan_of_something_else_is_refused() -> None:
    assert fail("backup_set", {"plan": {"id": "x"}})["msg"].startswith("plan: ")
