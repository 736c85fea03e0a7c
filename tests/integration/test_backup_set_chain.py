# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set and chains: every set holds what the guest's disks held at its moment."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, sent, snapshot, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, write
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

UUID = "4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e"


def test_case_36_each_set_holds_what_there_was_then(history: History, sets: Sets) -> None:
    vm = history.vm
    assert history.back_up("s1") == "full"
    assert history.bitmaps() == history.recorded("s1")
    vm.write("drive0", 0xA1, MIB, 65536)
    assert history.back_up("s2") == "incremental"
    assert history.bitmaps() == history.recorded("s2")
    vm.write("drive0", 0xB1, MIB + 4096, 65536)
    vm.write("drive0", 0xB2, 7 * MIB, 512)
    assert history.back_up("s3") == "incremental"
    assert history.reason("s3") == "changes since set s2"
    # Nothing has changed since.
    assert history.back_up("s4") == "incremental"
    assert history.bitmaps() == history.recorded("s4")
    history.check()
    sizes = [
        path.stat().st_size for set_id in ("s1", "s2", "s3", "s4") for path in sets.images("web01", set_id).values()
    ]
    assert sizes[0] > 4 * MIB > MIB > max(sizes[1:])
    [image] = sets.images("web01", "s3").values()
    assert info(image)["backing-filename"] == "../s2/drive0.qcow2"
    assert [sets.manifest("web01", set_id)["disks"][0]["parent"] for set_id in ("s1", "s3")] == [
        None,
        {
            "id": "s2",
            "sha256": sets.manifest("web01", "s2")["disks"][0]["sha256"],
            "attempt": sets.manifest("web01", "s2")["attempt"],
            "disk": "",
        },
    ]


def test_case_3_a_second_run_of_an_increment_changes_nothing(history: History, sets: Sets) -> None:
    history.back_up("s1")
    history.back_up("s2")
    before = snapshot(sets.path), history.bitmaps()
    again = sets.back_up(history.vm, id="s2")
    assert (again["changed"], again["qmp"]) == (False, [])
    assert result_of(again, "web01")["level"] == "incremental"
    assert (snapshot(sets.path), history.bitmaps()) == before


def test_case_36_writes_while_an_increment_is_copied_are_in_the_next(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    history.freeze("s2")
    plan = sets.start(vm, id="s2", speed=SLOW)
    vm.write("drive0", 0xB1, 6 * MIB + 65536, 65536)
    vm.write("drive0", 0xB2, 7 * MIB, 65536)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert history.note("s2") == {"drive0": "incremental"}
    assert [bitmap["count"] for bitmap in vm.bitmaps("n0").values()] == [2 * 65536]
    assert history.back_up("s3") == "incremental"
    history.check()


def test_case_37_zeroed_and_discarded_blocks_read_as_zeroes(history: History, sets: Sets, directory: Path) -> None:
    vm = history.vm
    # A disk that gives discarded blocks back to its file system.
    path = create(directory / "thin.qcow2", SIZE)
    write(path, f"write -P 7 0 {SIZE}")
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    vm.qmp.execute("blockdev-add", driver="qcow2", node_name="thin", discard="unmap", file=file)
    vm.disks = (*vm.disks, Disk(path, id=None, node="thin"))
    history.back_up("s1")
    vm.write("drive0", 0xA1, MIB, MIB)
    history.back_up("s2")
    # In what the full has, in what the increment has, and in what is a hole anyhow.
    for command in ("write -z 0 128k", "write -z -u 1M 256k", "discard 1280k 128k", "write -z 512k 64k"):
        vm.io("drive0", command)
    vm.io("thin", "discard 2M 1M")
    vm.io("thin", "write -z -u 4M 1M")
    assert history.back_up("s3") == "incremental"
    history.check()
    # What they read as then, they read as for ever: nothing of the full shines through.
    vm.write("drive0", 0xC1, 0, 65536)
    assert history.back_up("s4") == "incremental"
    history.check()
    assert "read 131072/131072" in vm.io("thin", "read -P 0 2M 128k")
    assert sets.images("web01", "s3")["thin"].stat().st_size < MIB


def test_case_50_a_long_chain_whose_ids_and_clocks_say_nothing(history: History, sets: Sets) -> None:
    vm = history.vm
    ids = ["zulu", "2026-01-02", "2026-01-01", "s10", "s9", "b", "B2", "a.failed.json", "c.staging", "d.new", "1", "0"]
    for number, set_id in enumerate(ids):
        vm.write("drive0", 0x10 + number, number * 512 * 1024, 65536)
        assert history.back_up(set_id) == ("incremental" if number else "full")
        manifest = sets.path / "web01" / set_id / "manifest.json"
        # As if the clock had been set back by a year before each of the next sets.
        said = {**json.loads(manifest.read_text()), "started": f"{2040 - number}-01-01T00:00:00Z"}
        said["finished"] = said["started"]
        manifest.unlink()
        manifest.write_text(json.dumps(said))
    assert [sets.manifest("web01", set_id)["sequence"] for set_id in ids] == list(range(1, 13))
    parents = [sets.manifest("web01", set_id)["disks"][0]["parent"] for set_id in ids]
    assert [parent and parent["id"] for parent in parents] == [None, *ids[:-1]]
    history.check()


@pytest.mark.parametrize("compression", ["zstd", "zlib"])
def test_case_53_compressed_increments(history: History, sets: Sets, compression: str) -> None:
    vm = history.vm
    history.back_up("s1", compression=compression)
    vm.write("drive0", 0xA1, MIB, MIB)
    vm.io("drive0", "write -z 0 128k")
    assert history.back_up("s2", compression=compression) == "incremental"
    # A chain may be of both sorts.
    vm.write("drive0", 0xA2, MIB + 4096, 65536)
    assert history.back_up("s3") == "incremental"
    history.check()
    [image] = sets.images("web01", "s2").values()
    assert info(image)["format-specific"]["data"]["compression-type"] == compression
    assert image.stat().st_size < 512 * 1024


def test_without_checksums(vms: Vms, sets: Sets, directory: Path) -> None:
    vm = vms.start(vms.disk(size=SIZE), name="web01")
    copies = {}
    for number in range(3):
        vm.write("drive0", 0xA1 + number, number * MIB, 65536)
        copies[f"s{number}"] = vm.freeze(vm.disks[0], directory / f"frozen-{number}.qcow2")
        sets.back_up(vm, id=f"s{number}", checksum=False)
    for set_id, copy in copies.items():
        assert identical(copy, sets.images("web01", set_id)["drive0"])
    newest = sets.manifest("web01", "s2")["disks"][0]
    assert (newest["level"], newest["sha256"], newest["parent"]["sha256"]) == ("incremental", None, None)
    assert newest["parent"]["attempt"] == sets.manifest("web01", "s1")["attempt"]


def test_a_set_that_is_there_is_asked_for_while_the_next_is_made(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    history.freeze("s2")
    plan = sets.start(vm, id="s2", speed=SLOW)
    bitmaps, jobs = set(vm.bitmaps("n0")), [job["device"] for job in vm.block_jobs]
    again = sets.back_up(vm, id="s1")
    assert (again["changed"], again["qmp"]) == (False, [])
    assert (set(vm.bitmaps("n0")), [job["device"] for job in vm.block_jobs]) == (bitmaps, jobs)
    release(vm)
    succeed("backup_set", {"plan": plan})
    assert history.note("s2") == {"drive0": "incremental"}
    assert history.back_up("s3") == "incremental"
    history.check()


def test_vm_json_says_how_the_vm_was_built(vms: Vms, sets: Sets, directory: Path) -> None:
    history = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUID), sets, directory)
    history.back_up("s1")
    history.back_up("s2")
    told = [json.loads((sets.path / "web01" / set_id / "vm.json").read_text()) for set_id in ("s1", "s2")]
    assert told[0]["uuid"] == UUID
    command = told[0]["command_line"]
    assert command[command.index("-uuid") + 1] == UUID
    assert f"file.filename={history.vm.disks[0].path}" in " ".join(command)
    assert told[0]["qemu"] == sets.manifest("web01", "s1")["qemu"]


def test_started_here_and_completed_there(history: History, sets: Sets) -> None:
    vm = history.vm
    history.back_up("s1")
    overwrite(vm, 0xA1)
    history.freeze("s2")
    planned = sets.plan(vm, id="s2", speed=SLOW)["plan"]
    started = succeed("backup_set", {"plan": planned, "state": "started"})
    assert result_of(started, "web01")["level"] == "incremental"
    assert sent(started, "drive-backup")[0]["bitmap-mode"] == "never"
    # From another process, which has a plan of its own or none.
    again = succeed("backup_set", {"plan": planned, "state": "started"})
    assert (again["changed"], result_of(again, "web01")["state"]) == (False, "running")
    release(vm)
    wait_concluded(vm)
    attached = sets.plan(vm, id="s2")["plan"]
    assert [(found["action"], found["level"]) for found in attached["vms"]] == [("attach", "incremental")]
    done = succeed("backup_set", {"plan": attached})
    assert result_of(done, "web01")["disks"][0]["reason"] == "changes since set s1"
    assert history.note("s2") == {"drive0": "incremental"}
    assert history.back_up("s3") == "incremental"
    history.check()
