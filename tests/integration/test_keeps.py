# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a copy does not keep: it is said before the copy is made, or the copy is refused."""

from __future__ import annotations

import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, snapshot
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, patterned, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets, result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

SECRET = "secret,id=s0,data=harmless"
KINDS = {"qcow2": "encrypt.", "luks": ""}
CLEAR = "disk {} is encrypted at rest, and its copy is not: whoever can read the copy can read the disk"


def locked(directory: Path, number: int = 0, fmt: str = "qcow2") -> Disk:
    """A disk with a pattern in an encrypted image; QEMU needs the object SECRET for it."""
    plain = patterned(directory / f"plain{number}.qcow2", size=16 * MIB, seed=number)
    path, prefix = directory / f"locked{number}.{fmt}", KINDS[fmt]
    options = f"{prefix}key-secret=s0,{prefix}iter-time=10" + (",encrypt.format=luks" if prefix else "")
    # It measures how fast the machine hashes, and gives up where that takes no time that it could see.
    wait_until(lambda: _made(options, fmt, path), "an encrypted image")
    there = f"driver={fmt},file.filename={path},{prefix}key-secret=s0"
    qemu_img("convert", "-n", "--object", SECRET, "--target-image-opts", "-f", "qcow2", plain, there)
    return Disk(path, id=f"drive{number}", node=f"n{number}", format=fmt, options={f"{prefix}key-secret": "s0"})


def _made(options: str, fmt: str, path: Path) -> bool:
    try:
        qemu_img("create", "-q", "--object", SECRET, "-f", fmt, "-o", options, path, str(16 * MIB))
    except AssertionError as error:
        if "accurate CPU usage" not in str(error):
            raise
        return False
    return True


def frozen(vm: Qemu, disk: Disk, directory: Path, name: str) -> dict[str, Path]:
    """A copy in the clear of an encrypted disk as the guest sees it."""
    vm.io(disk.name, "flush")
    options = (f"driver={disk.format}", f"file.filename={disk.path}", *(f"{a}={b}" for a, b in disk.options.items()))
    qemu_img("convert", "-U", "--object", SECRET, "--image-opts", "-O", "qcow2", ",".join(options), directory / name)
    return {disk.name: directory / name}


def start(vms: Vms, *disks: Disk) -> Qemu:
    return vms.start(*disks, name="web01", extra=("-object", SECRET))


@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.parametrize("compression", first(1, ["zstd", "none"]))
def test_encrypted_disk(fmt: str, compression: str, vms: Vms, directory: Path, sets: Sets) -> None:
    disk = locked(directory, fmt=fmt)
    vm = start(vms, disk)
    said = f"VM web01: {CLEAR.format('drive0')}"
    for set_id, level in (("s1", "full"), ("s2", "incremental")):
        vm.write("drive0", 0x5A if level == "full" else 0xA5, 3 * MIB, 65536)
        copies = frozen(vm, disk, directory, f"{set_id}.qcow2")
        planned = sets.plan(vm, id=set_id, compression=compression)
        assert planned["plan"]["warnings"] == planned["warnings"] == [said]
        assert [line for line in planned["text"] if "encrypted" in line] == [f"Warning: {said}"]
        result = succeed("backup_set", {"plan": planned["plan"]})
        assert result_of(result, "web01")["warnings"] == [CLEAR.format("drive0")]
        assert [warning for warning in result["warnings"] if "encrypted" in warning] == [
            f"web01: {CLEAR.format('drive0')}"
        ]
        sets.assert_good("web01", copies, set_id, {"drive0": level})
        assert [entry["source_encrypted"] for entry in sets.manifest("web01", set_id)["disks"]] == [True]
        assert "encrypted" not in info(sets.images("web01", set_id)["drive0"])
        found = succeed("backup_info", {"repository": str(sets.path)})
        assert found["sets"][0]["decrypted"] == ["drive0"]


def test_encrypted_layer_below(vms: Vms, directory: Path, sets: Sets) -> None:
    base = locked(directory)
    # Its own clusters are in the clear; those of the layer below it are not.
    layer = f'{{"driver": "qcow2", "encrypt.key-secret": "s0", "file.filename": "{base.path}"}}'
    top = directory / "top.qcow2"
    qemu_img("create", "-q", "--object", SECRET, "-f", "qcow2", "-b", f"json:{layer}", "-F", "qcow2", top)
    vm = start(vms, Disk(top))
    planned = sets.plan(vm)
    assert planned["plan"]["warnings"] == [f"VM web01: {CLEAR.format('drive0')}"]
    succeed("backup_set", {"plan": planned["plan"]})
    sets.assert_good("web01", {"drive0": directory / "plain0.qcow2"})


def test_plain_disks_give_no_warning(vms: Vms, sets: Sets) -> None:
    vm = vms.start(name="web01")
    planned = sets.plan(vm, encrypted_source="refuse")
    assert planned["plan"]["warnings"] == []
    result = succeed("backup_set", {"plan": planned["plan"]})
    assert result_of(result, "web01")["warnings"] == []
    assert [entry["source_encrypted"] for entry in sets.manifest("web01")["disks"]] == [False]
    assert succeed("backup_info", {"repository": str(sets.path)})["sets"][0]["decrypted"] == []


def test_encrypted_disk_is_refused(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = start(vms, locked(directory, 0), vms.disk(1))
    planned = sets.plan(vm, encrypted_source="refuse")
    [web01] = planned["plan"]["vms"]
    said = "encrypted_source: disk drive0 is encrypted at rest, but its copy would not be encrypted"
    assert (web01["action"], web01["reason"].startswith(said)) == ("fail", True), web01
    assert "(vm_backup_encrypted_source)" in web01["reason"]
    assert planned["plan"]["warnings"] == []
    result = fail("backup_set", {"plan": planned["plan"]})
    assert f"web01: {said}" in result["msg"]
    assert result["qmp"] == []
    sets.assert_absent("web01")
    # What is left out does not count.
    sets.back_up(vm, encrypted_source="refuse", exclude_disks=["drive0"])
    assert list(sets.images("web01")) == ["drive1"]


def test_disk_that_is_encrypted_since_the_plan_is_refused(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = vms.start(name="web01", extra=("-object", SECRET))
    plan = sets.plan(vm, encrypted_source="refuse")["plan"]
    vm.quit()
    vm.disks = (locked(directory),)
    vm.restart()
    result = fail("backup_set", {"plan": plan})
    assert "web01: encrypted_source: disk drive0 is encrypted at rest" in result["msg"]
    assert not vm.block_jobs
    sets.assert_absent("web01")


def test_internal_snapshots_and_a_data_file(vms: Vms, directory: Path, sets: Sets) -> None:
    kept, split = vms.disk(0), directory / "split.qcow2"
    qemu_img("snapshot", "-c", "before", t.cast("Path", kept.path))
    data = directory / "split.data"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", split, "8M")
    vm = vms.start(kept, Disk(split, id="drive1", node="n1"), name="web01")
    vm.write("drive1", 7, 0, MIB)
    copies = {disk.name: vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    planned = sets.plan(vm)
    assert planned["plan"]["warnings"] == [
        "VM web01: disk drive0 has 1 internal snapshot, which is not copied: its copy is the disk as it is now",
        f"VM web01: disk drive1 has its data in another file ({data}); its copy is one image",
    ]
    result = succeed("backup_set", {"plan": planned["plan"]})
    assert result_of(result, "web01")["warnings"] == []
    sets.assert_good("web01", copies)
    assert sets.plan(vm)["plan"]["warnings"] == []


def test_two_disks_on_one_file(vms: Vms, directory: Path, sets: Sets) -> None:
    path = create(directory / "shared.raw", 8 * MIB, "raw")
    file = {"driver": "file", "filename": str(path), "locking": "off"}
    twins = [Disk(path, id=f"drive{n}", node=f"n{n}", format="raw", file=file) for n in (0, 1)]
    vm = vms.start(*twins, name="web01")
    for set_id in ("s1", "s2"):
        # Nothing that the first disk's own record would know of.
        vm.write("drive1", 0x11 if set_id == "s1" else 0x22, MIB, 65536)
        planned = sets.plan(vm, id=set_id)
        [said] = planned["plan"]["warnings"]
        assert said.startswith(f"VM web01: disks drive0 and drive1 are on one file ({path}): ")
        succeed("backup_set", {"plan": planned["plan"]})
        assert sets.levels("web01", set_id) == {"drive0": "full", "drive1": "full"}
        for image in sets.images("web01", set_id).values():
            assert identical(path, image, "raw")
        assert [disk["bitmap"] for disk in sets.manifest("web01", set_id)["disks"]] == [None, None]
    assert sets.reasons("web01", "s2")["drive0"].startswith("disk drive1 is on the same file")


def test_two_disks_on_one_device_by_two_names(vms: Vms, storage: Storage, sets: Sets) -> None:
    device = storage.loop(8 * MIB)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as links:
        by_id = Path(links, "by-id")
        by_id.symlink_to(device)
        twins = [
            Disk(
                path,
                f"drive{n}",
                f"n{n}",
                "raw",
                file={"driver": "host_device", "filename": str(path), "locking": "off"},
            )
            for n, path in enumerate((device, by_id))
        ]
        vm = vms.start(*twins, name="web01")
        for set_id in ("s1", "s2"):
            vm.write("drive1", 0x11 if set_id == "s1" else 0x22, MIB, 65536)
            sets.back_up(vm, id=set_id)
            assert sets.levels("web01", set_id) == {"drive0": "full", "drive1": "full"}
            assert identical(device, sets.images("web01", set_id)["drive0"], "raw")


def test_parts_of_one_file_are_disks_of_their_own(vms: Vms, directory: Path, sets: Sets) -> None:
    path = create(directory / "table.raw", 8 * MIB, "raw")
    file = {"driver": "file", "filename": str(path), "locking": "off"}
    parts = [
        Disk(path, f"drive{n}", f"n{n}", "raw", file=file, options={"offset": str(n * 4 * MIB), "size": str(4 * MIB)})
        for n in (0, 1)
    ]
    vm = vms.start(*parts, name="web01")
    for set_id, level in (("s1", "full"), ("s2", "incremental")):
        vm.write("drive1", 0x11 if level == "full" else 0x22, MIB, 65536)
        planned = sets.plan(vm, id=set_id)
        assert planned["plan"]["warnings"] == []
        succeed("backup_set", {"plan": planned["plan"]})
        assert sets.levels("web01", set_id) == {"drive0": level, "drive1": level}


def test_read_only_disks_do_not_count(vms: Vms, sets: Sets) -> None:
    vm = vms.start(vms.disk(0, read_only=True), Disk(None, id="cd0"), name="web01")
    [web01] = sets.plan(vm)["plan"]["vms"]
    assert web01["action"] == "skip"
    assert web01["reason"] == (
        "it has no disk to back up: cd0 has no medium; drive0 is read-only. Read-only ones do not change with the VM;"
        " name them in include_disks to back them up too"
    )
    sets.back_up(vm, include_disks=["drive0"])


def drive(vm: Qemu, target: Path, **options: t.Any) -> dict[str, t.Any]:
    return {"monitor": str(vm.monitor), "device": "drive0", "target": str(target), **options}


def test_drive_backup_of_an_encrypted_disk(vms: Vms, directory: Path, target: Path) -> None:
    vm = start(vms, locked(directory))
    result = fail("drive_backup", drive(vm, target, encrypted_source="refuse"))
    assert result["msg"].startswith("encrypted_source: disk drive0 of VM web01 is encrypted at rest")
    assert (result["qmp"], list(target.parent.iterdir())) == ([], [])
    result = succeed("drive_backup", drive(vm, target))
    assert result["warnings"] == [f"VM web01: {CLEAR.format('drive0')}"]
    assert identical(directory / "plain0.qcow2", target)
    assert not succeed("drive_backup", drive(vm, target)).get("warnings")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("fmt", KINDS)
def test_encrypted_target_is_refused(compress: bool, fmt: str, vms: Vms, directory: Path) -> None:
    vm = vms.start(vms.disk(0, size=16 * MIB))
    there = locked(directory, 7, fmt).path
    assert there
    before = snapshot(directory)
    options = {"format": fmt} if fmt == "luks" else {}
    result = fail("drive_backup", drive(vm, there, mode="existing", overwrite=True, compress=compress, **options))
    option = "format: luks" if fmt == "luks" else "compress: " if compress else "target: "
    assert result["msg"].startswith(option), result["msg"]
    assert "this module cannot give QEMU the key of an encrypted target" in result["msg"]
    assert result.get("qmp", []) == []
    assert snapshot(directory) == before


def test_an_encrypted_disk_is_followed_and_restored_in_the_clear(vms: Vms, directory: Path, sets: Sets) -> None:
    vm = start(vms, locked(directory))
    plan = sets.start(vm)
    release(vm)
    assert result_of(succeed("backup_set", {"plan": plan}), "web01")["warnings"] == [CLEAR.format("drive0")]
    restored = directory / "restored"
    restored.mkdir()
    succeed("backup_restore", {"repository": str(sets.path), "vm": "web01", "id": ID, "directory": str(restored)})
    assert identical(directory / "plain0.qcow2", restored / "drive0.qcow2")
