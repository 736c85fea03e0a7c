# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_verify: what is wrong with a set is found and named, and nothing of a set changes by looking at it."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.booting import NAME, RESTART, SIZE, boot, bootable, throwaway
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

BOTH = ["drive0", "drive1"]


@pytest.fixture
def place() -> t.Iterator[Path]:
    """A directory for throwaway VMs; the names of their sockets are not to get too long."""
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)


def chain(vms: Vms, sets: Sets, name: str = NAME, first: int = 0, **options: t.Any) -> Qemu:
    """A VM of two disks with three sets: `s1` is full, `s2` and `s3` are increments of one size on both disks."""
    vm = vms.start(*(vms.disk(number, size=SIZE) for number in (first, first + 1)), name=name)
    for number, set_id in enumerate(("s1", "s2", "s3")):
        if number:
            for disk in vm.disks:
                vm.write(disk.id or "", 0xA0 + 16 * first + number + ord((disk.id or "0")[-1]), number * MIB, 65536)
        sets.back_up(vm, id=set_id, **options)
        expected = "full" if number == 0 else "incremental"
        assert set(sets.levels(name, set_id).values()) == {expected}
    return vm


def arguments(sets: Sets, **options: t.Any) -> dict[str, t.Any]:
    return {"repository": str(sets.path), **options}


def good(sets: Sets, check: bool = False, **options: t.Any) -> list[dict[str, t.Any]]:
    """Verify sets that are good; returns the results."""
    result = succeed("backup_verify", arguments(sets, **options), check=check)
    assert not result["changed"]
    results: list[dict[str, t.Any]] = result["results"]
    assert all(one["ok"] and not one["error"] for one in results)
    return results


def bad(sets: Sets, **options: t.Any) -> dict[tuple[str, str, str], dict[str, t.Any]]:
    """Verify sets of which some are bad; returns what is wrong, by VM, set and disk. The message tells it as well."""
    result = fail("backup_verify", arguments(sets, **options))
    found = {(one["vm"], one["id"], one["disk"]): one for one in result["results"] if not one["ok"]}
    assert found
    for (name, set_id, _disk), one in found.items():
        assert one["error"]
        assert f"VM {name}, set {set_id}: " in result["msg"]
        assert one["error"] in result["msg"]
    return found


def images(sets: Sets, set_id: str, name: str = NAME) -> list[Path]:
    return [sets.images(name, set_id)[disk] for disk in sorted(sets.images(name, set_id))]


def change(path: Path, at: int, content: bytes) -> None:
    """Write into a published file, which is read-only, and leave its size as it is."""
    with path.open("r+b") as image:
        image.seek(at)
        image.write(content)


def flip(path: Path, at: int = -100) -> None:
    """Change one bit."""
    with path.open("r+b") as image:
        image.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = image.read(1)
        image.seek(-1, os.SEEK_CUR)
        image.write(bytes([byte[0] ^ 1]))


def info(sets: Sets) -> dict[str, dict[str, t.Any]]:
    """What backup_info says of each set."""
    return {one["id"]: one for one in succeed("backup_info", {"repository": str(sets.path)})["sets"]}


def content(sets: Sets) -> dict[str, tuple[object, ...]]:
    """Everything about the sets; what is said beside them, and the locks, are no part of it."""
    found = snapshot(sets.path)
    directories = [path for path in sets.path.glob("*/*") if not path.name.startswith(".")]
    return {path: state for path, state in found.items() if {Path(path), *Path(path).parents} & {*directories}}


@pytest.mark.parametrize("depth", ["manifest", "checksum", "image"])
def test_good_sets(vms: Vms, sets: Sets, depth: str) -> None:
    chain(vms, sets)
    before = content(sets)
    everything = snapshot(sets.path)
    assert len(good(sets, depth=depth, check=True)) == 2
    assert snapshot(sets.path) == everything
    assert good(sets, depth=depth) == [
        {"vm": NAME, "id": "s3", "disk": disk, "depth": depth, "ok": True, "error": "", "note": ""} for disk in BOTH
    ]
    assert content(sets) == before
    verified = {set_id: one["verified"] for set_id, one in info(sets).items()}
    assert verified["s1"] == verified["s2"] == {}
    assert (verified["s3"]["depth"], verified["s3"]["ok"], verified["s3"]["errors"]) == (depth, True, [])
    assert [one["id"] for one in good(sets, names=[NAME], id="s2", depth=depth)] == ["s2", "s2"]
    assert info(sets)["s2"]["verified"]["ok"]


def test_flipped_byte_in_a_parent(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    image = images(sets, "s1")[0]
    flip(image)
    good(sets, depth="manifest")
    before = content(sets)
    found = bad(sets)
    assert list(found) == [(NAME, "s3", "drive0")]
    [one] = found.values()
    assert one["depth"] == "checksum"
    assert f"image {image} is not what was written" in one["error"]
    assert "full backup" in one["error"]
    assert content(sets) == before
    told = info(sets)
    for set_id in ("s3", "s1"):
        assert not told[set_id]["verified"]["ok"]
        assert str(image) in told[set_id]["verified"]["errors"][0]
    # What only shows at depth checksum is not forgotten by a look that goes less deep.
    result = succeed("backup_verify", arguments(sets, depth="manifest"))
    assert "verify it with that depth again" in " ".join(result["warnings"])
    assert not info(sets)["s3"]["verified"]["ok"]
    flip(image)
    good(sets)
    assert info(sets)["s3"]["verified"]["ok"]


def test_a_failed_set_is_kept_as_broken(vms: Vms, sets: Sets) -> None:
    vm = chain(vms, sets)
    sets.back_up(vm, id="s4", level="full")
    flip(images(sets, "s4")[1])
    bad(sets)
    kept = {
        one["id"]: one["reason"]
        for one in succeed("backup_prune", {"repository": str(sets.path), "keep_last": 1})["kept"]
    }
    assert "it is broken" in kept["s4"]
    assert str(images(sets, "s4")[1]) in kept["s4"]
    assert "last" in kept["s3"]


def test_truncated_and_missing_files(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    first, second = images(sets, "s2")
    with first.open("r+b") as image:
        image.truncate(first.stat().st_size - 1)
    second.unlink()
    found = bad(sets, depth="manifest")
    assert set(found) == {(NAME, "s3", disk) for disk in BOTH}
    assert f"{first} is not the file that its manifest describes" in found[(NAME, "s3", "drive0")]["error"]
    assert f"{second} is missing" in found[(NAME, "s3", "drive1")]["error"]
    assert {one["depth"] for one in bad(sets, depth="image").values()} == {"manifest"}
    good(sets, id="s1")


def test_missing_parent(vms: Vms, sets: Sets, directory: Path) -> None:
    chain(vms, sets)
    shutil.move(sets.path / NAME / "s2", directory / "elsewhere")
    found = bad(sets)
    assert set(found) == {(NAME, "s3", disk) for disk in BOTH}
    assert "set s2, which s3 builds on, is gone" in found[(NAME, "s3", "drive0")]["error"]


def exchange(one: Path, other: Path) -> None:
    assert one.stat().st_size == other.stat().st_size
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


@pytest.mark.parametrize("checksum", [True, False])
def test_images_of_two_disks_exchanged(vms: Vms, sets: Sets, checksum: bool) -> None:
    chain(vms, sets, checksum=checksum)
    first, second = images(sets, "s3")
    exchange(first, second)
    good(sets, depth="manifest")
    found = bad(sets)
    assert {key[2]: one["depth"] for key, one in found.items()} == dict.fromkeys(BOTH, "checksum")
    assert str(first) in found[(NAME, "s3", "drive0")]["error"]
    if not checksum:
        [error] = [one["error"] for key, one in found.items() if key[2] == "drive0"]
        assert "builds on '../s2/drive1.qcow2', but must build on '../s2/drive0.qcow2'" in error


@pytest.mark.parametrize("checksum", [True, False])
def test_image_of_another_set(vms: Vms, sets: Sets, checksum: bool) -> None:
    chain(vms, sets, checksum=checksum)
    first, other = images(sets, "s3")[0], images(sets, "s2")[0]
    assert first.stat().st_size == other.stat().st_size
    first.write_bytes(other.read_bytes())
    good(sets, depth="manifest")
    found = bad(sets)
    assert {key[2]: one["depth"] for key, one in found.items()} == {"drive0": "checksum"}
    assert str(first) in found[(NAME, "s3", "drive0")]["error"]


def test_image_of_another_size_and_a_full_one_with_a_backing_file(vms: Vms, sets: Sets) -> None:
    chain(vms, sets, checksum=False)
    first, second = images(sets, "s1")
    change(first, 24, struct.pack(">Q", SIZE // 2))
    size = second.stat().st_size
    qemu_img("rebase", "-u", "-b", "/etc/hostname", "-F", "raw", second)
    assert second.stat().st_size == size
    found = bad(sets, id="s1")
    assert f"it has {SIZE // 2} bytes, and the disk had {SIZE}" in found[(NAME, "s1", "drive0")]["error"]
    assert "it builds on '/etc/hostname', but must build on nothing" in found[(NAME, "s1", "drive1")]["error"]


def test_damaged_header_without_a_checksum(vms: Vms, sets: Sets) -> None:
    chain(vms, sets, checksum=False)
    image = images(sets, "s1")[1]
    change(image, 0, b"QFI\x00")
    good(sets, depth="manifest")
    [one] = bad(sets).values()
    assert (one["disk"], one["depth"]) == ("drive1", "checksum")
    assert f"image {image} is damaged: it does not begin as a qcow2 image does" in one["error"]


def damage_refcounts(image: Path) -> None:
    with image.open("rb") as source:
        source.seek(48)
        [table] = struct.unpack(">Q", source.read(8))
        source.seek(table)
        [block] = struct.unpack(">Q", source.read(8))
    change(image, block, bytes(64))


def test_damaged_metadata_without_a_checksum(vms: Vms, sets: Sets) -> None:
    chain(vms, sets, checksum=False)
    image = images(sets, "s1")[1]
    damage_refcounts(image)
    results = good(sets)
    assert all(one["note"].startswith("made without a checksum: ") for one in results)
    assert str(image) in results[1]["note"]
    assert info(sets)["s3"]["verified"]["depth"] == "manifest"
    found = bad(sets, depth="image")
    assert list(found) == [(NAME, "s3", "drive1")]
    assert f"image {image} is damaged" in found[(NAME, "s3", "drive1")]["error"]
    assert len(found[(NAME, "s3", "drive1")]["error"]) < 1000
    assert not info(sets)["s1"]["verified"]["ok"]


def test_every_cluster_is_read(vms: Vms, sets: Sets) -> None:
    """A compressed cluster that cannot be unpacked is none of the business of qemu-img check."""
    chain(vms, sets, checksum=False, compression="zlib")
    image = images(sets, "s1")[0]
    change(image, compressed_at(image), b"\xff" * 32)
    qemu_img("check", image)
    found = bad(sets, depth="image")
    assert list(found) == [(NAME, "s3", "drive0")]
    assert f"image {images(sets, 's3')[0]} cannot be read whole" in found[(NAME, "s3", "drive0")]["error"]


def compressed_at(image: Path) -> int:
    """Where the data of the first cluster is in an image with 64 KiB clusters (docs/interop/qcow2.txt)."""
    with image.open("rb") as source:
        source.seek(40)
        [l1] = struct.unpack(">Q", source.read(8))
        source.seek(l1)
        [l2] = struct.unpack(">Q", source.read(8))
        source.seek(l2 & 0x00FFFFFFFFFFFE00)
        [entry] = struct.unpack(">Q", source.read(8))
    assert entry & 1 << 62
    return int(entry & (1 << (62 - 8)) - 1)


def test_what_does_not_belong_to_a_set(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    directory = sets.path / NAME / "s3"
    (directory / "notes.txt").write_text("mine")
    # These do: they are left where a process is killed, and when a file is removed on NFS that somebody reads.
    (directory / "intent.json").write_text("{}")
    (directory / "manifest.json.new").write_text("{}")
    (directory / ".nfs0001").write_text("")
    found = bad(sets, depth="manifest")
    assert list(found) == [(NAME, "s3", "")]
    assert f"{directory / 'notes.txt'} does not belong to the set; move it away" in found[(NAME, "s3", "")]["error"]
    (directory / "notes.txt").unlink()
    good(sets, depth="manifest")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": 99}'])
def test_unreadable_description(vms: Vms, sets: Sets, text: str | None) -> None:
    chain(vms, sets)
    path = sets.path / NAME / "s3" / "vm.json"
    path.unlink()
    if text:
        path.write_text(text)
    result = fail("backup_verify", arguments(sets))
    assert [(one["disk"], one["ok"]) for one in result["results"]] == [("", False), ("drive0", True), ("drive1", True)]
    assert f"{path} cannot be read" in result["results"][0]["error"]


def test_damaged_manifests(vms: Vms, sets: Sets) -> None:
    """The newest set is not passed over in silence, and a VM that has no other is not forgotten."""
    chain(vms, sets)
    sets.back_up(vms.start(vms.disk(5, size=SIZE), name="db01"), id="only")
    (sets.path / "reports").mkdir()
    (sets.path / "reports" / "today").mkdir()
    (sets.path / NAME / "notes.txt").write_text("mine")
    good(sets)
    for path in (sets.path / NAME / "s3", sets.path / "db01" / "only"):
        (path / "manifest.json").chmod(0o600)
        (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])
    found = bad(sets)
    assert set(found) == {(NAME, "s3", ""), ("db01", "only", "")}
    manifest = sets.path / "db01" / "only" / "manifest.json"
    assert f"{manifest} is damaged" in found[("db01", "only", "")]["error"]
    assert set(bad(sets, names=[NAME], id="s3")) == {(NAME, "s3", "")}
    assert {one["id"] for one in good(sets, names=[NAME], id="s2")} == {"s2"}


def test_a_set_in_another_vms_directory(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    shutil.copytree(sets.path / NAME, sets.path / "other")
    found = bad(sets, names=["other"])
    assert "manifest.json is damaged or misplaced (it is of VM web01, " in found[("other", "s3", "")]["error"]


def test_no_such_vm_or_set(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    result = fail("backup_verify", arguments(sets, names=["web02"]))
    assert result["msg"] == f"names: web02 has no set in {sets.path}; VMs there: {NAME}"
    result = fail("backup_verify", arguments(sets, names=[NAME], id="s9"))
    assert f"VM {NAME} has no set s9; it has: s1, s2, s3" in result["msg"]
    assert fail("backup_verify", arguments(sets, id="../x"))["msg"].startswith("id: ")
    assert "is not a repository" in fail("backup_verify", {"repository": str(sets.path / NAME)})["msg"]


def test_an_empty_repository_is_warned_of(sets: Sets, vms: Vms) -> None:
    sets.back_up(vms.start(vms.disk(size=SIZE), name=NAME))
    shutil.rmtree(sets.path / NAME)
    result = succeed("backup_verify", arguments(sets))
    assert result["results"] == []
    assert "nothing was verified" in result["warnings"][0]


def test_one_bad_vm_does_not_stop_the_others(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    for number, name in enumerate(("db01", "db02"), start=5):
        sets.back_up(vms.start(vms.disk(number, size=SIZE), name=name), id="s1")
    flip(images(sets, "s1", "db01")[0])
    result = fail("backup_verify", arguments(sets, depth="image"))
    assert "sets that are not good: 1: " in result["msg"]
    found = [(one["vm"], one["id"], one["ok"]) for one in result["results"]]
    assert found == [("db01", "s1", False), ("db02", "s1", True), (NAME, "s3", True), (NAME, "s3", True)]
    # A VM that has no such set is a failure of its own.
    result = fail("backup_verify", arguments(sets, id="s3"))
    assert [(one["vm"], one["ok"]) for one in result["results"]] == [
        ("db01", False), ("db02", False), (NAME, True), (NAME, True)
    ]  # fmt: skip


def test_a_vm_that_cannot_be_read_does_not_stop_the_others(vms: Vms, sets: Sets) -> None:
    chain(vms, sets)
    loop = sets.path / "db01" / "s1" / "manifest.json"
    newer = sets.path / "db02" / ".s1.staging" / "intent.json"
    for path in (loop, newer):
        path.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    newer.write_text('{"schema": 99}')
    for names in ({}, {"names": ["db01", "db02", NAME]}):
        result = fail("backup_verify", arguments(sets, **names))
        found = [(one["vm"], one["disk"], one["ok"]) for one in result["results"]]
        assert found == [("db01", "", False), ("db02", "", False), *((NAME, disk, True) for disk in BOTH)]
        assert str(loop) in result["results"][0]["error"]
        assert str(newer) in result["results"][1]["error"]


def test_read_only_repository(vms: Vms, storage: Storage) -> None:
    mount = storage.mount("ext4", 64 * MIB)
    sets = Sets(mount.path / "repository")
    chain(vms, sets)
    for vm in vms.started:
        vm.close()
    mount.make_read_only()
    result = succeed("backup_verify", arguments(sets, depth="image"))
    assert all(one["ok"] for one in result["results"])
    [warning] = result["warnings"]
    assert "Read-only file system" in warning
    assert f"VM {NAME}, set s3" in warning


def test_a_set_that_is_consolidated_while_it_is_read(
    vms: Vms, sets: Sets, start_module: t.Callable[..., ModuleProcess]
) -> None:
    """Both at once, again and again: the one never takes the other's work for damage."""
    vm = chain(vms, sets)
    for number in range(4, 9):
        process = start_module("backup_verify", arguments(sets, id="s3", depth="image"))
        pruned = start_module("backup_prune", {"repository": str(sets.path), "keep_last": 2, "consolidate": True})
        assert pruned.result()["rc"] == 0
        result = process.result()
        gone = "has no set s3" in result.get("msg", "")
        assert result["rc"] == 0 or gone, result
        if gone:
            break
        sets.back_up(vm, id=f"s{number}")


# A VM is started from a set


@pytest.mark.parametrize("device", ["ide-hd,bus=ide.0", "virtio-blk-pci,id=vd0"])
def test_boot(vms: Vms, sets: Sets, directory: Path, place: Path, device: str) -> None:
    bootable(vms, sets, directory, device=device)
    before = content(sets)
    results = good(sets, **boot(place))
    assert [(one["disk"], one["depth"]) for one in results] == [("", "boot"), ("drive0", "boot")]
    assert results[0]["console"] == []
    assert content(sets) == before
    assert list(place.iterdir()) == throwaway(place) == []
    told = info(sets)["s2"]
    assert (told["verified"]["depth"], told["verified"]["ok"], told["used_by"]) == ("boot", True, [])


def test_boot_of_a_set_that_says_nothing(vms: Vms, sets: Sets, directory: Path, place: Path) -> None:
    bootable(vms, sets, directory, "one\r\ntwo \x1b[31mred\x1b[0m")
    # On a busy machine it takes a guest long to say anything at all.
    for seconds in (10, 40, 160):
        [one] = bad(sets, **boot(place, boot_timeout=seconds)).values()
        assert (one["id"], one["disk"], one["depth"]) == ("s2", "", "boot")
        assert f"no sign of life ('^HELLO$' on its console) within {seconds} s" in one["error"]
        if one["console"]:
            break
    assert one["console"][-2:] == ["one", "two red"]
    assert list(place.iterdir()) == throwaway(place) == []
    assert (info(sets)["s2"]["verified"]["ok"], info(sets)["s2"]["used_by"]) == (False, [])
    good(sets, **boot(place, boot_pattern="two red$"))
    assert info(sets)["s2"]["verified"]["ok"]


def test_boot_of_a_guest_that_restarts(vms: Vms, sets: Sets, directory: Path, place: Path) -> None:
    bootable(vms, sets, directory, "panic", RESTART)
    [one] = bad(sets, **boot(place)).values()
    assert "switched off or restarted before it gave a sign of life" in one["error"]
    assert one["console"][-1] == "panic"
    # What is said at the very end counts as well.
    good(sets, **boot(place, boot_pattern="panic"))


def test_boot_that_is_not_the_sets_fault(vms: Vms, sets: Sets, place: Path) -> None:
    """Its machine has nothing that starts, and no room for a disk."""
    chain(vms, sets)
    [one] = bad(sets, **boot(place)).values()
    assert "QEMU ended before the guest gave a sign of life" in one["error"]
    assert "boot_options" in one["error"]
    verified = info(sets)["s3"]["verified"]
    assert (verified["depth"], verified["ok"]) == ("image", True)
    assert list(place.iterdir()) == []
    [one] = bad(sets, **boot(place, boot_options=["-M", "q35", "-m", "64"], boot_timeout=3)).values()
    assert "no sign of life" in one["error"]


def test_boot_of_a_broken_set(vms: Vms, sets: Sets, directory: Path, place: Path) -> None:
    bootable(vms, sets, directory)
    flip(images(sets, "s1")[0])
    found = bad(sets, **boot(place))
    assert found[(NAME, "s2", "drive0")]["depth"] == "checksum"
    assert found[(NAME, "s2", "")]["error"] == "not started, since disk drive0 is not good"
    for one in info(sets).values():
        assert (one["verified"]["depth"], one["verified"]["ok"]) == ("checksum", False)


def test_what_boot_finds_in_a_parent_is_known_of_all_that_build_on_it(vms: Vms, sets: Sets, place: Path) -> None:
    """The good chain stays, as none of the sets that lie between counts as a good one."""
    vm = chain(vms, sets)
    for number in (4, 5, 6, 7):
        sets.back_up(vm, id=f"s{number}", level="full" if number == 4 else "auto")
    flip(images(sets, "s4")[0])
    assert set(bad(sets, **boot(place))) == {(NAME, "s7", ""), (NAME, "s7", "drive0")}
    pruned = succeed("backup_prune", {"repository": str(sets.path), "keep_last": 2})
    assert pruned["removed"] == []
    reasons = {one["id"]: one["reason"] for one in pruned["kept"]}
    assert all("it is broken" in reasons[f"s{number}"] for number in (4, 5, 6, 7))
    assert "last" in reasons["s2"]
    assert "last" in reasons["s3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boot_pattern": None}, "boot_agent: "),
        ({"boot_pattern": "("}, "boot_pattern: "),
        ({"boot_options": ["-m", "64", "-netdev", "user,id=n"]}, "boot_options: -netdev"),
        ({"boot_options": ["--daemonize"]}, "boot_options: -daemonize"),
        ({"tmpdir": "/nowhere"}, "tmpdir: "),
        ({"qemu": "/nowhere/qemu"}, "qemu: /nowhere/qemu"),
    ],
)
def test_boot_that_is_refused(sets: Sets, place: Path, options: dict[str, t.Any], message: str) -> None:
    assert fail("backup_verify", arguments(sets, **boot(place, **options)))["msg"].startswith(message)


def test_boot_is_killed(
    vms: Vms, sets: Sets, directory: Path, place: Path, start_module: t.Callable[..., ModuleProcess]
) -> None:
    bootable(vms, sets, directory)
    process = start_module("backup_verify", arguments(sets, **boot(place, boot_pattern="never")))
    wait_until(lambda: throwaway(place), "the throwaway VM")
    # While it runs, its set is kept.
    [user] = info(sets)["s2"]["used_by"]
    assert user.startswith(str(place))
    sets.back_up(vms.started[0], id="s3", level="full")
    kept = succeed("backup_prune", {"repository": str(sets.path), "keep_last": 1})["kept"]
    assert {one["id"] for one in kept} == {"s1", "s2", "s3"}
    process.kill()
    wait_until(lambda: not throwaway(place), "the end of the throwaway VM")
    # The directory is still there; the next run takes it, and so does prune the pin.
    assert list(place.iterdir())
    run_module("backup_verify", arguments(sets, id="s2", **boot(place)))
    assert list(place.iterdir()) == []
    kept = succeed("backup_prune", {"repository": str(sets.path), "keep_last": 1})["kept"]
    assert {one["id"] for one in kept} == {"s3"}
